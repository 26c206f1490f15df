"""Projections of a single token, with the norm before them and the residual after them in the same launch.

Every program normalizes the whole row itself while its rows of the weight are being loaded. That saves a launch, and
should take no extra time. With `overlap`, weights are loaded before the kernel ahead has ended (`launch_options`).

Letters: n rows of a weight, w their width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_overlap import launch_options, wait_for_inputs
from .triton_tiles import Norm, Tiles, block_at_once, check, load_row, load_rows, normed, product


def project(
    x: Tensor,  # [1 w]
    weights: list[Tensor],  # one or two, [n w]
    norm: Norm | None = None,
    residual: Tensor | None = None,  # [1 n]
    *,
    dtype: torch.dtype | None = None,  # of the results; by default that of x
    tiles: Tiles | None = None,
    overlap: bool = False,
) -> list[Tensor]:  # [1 n]
    """`F.linear(norm(x), weight)` for each weight, plus the residual, in one launch.

    The normalized row is rounded to the dtype of x, as `nn.RMSNorm` rounds it; products are summed in float32.
    """
    first, last = weights[0], weights[-1]
    tiles = tiles or tiles_for(x.shape[1])
    check(x, weights, norm)
    assert len(x) == 1
    assert all(weight.shape == (len(weight), x.shape[1]) for weight in weights)
    assert residual is None or (residual.shape == (1, len(first)) and residual.stride(1) == 1 and len(weights) == 1)
    outs = [x.new_empty(1, len(weight), dtype=dtype) for weight in weights]
    scale, eps = norm or (None, 0.0)
    _project_kernel[(sum(triton.cdiv(len(weight), tiles.rows) for weight in weights),)](
        x,
        scale,
        first,
        last,
        residual,
        outs[0],
        outs[-1],
        len(first),
        len(last),
        eps,
        HAS_TWO=len(weights) > 1,
        **block_at_once(tiles, x.shape[1]),
        **launch_options(x, overlap),
    )
    return outs


def tiles_for(width: int) -> Tiles:
    """Whole rows are held in registers, so very wide ones need more warps and fewer rows."""
    if width > 8192:
        return Tiles(1, 2048, 8, 1)
    # a warp takes 256 elements of a chunk, and a width that 1024 does not divide has chunks of at most 512
    return Tiles(2, 2048, 2 if width % 1024 else 4, 1)


@triton.jit
def _project_kernel(
    x,
    norm_weight,
    weight_0,
    weight_1,
    residual,
    out_0,
    out_1,
    n_0,
    n_1,
    eps,
    HAS_TWO: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The products of ROWS rows of one of the weights."""
    block = tl.program_id(0)
    weight, out, n = weight_0, out_0, n_0
    if HAS_TWO:
        blocks = tl.cdiv(n_0, ROWS)
        is_first = block < blocks
        weight, out = tl.where(is_first, weight, weight_1), tl.where(is_first, out, out_1)
        n = tl.where(is_first, n, n_1)
        block = tl.where(is_first, block, block - blocks)
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(rows, n - 1)
    tiles = load_rows(weight, inside, D, WIDTH)
    if norm_weight is not None:
        scale = load_row(norm_weight, D, WIDTH)
    wait_for_inputs(OVERLAPS)
    row = load_row(x, D, WIDTH)
    if residual is not None:
        added = tl.load(residual + inside).to(tl.float32)
    if norm_weight is not None:
        row = normed(row, scale, eps, D, WIDTH)
    result = product(tiles, row, ROWS, D, WIDTH)
    if residual is not None:
        result += added
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=rows < n)
