"""Routed experts with our operators, which read stacked weights, or int8 codes with their scales, as they are stored.

Letters: m tokens, e experts, k experts per token, d model width.
"""

import torch
from torch import Tensor

from ...compat.hooks import has_hooks
from ...experts.moe import SILU
from ...experts.names import STACKED
from ...experts.weights import ExpertWeights, StoredExperts
from .library import operators
from .support import DTYPES, kernel_supports


class CpuExperts:
    """`ExpertOperators` for CPUs."""

    @staticmethod
    def product(weights: ExpertWeights, x: Tensor, name: str, ends: Tensor) -> Tensor | None:
        stored = readable_experts(weights, x)
        if stored is None:
            return None
        place = STACKED.index(name)
        scales = stored.scales[place] if stored.scales else None
        return operators.grouped(x.contiguous(), stored[place], ends, scales)

    @staticmethod
    def forward(weights: ExpertWeights, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor | None:
        stored = readable_experts(weights, x)
        return None if stored is None else multiply_by_experts(x, stored, top_k_index, top_k_weights)


def readable_experts(weights: ExpertWeights, x: Tensor) -> StoredExperts | None:
    """The experts as they are stored; None if our operators cannot multiply x by them, or are slower than torch."""
    stored = weights.stored()
    if stored is None or type(weights.experts.act_fn) is not SILU or has_hooks(weights.experts.act_fn):
        return None
    if not stored.scales:
        return stored if kernel_supports(x, stored.gate_up) and kernel_supports(x, stored.down) else None
    if torch.is_grad_enabled() or torch.jit.is_tracing() or x.dtype not in DTYPES:
        return None
    return stored if x.device.type == stored.gate_up.device.type == "cpu" else None


def multiply_by_experts(
    x: Tensor,  # [m d]
    stored: StoredExperts,
    chosen: Tensor,  # [m k]
    weights: Tensor,  # [m k]
    shared: tuple[list[Tensor], list[Tensor]] = ([], []),  # gate, up and down of shared experts, and their scales
) -> Tensor:  # [m d]
    """The weighted sum of every token's experts, plus the shared experts if there are any, in one call."""
    gate_up, down, scales = stored
    return operators.experts(x.contiguous(), gate_up, down, chosen, weights.float(), list(scales), *shared)
