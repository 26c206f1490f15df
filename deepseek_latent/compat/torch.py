"""What this package uses of torch beyond its documented interface, each thing once (torch 2.10 to 2.14).

tests/compat/test_torch.py has a test for each thing that is used here, which fails when a release changes it.
"""

from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_forward_of_its_class(module: nn.Module, forward: Callable) -> bool:
    """Whether `forward`, a function that was stored, is the bound `forward` of the module's present class."""
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward


def become(module: nn.Module, module_class: type[nn.Module]) -> None:
    """Changes the class of a module, and the bound `forward` where one is stored, as accelerate's hooks do."""
    stored = [name for name, value in vars(module).items() if is_forward_of_its_class(module, value)]
    module.__class__ = module_class
    for name in stored:
        setattr(module, name, MethodType(module_class.forward, module))


def version_of(tensor: Tensor) -> int | None:
    """A count of in-place changes, without those by fused optimizers or through `data`; None for inference tensors."""
    return None if tensor.is_inference() else tensor._version


def take_out(module: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """Removes parameters from a module, so that `.to()` and similar methods skip them; the caller puts them back."""
    return {name: module._parameters.pop(name) for name in names}


def device_of(mask: BlockMask) -> torch.device:
    return mask.kv_indices.device
