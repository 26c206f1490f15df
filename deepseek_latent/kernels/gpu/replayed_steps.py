"""Steps of decoding as a CUDA graph, which takes one launch per token instead of hundreds."""

import warnings

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from ...cache.latent_cache import LatentCache
from ...compat.cache_name import CACHE, CACHE_NAMES, MoeCausalLMOutputWithPast

# the inputs of a replayed step; a step with any other input is computed without a graph
INPUTS = ("input_ids", "position_ids", "attention_mask")
# inputs that do not change what is computed for a single token
IGNORED = ("use_cache", "return_dict", "logits_to_keep", *CACHE_NAMES)


class ReplayedSteps:
    """`forward` for the single tokens of one call of `generate()` over a static `LatentCache`.

    A graph reads weights, cache and inputs at fixed addresses, and within one call these do not move. Between calls, a
    model may get adapters or move to another device, so the next call records a graph of its own. The first step is
    computed just as it will be captured, so that everything is compiled and allocated; the second step is captured, and
    from then on steps are replayed.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._cannot_capture = False
        self._inputs: dict[str, Tensor] = {}
        self._logits: Tensor | None = None

    def supports(self, inputs: dict) -> bool:
        """True if a step with these inputs can be replayed: one token per sequence over a static `LatentCache`."""
        cache, ids, mask = inputs.get(CACHE), inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(cache, LatentCache) or not cache.is_static or ids is None or ids.shape[1] != 1:
            return False
        if mask is not None and mask.dim() != 2:
            return False
        return all(x is None or x is False for name, x in inputs.items() if name not in (*INPUTS, *IGNORED))

    def __call__(self, **inputs) -> ModelOutput:
        """Computes or replays one step; no later step overwrites its logits [b 1 vocab]."""
        cache = inputs[CACHE]
        if not self._inputs:
            return self._first(cache, inputs)
        for name, kept in self._inputs.items():
            kept.copy_(inputs[name])
        if self._graph is None and not self._capture(cache):
            with cache.count.recorded():
                return self._step(cache)
        self._graph.replay()
        return MoeCausalLMOutputWithPast(logits=self._logits.clone(), **{CACHE: cache})

    def _first(self, cache: LatentCache, inputs: dict) -> ModelOutput:
        self._inputs = {name: inputs[name].clone() for name in INPUTS if inputs.get(name) is not None}
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), cache.count.recorded():
            output = self._step(cache)
        torch.cuda.current_stream().wait_stream(self._stream)
        return output

    def _capture(self, cache: LatentCache) -> bool:
        """Captures a step and returns True. If that fails, warns with the reason and returns False."""
        if self._cannot_capture:
            return False
        # `with torch.cuda.graph(...)` would first free cached memory, which the next prompt would have to allocate
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._logits = self._step(cache).logits
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self._cannot_capture = True
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"steps are computed and not replayed, since one could not be captured: {reason}", stacklevel=2
            )
            return False
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graph = graph
        return True

    def _step(self, cache: LatentCache) -> ModelOutput:
        return self.model(**self._inputs, **{CACHE: cache}, use_cache=True, return_dict=True)
