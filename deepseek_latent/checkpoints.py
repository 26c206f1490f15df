"""How the weights of a DeepSeek-V2 are initialized, loaded and saved, and what is refused."""

import functools

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .attention.rotary import DeepseekV2RotaryEmbedding
from .compat.accelerate import device_map_without_offloading
from .compat.peft_changes import check_no_expert_dropped, remove_adapter
from .compat.transformers import LoadingHooks
from .experts.names import failure_of_quantizer, incomplete_backbone, missing_in_files, pattern_in_files
from .experts.routed import DeepseekV2Experts
from .experts.router import DeepseekV2MoEGate


class CheckpointMixin(LoadingHooks):
    """Refuses to load incomplete models, and to save experts that files cannot hold; precedes PreTrainedModel."""

    # transformers 5.24 trains and saves routers in float32, the release has bfloat16; both compute them in float32
    keep_dtype_of_files = ("gate.weight",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, DeepseekV2RotaryEmbedding):
            # these buffers are not in the checkpoint, so they are computed again whenever a model is loaded
            buffers, _ = module.initial_buffers()
            for name, buffer in buffers.items():
                init.copy_(module.get_buffer(name), buffer)
            return
        super()._init_weights(module)
        if isinstance(module, (DeepseekV2Experts, DeepseekV2MoEGate)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)

    @functools.wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(self, *args, **kwargs):
        # if transformers itself added adapters, it saves these alone
        if not self.has_adapters_of_transformers():
            for module in self.modules():
                if isinstance(module, DeepseekV2Experts) and module.weights.why_no_saving is not None:
                    raise ValueError(module.weights.why_no_saving)
        super().save_pretrained(*args, **kwargs)

    @functools.wraps(PreTrainedModel.load_adapter)
    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        name = adapter_name or "default"
        is_new = name not in getattr(self, "peft_config", {})
        # an adapter stays on the device that computes its layer
        with device_map_without_offloading(self):
            loaded = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        try:
            check_no_expert_dropped(loaded.unexpected_keys)
        except ValueError:
            # hotswap=True writes into an adapter that is there
            if is_new:
                remove_adapter(self, name)
            raise
        return loaded

    def check_loaded(self, missing: list[str], mismatched: list[tuple], errors: dict[str, str]) -> None:
        """Refuses a checkpoint that lacks a part of the backbone, or the head of a language model.

        transformers would initialize that part at random. The heads of other classes are new in most checkpoints, so
        these may be missing.
        """
        if (failure := failure_of_quantizer(errors)) is not None:
            raise failure
        prefix = f"{self.base_model_prefix}." if hasattr(self, self.base_model_prefix) else ""
        problems = [missing_in_files(name, errors.get(name)) for name in missing if name.startswith(prefix)]
        problems += [
            f"{pattern_in_files(name)} has shape {list(in_file)}, expected {list(in_model)}"
            for name, in_file, in_model in mismatched
            if name.startswith(prefix)
        ]
        if problems:
            raise incomplete_backbone(problems)
        head = self.get_output_embeddings()
        # a head that is tied to the embeddings is not among the missing names
        problems = [f"{name} is missing" for name in missing if self.get_submodule(name.rpartition(".")[0]) is head]
        if problems:
            raise ValueError(
                f"the checkpoint does not hold this language model's head: {'; '.join(problems)}. Complete the "
                "checkpoint, set tie_word_embeddings in its config.json if the embeddings are the head, or load the "
                "backbone alone with AutoModel; nothing was initialized in its place."
            )
