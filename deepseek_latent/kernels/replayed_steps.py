"""Steps of decoding as one CUDA graph: a launch per token instead of hundreds."""

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from ..compat_cache_name import CACHE, CACHE_NAMES, MoeCausalLMOutputWithPast
from ..latent_cache import LatentCache

# what a step is computed from; a step that is asked for more is not replayed
INPUTS = ("input_ids", "position_ids", "attention_mask")
IGNORED = ("use_cache", "return_dict", *CACHE_NAMES)


class ReplayedSteps:
    """`forward` for the single tokens of one call of `generate()` over a static `LatentCache`.

    A graph reads weights, cache and inputs at fixed addresses. Within one call these do not move, and whatever is done
    to a model between calls (adapters, another device) finds no graph that still knows the old ones. The first step
    runs as it will be recorded, so that all is compiled and allocated; the second is captured, and all further ones are
    replayed.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] | None = None
        self._logits: Tensor | None = None

    def takes(self, inputs: dict) -> bool:
        cache, ids, mask = inputs.get(CACHE), inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(cache, LatentCache) or not cache.is_static or ids is None or ids.shape[1] != 1:
            return False
        if mask is not None and mask.dim() != 2:
            return False
        return all(x is None or x is False for name, x in inputs.items() if name not in (*INPUTS, *IGNORED))

    def __call__(self, **inputs) -> ModelOutput:
        """One step; its logits [b 1 vocab] are the caller's to keep."""
        cache, given = inputs[CACHE], {name: inputs[name] for name in INPUTS if inputs.get(name) is not None}
        if self._inputs is None:
            self._inputs = {name: x.clone() for name, x in given.items()}
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream), cache.count.recorded():
                output = self._step(cache)
            torch.cuda.current_stream().wait_stream(self._stream)
            return output
        for name, x in given.items():
            self._inputs[name].copy_(x)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._logits = self._step(cache).logits
        self._graph.replay()
        return MoeCausalLMOutputWithPast(logits=self._logits.clone(), **{CACHE: cache})

    def _step(self, cache: LatentCache) -> ModelOutput:
        return self.model(**self._inputs, **{CACHE: cache}, use_cache=True, return_dict=True)
