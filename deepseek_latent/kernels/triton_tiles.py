"""What kernels of products share: how work is cut into tiles, how a tile of a weight is read, and the norm of a row.

Letters: m tokens, e routed experts, d model width, f width of one expert.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# one compiled form for any number of tokens
kernel = triton.jit(do_not_specialize=["m", "groups"])


class Tiles(NamedTuple):
    """What one program works on at a time, and how many such tiles are on their way to it."""

    rows: int
    width: int
    warps: int
    stages: int


class Norm(NamedTuple):
    """An `nn.RMSNorm` that a kernel computes by the way: every program norms the whole row for itself."""

    weight: Tensor  # [d]
    eps: float


def block_of(tiles: Tiles, *widths: int) -> dict:
    """Constants of a kernel that goes along rows of these widths in a loop."""
    is_even = all(width % tiles.width == 0 for width in widths)
    sizes = {"ROWS": tiles.rows, "WIDTH": tiles.width, "EVEN": is_even, "STAGES": tiles.stages}
    return sizes | {"num_warps": tiles.warps}


def block_at_once(tiles: Tiles, width: int) -> dict:
    """Constants of a kernel that has whole rows of this width on their way at once, in chunks that divide them."""
    divisor = width & -width
    chunk = min(divisor if divisor >= 512 else max(triton.next_power_of_2(width), 16), tiles.width)
    return {"ROWS": tiles.rows, "D": width, "WIDTH": chunk, "num_warps": tiles.warps}


def is_vector(tiles: Tiles) -> bool:
    """Tensor cores take 16 rows at least."""
    return tiles.rows < 16


def tokens_at_once(m: int) -> int:
    """Wide enough that every weight is read once, up to 64 tokens; tensor cores take no fewer than 8."""
    return min(max(triton.next_power_of_2(m), 8), 64)


def dot_dtype(x: Tensor) -> tl.dtype:
    """In which tiles are multiplied; the interpreter, which alone takes CPU tensors, has no products in bfloat16."""
    known = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return tl.float32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else known[x.dtype]


def check(x: Tensor, present: list[Tensor], scales: list[Tensor | None], norm: Norm | None = None) -> None:
    assert x.stride(1) == 1
    for weight, scale in zip(present, scales):
        assert weight.is_contiguous()
        assert weight.dtype == (x.dtype if scale is None else torch.int8)
        assert scale is None or (scale.dtype == torch.float32 and scale.is_contiguous())
    if norm is not None:
        assert norm.weight.shape == x.shape[1:]
        assert norm.weight.is_contiguous()


@triton.jit
def load_tile(base, rows, width, start, mask, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Columns start.. of the given rows of a weight whose rows are `width` long; 0 past their end or where masked."""
    columns = start + tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * width + columns[None, :]
    if not EVEN:
        mask = mask & (columns < width)[None, :]
    return tl.load(at, mask=mask, other=0)


@triton.jit
def load_row(base, D: tl.constexpr, WIDTH: tl.constexpr):
    """A row of D elements as chunks [WIDTH], all on their way at once; 0 past its end."""
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
    """The given rows of a weight whose rows are D long, as `load_row`: chunks [rows WIDTH]."""
    chunks = ()
    for first in tl.static_range(0, D, WIDTH):
        chunks += (load_tile(base, rows, D, first, True, WIDTH, first + WIDTH <= D),)
    return chunks


@triton.jit
def normed(row, weight, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """`nn.RMSNorm` of what `load_row` gave: in float32, and rounded once, after the weight, to the dtype of the row."""
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
    return tl.sum(partial_product(rows, row, ROWS, D, WIDTH), axis=1)


@triton.jit
def partial_product(rows, row, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """`product` as sums of what each thread holds, [ROWS WIDTH/8]."""
    total = tl.zeros((ROWS, WIDTH // 8), tl.float32)
    for i in tl.static_range((D + WIDTH - 1) // WIDTH):
        total += partly_summed(rows[i].to(tl.float32) * row[i].to(tl.float32)[None, :], ROWS, WIDTH)
    return total


@triton.jit
def partly_summed(products, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[rows width] to [rows width/8]: sums of what one thread holds, so that totals take few registers."""
    return tl.sum(tl.reshape(products, (ROWS, WIDTH // 8, 8)), 2)


@triton.jit
def gate_and_up(e, is_routed, gate_up, gate, up, stride, f, K: tl.constexpr, SHARED: tl.constexpr):
    """Where gate and up rows of an expert or of the shared ones begin, `stride` elements each: weights or scales."""
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
    """Whether a choice is of an expert of this rank."""
    return (e >= 0) & (e < num_experts)


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))
