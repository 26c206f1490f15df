"""How a position turns a vector, and how YaRN lengthens the context."""

import math
from typing import Any

import torch
from torch import Tensor


def yarn_magnitude(factor: float, mscale: float) -> float:
    """get(factor, mscale): 0.1 mscale ln(factor) + 1, and 1 if the context is not lengthened.

    Source: paper 3.1.4, sqrt(t) = 0.0707 ln s + 1.
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def default_inverse_frequencies(width: int, *, rope_theta: float) -> Tensor:  # [r/2]
    """theta_i = rope_theta^(-2i/r) in radians per token, i = 0 .. r/2 - 1. Source: RoFormer, eq. 15."""
    pairs = torch.arange(0, width // 2, dtype=torch.float64)
    return rope_theta ** (-2 * pairs / width)


def yarn_inverse_frequencies(
    width: int,  # r
    *,
    rope_theta: float,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
) -> Tensor:  # [r/2]  radians per token
    """Fast pairs keep their frequency, slow pairs are slowed by `factor`, a linear ramp lies between.

    A pair is fast when it makes more than `beta_fast` turns within the original length, slow when it
    makes fewer than `beta_slow`. The ramp's ends are rounded outwards to whole pairs.
    Source: paper 3.1.4 (YaRN, arXiv:2309.00071, 3.2) with the rounding of the released code.
    """

    def pair_making(turns: float) -> float:
        # solves rope_theta^(-2i/r) = radians per token for i
        radians_per_token = 2 * math.pi * turns / original_max_position_embeddings
        return -width * math.log(radians_per_token) / (2 * math.log(rope_theta))

    low = max(math.floor(pair_making(beta_fast)), 0)
    # the released code bounds this by r - 1, although there are only r/2 pairs
    high = min(math.ceil(pair_making(beta_slow)), width - 1)
    if low == high:
        high += 0.001  # the released code's guard against a ramp of no length
    pairs = torch.arange(0, width // 2, dtype=torch.float64)
    slowed = ((pairs - low) / (high - low)).clamp(0, 1)
    original = default_inverse_frequencies(width, rope_theta=rope_theta)
    return original * (1 - slowed) + original / factor * slowed


def inverse_frequencies(config: Any) -> Tensor:  # [r/2]
    """Radians per token of each rotary pair, as `rope_parameters` says."""
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return default_inverse_frequencies(config.qk_rope_head_dim, rope_theta=rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        return yarn_inverse_frequencies(
            config.qk_rope_head_dim,
            rope_theta=rope["rope_theta"],
            factor=rope["factor"],
            original_max_position_embeddings=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast", 32),
            beta_slow=rope.get("beta_slow", 1),
        )
    raise ValueError(f"rope_type must be 'default' or 'yarn', got {rope['rope_type']!r}.")


def rotary_magnitude(config: Any) -> float:
    """What cos and sin are multiplied by: 1 unless mscale and mscale_all_dim differ.

    Source: paper 3.1.4 as the released code splits it between cos, sin and the softmax scale.
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return 1.0
    factor, mscale, mscale_all_dim = rope["factor"], rope.get("mscale", 1), rope.get("mscale_all_dim", 0)
    return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)


def rotate(
    x: Tensor,  # [.. r]  pairs interleaved: (0, 1), (2, 3), ..
    position: int,
    config: Any,
) -> Tensor:  # [.. r]  pairs interleaved
    """RoPE of eqs. 39 and 43: pair (2i, 2i+1) turns by position * theta_i.

    Float64. The released code moves the result to half-split order; scores do not notice.
    """
    angles = (position * inverse_frequencies(config)).to(x.device)
    cos, sin = torch.cos(angles) * rotary_magnitude(config), torch.sin(angles) * rotary_magnitude(config)
    even, odd = x[..., 0::2].to(torch.float64), x[..., 1::2].to(torch.float64)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def softmax_scale(config: Any) -> float:
    """(n + r)^(-1/2) of eq. 46, times YaRN's magnitude once for q and once for k (paper 3.1.4)."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return scale
    # mscale_all_dim = 0, the default, gives a magnitude of 1
    return scale * yarn_magnitude(rope["factor"], rope.get("mscale_all_dim", 0)) ** 2
