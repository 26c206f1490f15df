"""Building blocks of kernels that multiply: how work is cut into tiles, how tiles are loaded, and the norm of a row.

Letters: m tokens, e routed experts, d model width, f width of one expert.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# elements of half precision in 16 bytes, the most that one thread loads at a time
ELEMENTS_PER_LOAD = 8
# one compiled kernel serves any number of tokens
kernel = triton.jit(do_not_specialize=["m", "groups"])


class Tiles(NamedTuple):
    """The tile of a weight that one program loads at a time, and how many such tiles it loads ahead."""

    rows: int
    width: int
    warps: int
    stages: int  # 1 if a program loads whole rows before it uses any


class Norm(NamedTuple):
    """An `nn.RMSNorm` ahead of a product, in the same kernel: every program normalizes the whole row itself."""

    weight: Tensor  # [d]
    eps: float


def block_of(tiles: Tiles, *widths: int) -> dict:
    """Constants of a kernel that loops over the tiles of rows of these widths."""
    is_even = all(width % tiles.width == 0 for width in widths)
    sizes = {"ROWS": tiles.rows, "WIDTH": tiles.width, "EVEN": is_even, "STAGES": tiles.stages}
    return sizes | {"num_warps": tiles.warps}


def block_at_once(tiles: Tiles, width: int) -> dict:
    """Constants of a kernel that loads whole rows of this width before it uses any, as chunks of a power of two.

    Chunks divide the width if they can, because a chunk that reaches past its end needs a mask.
    """
    divisor = width & -width
    chunk = min(divisor if divisor >= 512 else max(triton.next_power_of_2(width), 16), tiles.width)
    return {"ROWS": tiles.rows, "D": width, "WIDTH": chunk, "num_warps": tiles.warps}


def is_vector(tiles: Tiles) -> bool:
    """True if products are computed in registers; tensor cores take no fewer than 16 rows."""
    return tiles.rows < 16


def tokens_at_once(m: int) -> int:
    """The tokens of a tile: all, up to 64, so that weights are read once; tensor cores take no fewer than 8."""
    return min(max(triton.next_power_of_2(m), 8), 64)


def dot_dtype(x: Tensor) -> tl.dtype:
    """The dtype of operands; only Triton's interpreter takes CPU tensors, and it cannot multiply bfloat16."""
    known = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return tl.float32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else known[x.dtype]


def check(x: Tensor, weights: Iterable[Tensor], norm: Norm | None = None) -> None:
    """Asserts that kernels can read these tensors."""
    assert x.stride(1) == 1
    for weight in weights:
        assert weight.is_contiguous()
        assert weight.dtype == x.dtype
    if norm is not None:
        assert norm.weight.shape == x.shape[1:]
        assert norm.weight.is_contiguous()


@triton.jit
def load_tile(base, rows, width, start, mask, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Loads columns start .. start+WIDTH-1 of these rows of a weight [.. width]; 0 past their end or where masked."""
    columns = start + tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * width + columns[None, :]
    if not EVEN:
        mask = mask & (columns < width)[None, :]
    return tl.load(at, mask=mask, other=0)


@triton.jit
def load_row(base, D: tl.constexpr, WIDTH: tl.constexpr):
    """Loads a row of D elements as chunks [WIDTH], all of them before any is used; 0 past its end."""
    chunks = ()
    for first in tl.static_range(0, D, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        if first + WIDTH <= D:
            chunks += (tl.load(base + columns),)
        else:
            chunks += (tl.load(base + columns, mask=columns < D, other=0),)
    return chunks


@triton.jit
def load_rows(base, rows, D: tl.constexpr, WIDTH: tl.constexpr):
    """Loads these rows of a weight [.. D] as chunks [rows WIDTH], as `load_row` does."""
    chunks = ()
    for first in tl.static_range(0, D, WIDTH):
        chunks += (load_tile(base, rows, D, first, True, WIDTH, first + WIDTH <= D),)
    return chunks


@triton.jit
def normed(row, weight, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """`nn.RMSNorm` of a row in chunks: in float32, and rounded once, after the weight, to the dtype of the row."""
    squares = tl.zeros((WIDTH,), tl.float32)
    for i in tl.static_range((D + WIDTH - 1) // WIDTH):
        squares += row[i].to(tl.float32) * row[i].to(tl.float32)
    root = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    chunks = ()
    for i in tl.static_range((D + WIDTH - 1) // WIDTH):
        chunks += ((row[i].to(tl.float32) * root * weight[i].to(tl.float32)).to(row[i].dtype),)
    return chunks


@triton.jit
def product(rows, row, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [ROWS D] times a row [D], both in chunks: [ROWS]."""
    total = tl.zeros((ROWS, WIDTH // 8), tl.float32)
    for i in tl.static_range((D + WIDTH - 1) // WIDTH):
        total += partly_summed(rows[i].to(tl.float32) * row[i].to(tl.float32)[None, :], ROWS, WIDTH)
    return tl.sum(total, axis=1)


@triton.jit
def partly_summed(products, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[rows width] to [rows width/8]: adds the eight products of each thread, so that sums take few registers."""
    return tl.sum(tl.reshape(products, (ROWS, WIDTH // 8, 8)), 2)


@triton.jit
def gate_and_up(e, is_routed, gate_up, gate, up, stride, f, K: tl.constexpr, SHARED: tl.constexpr):
    """Pointers to the gate and up rows (weights or scales) of an expert or the shared experts; a row takes `stride`."""
    if K > 0:
        gate_rows = gate_up + e * (2 * f * stride)
        up_rows = gate_rows + f * stride
        if SHARED:
            gate_rows = tl.where(is_routed, gate_rows, gate)
            up_rows = tl.where(is_routed, up_rows, up)
    else:
        gate_rows, up_rows = gate, up
    return gate_rows, up_rows


@triton.jit
def is_here(e, num_experts):
    """True if a choice names an expert of this rank."""
    return (e >= 0) & (e < num_experts)


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))
