"""What this package uses of torch beyond its documented interface, each thing once (torch 2.10 to 2.14).

tests/compat/test_torch.py has a test for each thing that is used here, which fails when a release changes it.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def version_of(tensor: Tensor) -> int | None:
    """A count of in-place changes, without those by fused optimizers or through `data`; None for inference tensors."""
    return None if tensor.is_inference() else tensor._version


def take_out(module: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """Removes parameters from a module, so that `.to()` and similar methods skip them; the caller puts them back."""
    return {name: module._parameters.pop(name) for name in names}


def device_of(mask: BlockMask) -> torch.device:
    return mask.kv_indices.device
