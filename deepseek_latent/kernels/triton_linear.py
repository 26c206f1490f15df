"""`F.linear` of few tokens: the weight is read once, where it lies.

Letters: m tokens, n rows of the weight and w their width.
"""

import triton
import triton.language as tl
from torch import Tensor

from .triton_tiles import Tiles, block_of, check, dot_dtype, is_vector, kernel, load_tile, partly_summed, tokens_at_once

# tokens up to which a product is multiplied and added up in registers
VECTOR_UP_TO = 4
VECTOR = Tiles(2, 2048, 4, 1)
MATRIX = Tiles(32, 128, 4, 4)


def linear(
    x: Tensor,  # [m w]
    weight: Tensor,  # [n w]
    scales: Tensor | None = None,  # float32 [n], of an int8 weight
    bias: Tensor | None = None,  # [n]
    *,
    tiles: Tiles | None = None,
) -> Tensor:  # [m n]  in the dtype of x
    """`F.linear` of few tokens."""
    m, n = len(x), len(weight)
    tiles = tiles or (VECTOR if m <= VECTOR_UP_TO else MATRIX)
    y = x.new_empty(m, n)
    check(x, [weight], [scales])
    arguments = (x, x.stride(0), weight, scales, bias, y, m, n, weight.shape[1])
    block, blocks = block_of(tiles, weight.shape[1]), triton.cdiv(n, tiles.rows)
    if is_vector(tiles):
        tokens = min(m, VECTOR_UP_TO)
        _linear_vector[blocks, triton.cdiv(m, tokens)](*arguments, TOKENS=tokens, **block)
    else:
        tokens = tokens_at_once(m)
        _linear_matrix[blocks, triton.cdiv(m, tokens)](*arguments, TOKENS=tokens, DOT=dot_dtype(x), **block)
    return y


@kernel
def _linear_vector(
    x,
    x_stride,
    weight,
    scales,
    bias,
    y,
    m,
    n,
    width,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(rows, n - 1)
    first = tl.program_id(1) * TOKENS
    none = tl.zeros((ROWS, WIDTH // 8), tl.float32)
    totals = (none,) * TOKENS
    for start in tl.range(0, width, WIDTH, num_stages=STAGES):
        columns = start + tl.arange(0, WIDTH)
        tile = load_tile(weight, inside, width, start, True, WIDTH, EVEN).to(tl.float32)
        sums = ()
        for i in tl.static_range(TOKENS):
            mask = (first + i < m) & (columns < width)
            inputs = tl.load(x + (first + i) * x_stride + columns, mask=mask, other=0).to(tl.float32)
            sums = sums + (totals[i] + partly_summed(tile * inputs[None, :], ROWS, WIDTH),)  # noqa: RUF005
        totals = sums
    for i in tl.static_range(TOKENS):
        result = tl.sum(totals[i], 1)
        if scales is not None:
            result *= tl.load(scales + inside)
        if bias is not None:
            result += tl.load(bias + inside).to(tl.float32)
        to = y + (first + i) * n + rows
        tl.store(to, result.to(y.dtype.element_ty), mask=(rows < n) & (first + i < m))


@kernel
def _linear_matrix(
    x,
    x_stride,
    weight,
    scales,
    bias,
    y,
    m,
    n,
    width,
    TOKENS: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(rows, n - 1)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_in = tokens < m
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, width, WIDTH, num_stages=STAGES):
        columns = start + tl.arange(0, WIDTH)
        mask = is_in[:, None] if EVEN else is_in[:, None] & (columns < width)[None, :]
        inputs = tl.load(x + tokens[:, None] * x_stride + columns[None, :], mask=mask, other=0).to(DOT).T
        block = load_tile(weight, inside, width, start, True, WIDTH, EVEN).to(DOT)
        total = tl.dot(block, inputs, total, input_precision="ieee")
    if scales is not None:
        total *= tl.load(scales + inside)[:, None]
    if bias is not None:
        total += tl.load(bias + inside).to(tl.float32)[:, None]
    mask = (rows < n)[:, None] & is_in[None, :]
    tl.store(y + tokens[None, :] * n + rows[:, None], total.to(y.dtype.element_ty), mask=mask)
