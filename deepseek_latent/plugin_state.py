"""Whether a model is this package's, and whether its decoding reads compressed latents as they are."""

import torch
from torch import nn

from .attention.attention import DeepseekV2Attention
from .compat.accelerate import weights_here
from .modeling_deepseek_v2 import DeepseekV2Model


def is_active(model: nn.Module) -> bool:
    """Whether `model` is a DeepSeek-V2 of this package, or wraps one, as models of peft do.

    It is False for transformers' own class, which `from_pretrained` gives where this package was not imported before,
    and for code that is loaded with `trust_remote_code`, also for that of `export-code`, which decodes in the same way.

    Raises TypeError for anything but a model.
    """
    _check_is_model(model)
    return any(isinstance(module, DeepseekV2Model) for module in model.modules())


@torch.no_grad()
def can_absorb(model: nn.Module) -> bool:
    """Whether `model` is active, and every layer attends to latents as they are when it decodes, as it is now.

    A layer cannot if the weight of its `kv_b_proj` cannot be read: with DoRA, dropout or hooks on it, or packed by a
    quantizer. It then gives the same result by expanding all cached latents for every token.

    Raises TypeError for anything but a model.
    """
    _check_is_model(model)
    layers = [module for module in model.modules() if isinstance(module, DeepseekV2Attention)]
    return bool(layers) and all(map(_reads_its_weight, layers))


def _reads_its_weight(layer: DeepseekV2Attention) -> bool:
    with weights_here(layer.kv_b_proj):
        return layer.up_projections() is not None


def _check_is_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got {type(model).__name__}; of a pipeline, pass pipeline.model.")
