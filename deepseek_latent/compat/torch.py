"""What this package leans on in torch beyond its documented interface, each thing once (torch 2.10 to 2.14).

tests/compat/test_canaries.py holds a canary for each.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from .bound_functions import is_equivalent_forward


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def become(module: nn.Module, module_class: type[nn.Module]) -> None:
    """Makes a module one of another class, also for those who keep its bound `forward`, as accelerate's hooks do."""
    kept = [name for name, value in vars(module).items() if is_equivalent_forward(module, value)]
    module.__class__ = module_class
    for name in kept:
        setattr(module, name, MethodType(module_class.forward, module))


def version_of(tensor: Tensor) -> int | None:
    """A number that every change in place raises, but for fused optimizers and `data`; None for inference tensors."""
    return None if tensor.is_inference() else tensor._version


def take_out(module: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """Takes parameters out of a module, so that `.to()` and its kin pass them by; the caller puts them back."""
    return {name: module._parameters.pop(name) for name in names}


def device_of(mask: BlockMask) -> torch.device:
    return mask.kv_indices.device
