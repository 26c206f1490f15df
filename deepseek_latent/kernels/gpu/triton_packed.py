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


def has_readable_groups(packed: Packed) -> bool:
    return _neighbors(packed) % ELEMENTS_PER_LOAD == 0


def _neighbors(packed: Packed) -> int:
    return packed.width // packed.scales.shape[-1]


class Stored(NamedTuple):
    """What a kernel is given of a weight [.. out in]."""

    tensor: Tensor | None = None  # the weight, or its codes
    scales: Tensor | None = None  # [.. out in/neighbors] of a packed weight
    bits: int = 16
    neighbors: int = 1  # elements of a row that share a scale


def shape_of(weight: Tensor | Packed) -> tuple[int, ...]:
    return (*weight.codes.shape[:-1], weight.width) if isinstance(weight, Packed) else tuple(weight.shape)


def stored(weight: Tensor | Packed | None, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
    """Asserts that kernels can read the weight, and that it has this shape and this dtype."""
    if weight is None:
        return Stored()
    assert shape_of(weight) == shape
    parts = weight if isinstance(weight, Packed) else [weight]
    assert parts[-1].dtype == dtype
    assert all(part.is_contiguous() for part in parts)
    if not isinstance(weight, Packed):
        return Stored(weight)
    assert has_readable_groups(weight)
    return Stored(*weight, weight.bits, _neighbors(weight))


@functools.cache
def values_of_codes(device: torch.device) -> Tensor:
    """The values of 4-bit codes [16]; copied once, because a captured step cannot copy from the host."""
    return NF4.to(device)


@triton.jit
def load_stored(base, rows, width, start, mask, BITS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Loads columns start .. start+WIDTH-1 of rows of a weight [.. width] as it is stored; a byte has two of 4 bits."""
    if BITS == 4:
        return load_tile(base, rows, width // 2, start // 2, mask, WIDTH // 2, EVEN)
    else:
        return load_tile(base, rows, width, start, mask, WIDTH, EVEN)


@triton.jit
def load_scales(base, rows, width, start, mask, NEIGHBORS: tl.constexpr, WIDTH: tl.constexpr):
    """Loads the scales of these columns, one for eight neighbors: [rows WIDTH/8] in float32."""
    columns = start + 8 * tl.arange(0, WIDTH // 8)
    at = base + rows.to(tl.int64)[:, None] * (width // NEIGHBORS) + (columns // NEIGHBORS)[None, :]
    return tl.load(at, mask=mask & (columns < width)[None, :], other=0).to(tl.float32)


@triton.jit
def values_of(stored, table, BITS: tl.constexpr):
    """What `load_stored` returned, in float32 [rows WIDTH]: codes are not multiplied by their scales yet."""
    if BITS == 4:
        # the even column is in the high bits
        high, low = tl.load(table + (stored >> 4).to(tl.int32)), tl.load(table + (stored & 15).to(tl.int32))
        return tl.reshape(tl.join(high, low), (stored.shape[0], 2 * stored.shape[1]))
    else:
        return stored.to(tl.float32)


@triton.jit
def packed_product(
    rows_at,
    scales_at,
    table,
    inside,
    row,
    BITS: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """These packed rows [ROWS D] times a row [D] in chunks of WIDTH: [ROWS]."""
    total = tl.zeros((ROWS, WIDTH // 8), tl.float32)
    for i in tl.static_range((D + WIDTH - 1) // WIDTH):
        stored = load_stored(rows_at, inside, D, i * WIDTH, True, BITS, WIDTH, i * WIDTH + WIDTH <= D)
        products = values_of(stored, table, BITS) * row[i].to(tl.float32)[None, :]
        scales = load_scales(scales_at, inside, D, i * WIDTH, True, NEIGHBORS, WIDTH)
        total += partly_summed(products, ROWS, WIDTH) * scales
    return tl.sum(total, axis=1)


@triton.jit
def load_operand(
    base,
    scales_at,
    table,
    rows,
    width,
    start,
    BITS: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Columns start .. start+WIDTH-1 of rows of a weight [.. width], packed or not, as an operand of `tl.dot`."""
    stored = load_stored(base, rows, width, start, True, BITS, WIDTH, EVEN)
    if BITS == 16:
        return stored.to(DOT)
    else:
        scales = load_scales(scales_at, rows, width, start, True, NEIGHBORS, WIDTH)
        values = tl.reshape(values_of(stored, table, BITS), (ROWS, WIDTH // 8, 8)) * scales[:, :, None]
        return tl.reshape(values, (ROWS, WIDTH)).to(DOT)
