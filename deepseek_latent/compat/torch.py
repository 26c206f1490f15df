"""What this package leans on in torch beyond its documented interface, each thing once (torch 2.10 to 2.14).

tests/compat/test_canaries.py holds a canary for each.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def version_of(tensor: Tensor) -> int | None:
    """A number that every change in place raises, but for fused optimizers and `data`; None for inference tensors."""
    return None if tensor.is_inference() else tensor._version


def take_out(module: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """Takes parameters out of a module, so that `.to()` and its kin pass them by; the caller puts them back."""
    return {name: module._parameters.pop(name) for name in names}


def device_of(mask: BlockMask) -> torch.device:
    return mask.kv_indices.device
