"""The few operations every part of DeepSeek-V2 is built from, in float64."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def in_float64(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names with every tensor in float64, which holds any bf16, fp16 or fp32 value exactly."""
    return {name: tensor.to(torch.float64) for name, tensor in weights.items()}


def weights_under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with `prefix`, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def linear(
    weights: dict[str, Tensor],
    name: str,  # of a `{name}.weight` [out in] and perhaps a `{name}.bias` [out]
    x: Tensor,  # [.. in]
    *,
    has_bias: bool = False,
) -> Tensor:  # [.. out]
    """W x, or W x + b."""
    result = x @ weights[f"{name}.weight"].T
    return result + weights[f"{name}.bias"] if has_bias else result


def rms_norm(
    x: Tensor,  # [.. d]
    weight: Tensor,  # [d]
    eps: float,
) -> Tensor:  # [.. d]
    """x divided by its root mean square, then scaled by channel. Source: the extra norms of paper 3.1.2."""
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def feed_forward(
    weights: dict[str, Tensor],  # gate_proj, up_proj [f d], down_proj [d f]
    x: Tensor,  # [.. d]
) -> Tensor:  # [.. d]
    """One SwiGLU network: W_down (silu(W_gate x) * W_up x). The FFN of eq. 20."""
    return linear(weights, "down_proj", silu(linear(weights, "gate_proj", x)) * linear(weights, "up_proj", x))
