"""Which products our operators support and compute faster than torch.

Letters: m tokens, n rows of a weight, k their width.
"""

import torch
from torch import Tensor, nn

from ...compat.hooks import has_hooks
from ...compat.torch import has_forward_hooks
from .int8 import codes_and_scales, multiplies_in_int8
from .library import SLOW_IN_TORCH

# up to this many tokens, reading a weight takes longer than multiplying by it; products.h has the same number
MAX_DOT_TOKENS = 8
DTYPES = (torch.bfloat16, torch.float32)


def kernel_supports(x: Tensor, weight: Tensor) -> bool:
    """True if our operators can multiply x [.. k] by this weight, and are faster than torch."""
    if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu") or x.numel() == 0:
        return False
    # a weight of a quantizer, or one that is sharded, has a type of its own
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_contiguous():
        return False
    if {x.device.type, weight.device.type} != {"cpu"} or x.dtype != weight.dtype or x.dtype not in DTYPES:
        return False
    return x.dtype in SLOW_IN_TORCH or has_few_tokens(x)


def has_few_tokens(x: Tensor) -> bool:
    return x.numel() <= MAX_DOT_TOKENS * x.shape[-1]


def kernel_weights(x: Tensor, *projections: nn.Module) -> tuple[list[Tensor], list[Tensor]] | None:
    """Weights of projections, and the scales of int8 ones, for operators that multiply few tokens x by all of them.

    None if x has many tokens, if weights differ in kind, or if a projection does more than multiply.
    """
    if not has_few_tokens(x):
        return None
    if any(type(projection) is not nn.Linear or projection.bias is not None for projection in projections):
        return None
    if all(multiplies_in_int8(projection) and not has_forward_hooks(projection) for projection in projections):
        weights, scales = zip(*map(codes_and_scales, projections))
        return list(weights), list(scales)
    if any(map(has_hooks, projections)):
        return None
    weights = [projection.weight for projection in projections]
    return (weights, []) if all(kernel_supports(x, weight) for weight in weights) else None
