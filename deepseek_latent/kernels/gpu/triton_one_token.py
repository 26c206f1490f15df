"""The steps of a single token between its projections and attention: one launch before attention, one after it.

For one token, each launch takes as long as reading a megabyte of weights. So steps that do not depend on one another
share a grid, and a result that is cheap to compute is computed again by each program that needs it. With `overlap`,
weights are loaded before the kernel ahead has ended (`launch_options`).

Letters: h heads, n/r/v content, rotary and value width per head, c latent width, u unquantized channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cache.format import PLANE
from .triton_overlap import launch_options, wait_for_inputs
from .triton_row import rotate_heads, write_row
from .triton_splits import LOWEST
from .triton_tiles import Norm
from .triton_write import HEADS, parts_of_rows

# columns of W^UK that one program takes: 128 bytes of a row, and at DeepSeek-V2-Lite's widths one program per SM
COLUMNS = 64
# rows of W^UV that one program takes, and its warps
ROWS, WARPS = 16, 8
# if programs read more bytes of partial sums again than this, combining them in a launch of its own is cheaper
MAX_BYTES_READ_AGAIN = 16 << 20


def rotate_write_absorb(
    queries: Tensor,  # [1 1 h n+r]  rotary parts are rotated in place
    compressed: Tensor,  # [1 1 c+r]
    norm: Norm,
    cos: Tensor,  # [1 1 r/2]  float32
    sin: Tensor,  # [1 1 r/2]  float32
    rows: Tensor,  # [1 t row_width]  written in place
    start: Tensor | int,
    w_uk: Tensor,  # [h n c]
    *,
    bits: int | None = None,
    num_unquantized: int = 0,
    overlap: bool = False,
) -> Tensor:  # [1 1 h c]
    """Does what `norm_rotate_write` does for one token, and returns q_content W^UK; neither depends on the other."""
    (h, n, c), width = w_uk.shape, queries.shape[3]
    r = width - n
    latent, scales, in_bfloat16 = parts_of_rows(rows, c, r, compressed.dtype, bits, num_unquantized)
    assert queries.shape[:3] == (1, 1, h)
    assert compressed.shape == (1, 1, c + r)
    assert norm.weight.shape == (c,)
    assert cos.shape == sin.shape == (1, 1, r // 2)
    assert cos.dtype == sin.dtype == torch.float32
    assert queries.stride()[2:] == (width, 1)
    assert compressed.stride(2) == norm.weight.stride(0) == cos.stride(2) == sin.stride(2) == w_uk.stride(2) == 1
    assert queries.dtype == compressed.dtype == w_uk.dtype
    assert latent.stride(2) == scales.stride(2) == in_bfloat16.stride(2) == 1
    q_absorbed = queries.new_empty(1, 1, h, c)
    columns, heads = min(COLUMNS, triton.next_power_of_2(c)), min(HEADS, triton.next_power_of_2(h))
    _rotate_write_absorb_kernel[(1 + triton.cdiv(h, heads) + h * triton.cdiv(c, columns),)](
        queries,
        compressed,
        norm.weight,
        cos,
        sin,
        latent,
        scales,
        in_bfloat16,
        start,
        latent.shape[1],
        w_uk,
        w_uk.stride(0),
        w_uk.stride(1),
        q_absorbed,
        norm.eps,
        LATENT_STRIDE=latent.stride(1),
        SCALES_STRIDE=scales.stride(1),
        KEY_STRIDE=in_bfloat16.stride(1),
        START_IS_POINTER=isinstance(start, Tensor),
        H=h,
        N=n,
        R=r,
        C=c,
        U=num_unquantized,
        BITS=bits or 0,
        PLANE=PLANE,
        PLANES=triton.next_power_of_2(triton.cdiv(c, PLANE)),
        R_BLOCK=triton.next_power_of_2(r),
        N_BLOCK=triton.next_power_of_2(n),
        HEADS=heads,
        COLUMNS=columns,
        num_warps=4,
        # torch rounds a product before it adds it, and the same bytes need the same roundings
        enable_fp_fusion=False,
        **launch_options(queries, overlap),
    )
    return q_absorbed


# one compiled kernel serves every length and every place in the cache
@triton.jit(do_not_specialize=["start", "num_rows"])
def _rotate_write_absorb_kernel(
    queries,
    compressed,
    norm_weight,
    cos,
    sin,
    latent,
    scales,
    in_bfloat16,
    start,
    num_rows,
    w_uk,
    w_uk_h,
    w_uk_n,
    q_absorbed,
    eps,
    LATENT_STRIDE: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    START_IS_POINTER: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    R_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The first program writes the latent and its key, the next ones rotate queries, the others multiply by W^UK."""
    program = tl.program_id(0)
    TURNING: tl.constexpr = (H + HEADS - 1) // HEADS
    if program == 0:
        write_row(
            compressed,
            norm_weight,
            cos,
            sin,
            latent,
            scales,
            in_bfloat16,
            start,
            0,
            num_rows,
            eps,
            LATENT_STRIDE,
            SCALES_STRIDE,
            KEY_STRIDE,
            START_IS_POINTER,
            R,
            C,
            U,
            BITS,
            PLANE,
            PLANES,
            R_BLOCK,
            OVERLAPS,
        )
    elif program <= TURNING:
        wait_for_inputs(OVERLAPS)
        rotate_heads(queries, cos, sin, (program - 1) * HEADS + tl.arange(0, HEADS), H, N, R, R_BLOCK)
    else:
        BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
        head = (program - 1 - TURNING) // BLOCKS
        column = (program - 1 - TURNING) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.arange(0, N_BLOCK)
        at = w_uk + head.to(tl.int64) * w_uk_h + row[:, None] * w_uk_n + column[None, :]
        tile = tl.load(at, mask=(row < N)[:, None] & (column < C)[None, :], other=0)
        wait_for_inputs(OVERLAPS)
        q_content = tl.load(queries + head * (N + R) + row, mask=row < N, other=0)
        total = tl.sum(tile.to(tl.float32) * q_content.to(tl.float32)[:, None], axis=0)
        tl.store(q_absorbed + head * C + column, total.to(q_absorbed.dtype.element_ty), mask=column < C)


