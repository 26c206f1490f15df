"""How kernels read packed weights: codes of 8 or 4 bits, and a scale for each group of neighbors in a row.

BITS is 16 for a weight that is not packed, whatever its dtype. A scale multiplies the sum of eight products, or eight
elements of an operand, since these are what one thread holds; so it must be the scale of all eight.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...experts.codec import NF4, Packed
from .triton_tiles import ELEMENTS_PER_LOAD, load_tile, partly_summed


class KernelWeight(NamedTuple):
    """What a kernel is given of a weight [.. out in]."""

    tensor: Tensor | None = None  # the weight, or its codes
    scales: Tensor | None = None  # [.. out in/group] of a packed weight
    bits: int = 16
    group_size: int = 1


def shape_of(weight: Tensor | Packed) -> tuple[int, ...]:
    return (*weight.codes.shape[:-1], weight.width) if isinstance(weight, Packed) else tuple(weight.shape)


def as_kernel_weight(weight: Tensor | Packed | None, shape: tuple[int, ...], dtype: torch.dtype) -> KernelWeight:
    """Asserts that kernels can read the weight, and that it has this shape and this dtype."""
    if weight is None:
        return KernelWeight()
    assert shape_of(weight) == shape
    if not isinstance(weight, Packed):
        assert weight.dtype == dtype
        assert weight.is_contiguous()
        return KernelWeight(weight)
    codes, scales = weight
    assert scales.dtype == dtype
    assert codes.is_contiguous()
    assert scales.is_contiguous()
    assert has_readable_groups(weight)
    return KernelWeight(codes, scales, weight.bits, weight.group_size)


def has_readable_groups(packed: Packed) -> bool:
    return packed.group_size % ELEMENTS_PER_LOAD == 0


@functools.cache
def nf4_table(device: torch.device) -> Tensor:
    """The values of 4-bit codes [16]; copied once, because a captured step cannot copy from the host."""
    return NF4.to(device)


@triton.jit
def stored_width(width, BITS: tl.constexpr):
    """The elements that are stored of a row of this width; a byte holds two of 4 bits."""
    return width // 2 if BITS == 4 else width


@triton.jit
def load_codes(base, rows, width, start, mask, BITS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Loads columns start .. start+WIDTH-1 of rows of a weight [.. width], packed or not, as it is stored."""
    if BITS == 4:
        return load_tile(base, rows, width // 2, start // 2, mask, WIDTH // 2, EVEN)
    else:
        return load_tile(base, rows, width, start, mask, WIDTH, EVEN)


@triton.jit
def load_scales(base, rows, width, start, mask, GROUP_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Loads the scales of these columns, one for eight neighbors: [rows WIDTH/8] in float32."""
    columns = start + 8 * tl.arange(0, WIDTH // 8)
    at = base + rows.to(tl.int64)[:, None] * (width // GROUP_SIZE) + (columns // GROUP_SIZE)[None, :]
    return tl.load(at, mask=mask & (columns < width)[None, :], other=0).to(tl.float32)


@triton.jit
def values_of(codes, nf4_table, BITS: tl.constexpr):
    """What `load_codes` returned, in float32 [rows WIDTH]: codes are not multiplied by their scales yet."""
    if BITS == 4:
        # the even column is in the high bits
        high, low = tl.load(nf4_table + (codes >> 4).to(tl.int32)), tl.load(nf4_table + (codes & 15).to(tl.int32))
        return tl.reshape(tl.join(high, low), (codes.shape[0], 2 * codes.shape[1]))
    else:
        return codes.to(tl.float32)


@triton.jit
def packed_product(
    rows_at,
    scales_at,
    nf4_table,
    inside,
    row,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """These packed rows [ROWS D] times a row [D] in chunks of WIDTH: [ROWS]."""
    total = tl.zeros((ROWS, WIDTH // 8), tl.float32)
    for i in tl.static_range((D + WIDTH - 1) // WIDTH):
        codes = load_codes(rows_at, inside, D, i * WIDTH, True, BITS, WIDTH, i * WIDTH + WIDTH <= D)
        products = values_of(codes, nf4_table, BITS) * row[i].to(tl.float32)[None, :]
        scales = load_scales(scales_at, inside, D, i * WIDTH, True, GROUP_SIZE, WIDTH)
        total += partly_summed(products, ROWS, WIDTH) * scales
    return tl.sum(total, axis=1)


@triton.jit
def load_operand(
    base,
    scales_at,
    nf4_table,
    rows,
    width,
    start,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Columns start .. start+WIDTH-1 of rows of a weight [.. width], packed or not, as an operand of `tl.dot`."""
    codes = load_codes(base, rows, width, start, True, BITS, WIDTH, EVEN)
    if BITS == 16:
        return codes.to(DOT)
    else:
        scales = load_scales(scales_at, rows, width, start, True, GROUP_SIZE, WIDTH)
        values = tl.reshape(values_of(codes, nf4_table, BITS), (ROWS, WIDTH // 8, 8)) * scales[:, :, None]
        return tl.reshape(values, (ROWS, WIDTH)).to(DOT)
