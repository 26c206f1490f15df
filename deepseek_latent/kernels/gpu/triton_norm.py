"""RMSNorm of rows, or of the sum of two rows, in one launch.

Letters: d model width.

A norm moves a few kilobytes, so its cost is latency: a program issues all its loads before it uses the first, and
nothing waits for the host. Grids depend on shapes only, so every launch can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_overlap import launch_options, wait_for_inputs
from .triton_tiles import ELEMENTS_PER_LOAD


def add_rms_norm(
    x: Tensor,  # [.. d]
    residual: Tensor,  # [.. d]
    weight: Tensor,  # [d]
    eps: float,
) -> tuple[Tensor, Tensor]:  # [.. d], [.. d]
    """x + residual as torch adds them, and `nn.RMSNorm` of that rounded sum, both in the dtype of x.

    As in torch, the norm is computed in float32 and rounded once, after its weight.
    """
    assert residual.shape == x.shape
    assert residual.dtype == x.dtype
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch_rms_norm(x, residual, weight, eps, total, normed)
    return total, normed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`nn.RMSNorm` of x [.. d]."""
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, None, weight, eps, None, normed)
    return normed


def _launch_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor | None,
    normed: Tensor,
) -> None:
    d = x.shape[-1]
    # a view reads rows of any stride as they are stored, and fails if a copy would be needed
    rows = x.view(-1, d)
    others = rows if residual is None else residual.view(-1, d)
    assert rows.stride(1) == others.stride(1) == weight.stride(0) == 1
    assert weight.shape == (d,)
    if rows.shape[0] == 0:
        return
    block = triton.next_power_of_2(d)
    _rms_norm_kernel[(rows.shape[0],)](
        rows,
        others,
        weight,
        normed if total is None else total,
        normed,
        rows.stride(0),
        others.stride(0),
        eps,
        D=d,
        BLOCK=block,
        ADDS=residual is not None,
        num_warps=min(max(block // (32 * ELEMENTS_PER_LOAD), 1), 16),
        **launch_options(x),
    )


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    total,
    normed,
    x_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    scale = tl.load(weight + column, mask=inside, other=0.0)
    wait_for_inputs(OVERLAPS)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if ADDS:
        other = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
        # the norm is of the sum as it is stored, rounded
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(total + row * D + column, value, mask=inside)
    wide = value.to(tl.float32)
    result = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps) * scale.to(tl.float32)
    tl.store(normed + row * D + column, result.to(normed.dtype.element_ty), mask=inside)