def expand(
    parts: Tensor,  # [1 splits 1 h c] float32, or latent contexts [1 1 h c]
    sizes: Tensor | None,  # [1 splits 1 h], or None for contexts
    w_uv: Tensor,  # [h v c]
    *,
    overlap: bool = False,
) -> Tensor:  # [1 hv]
    """`combine` and the product with W^UV, for one token.

    Each program combines the partial sums of its head itself, and rounds them to the dtype of the weight, as `combine`
    rounds them.
    """
    (h, v, c), splits = w_uv.shape, 1 if sizes is None else parts.shape[1]
    assert w_uv.stride(2) == 1
    assert parts.is_contiguous()
    assert parts.numel() == splits * h * c
    assert sizes is None or (sizes.is_contiguous() and parts.dtype == torch.float32)
    out = w_uv.new_empty(1, h * v)
    rows, c_block = min(ROWS, triton.next_power_of_2(v)), triton.next_power_of_2(c)
    # as many splits are loaded at once as give each thread 64 numbers
    at_once = max(64 * 32 * WARPS // c_block, 1)
    _expand_kernel[(h * triton.cdiv(v, rows),)](
        parts,
        sizes,
        w_uv,
        w_uv.stride(0),
        w_uv.stride(1),
        out,
        splits,
        H=h,
        V=v,
        C=c,
        ROWS=rows,
        C_BLOCK=c_block,
        SPLITS=triton.next_power_of_2(splits),
        AT_ONCE=min(triton.next_power_of_2(splits), at_once),
        num_warps=WARPS,
        **launch_options(parts, overlap),
    )
    return out


def is_combined_by_expand(parts: Tensor, w_uv: Tensor) -> bool:
    """True if `expand` should combine partial sums itself, because its programs read few of them more than once."""
    return (triton.cdiv(w_uv.shape[1], ROWS) - 1) * parts.nbytes <= MAX_BYTES_READ_AGAIN


@triton.jit(do_not_specialize=["num_splits"])
def _expand_kernel(
    parts,
    sizes,
    w_uv,
    w_uv_h,
    w_uv_v,
    out,
    num_splits,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    C_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS elements of the value of one head."""
    BLOCKS: tl.constexpr = (V + ROWS - 1) // ROWS
    head = tl.program_id(0) // BLOCKS
    row = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, C_BLOCK)
    inside = (row < V)[:, None] & (column < C)[None, :]
    tile = tl.load(w_uv + head.to(tl.int64) * w_uv_h + row[:, None] * w_uv_v + column[None, :], mask=inside, other=0)
    wait_for_inputs(OVERLAPS)
    if sizes is None:
        context = tl.load(parts + head * C + column, mask=column < C, other=0)
    else:
        context = _combined(parts, sizes, head, column, num_splits, H, C, SPLITS, AT_ONCE).to(out.dtype.element_ty)
    result = tl.sum(tile.to(tl.float32) * context.to(tl.float32)[None, :], axis=1)
    tl.store(out + head * V + row, result.to(out.dtype.element_ty), mask=row < V)


@triton.jit
def _combined(
    parts,
    sizes,
    head,
    column,
    num_splits,
    H: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """What `combine` computes for one head; the memory of splits that saw no token is uninitialized and is not used."""
    every = tl.arange(0, SPLITS)
    all_sizes = tl.load(sizes + every * H + head, mask=every < num_splits, other=-float("inf"))
    largest = tl.maximum(tl.max(all_sizes, axis=0), LOWEST)
    all_weights = tl.exp2(all_sizes - largest)
    total = tl.sum(all_weights, axis=0)
    context = tl.zeros([column.shape[0]], tl.float32)
    for start in tl.static_range(0, SPLITS, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        is_split = split < num_splits
        size = tl.load(sizes + split * H + head, mask=is_split, other=-float("inf"))
        weight = tl.exp2(size - largest)
        # the first parts are loaded together with the sizes; later loads wait for sizes, and skip parts without weight
        wanted = is_split if start == 0 else weight > 0
        at = parts + (split * (H * C) + head * C)[:, None] + column[None, :]
        value = tl.load(at, mask=wanted[:, None] & (column < C)[None, :], other=0)
        context += tl.sum(tl.where((weight > 0)[:, None], value * weight[:, None], 0.0), axis=0)
    # a query that sees no token gives zeros
    return context * (1.0 / tl.where(total > 0, total, 1.0))
