"""Routed experts by our operators: stacked weights as they are, or int8 codes with their scales."""

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ...compat.hooks import has_hooks
from ...experts.weights import ExpertWeights, StoredExperts
from .layers import DTYPES, _takes
from .library import multiply_by_experts, operators

SILU = type(ACT2FN["silu"])


class CpuExperts:
    """`ExpertOperators` for CPUs."""

    @staticmethod
    def product(weights: ExpertWeights, x: Tensor, name: str, ends: Tensor) -> Tensor | None:
        stored = readable_experts(weights, x)
        # TODO: int8 codes too, when the operator takes scales
        if stored is None or stored.scales:
            return None
        return operators.grouped(x.contiguous(), weights.dense(name), ends)

    @staticmethod
    def forward(weights: ExpertWeights, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor | None:
        stored = readable_experts(weights, x)
        if stored is None:
            return None
        scales = tuple(scale.squeeze(-1).float() for scale in stored.scales)
        return multiply_by_experts(x, (stored.gate_up, stored.down, *scales), top_k_index, top_k_weights)


def readable_experts(weights: ExpertWeights, x: Tensor) -> StoredExperts | None:
    """The stored experts, if the operators are to multiply tokens x by them."""
    stored = weights.stored()
    if stored is None or type(weights.experts.act_fn) is not SILU or has_hooks(weights.experts.act_fn):
        return None
    if not stored.scales:
        return stored if _takes(x, stored.gate_up) and _takes(x, stored.down) else None
    if torch.is_grad_enabled() or torch.jit.is_tracing() or x.device.type != "cpu" or x.dtype not in DTYPES:
        return None
    # TODO: any number of groups, when the operator takes them
    return stored if all(scales.shape[-1] == 1 for scales in stored.scales) else None
