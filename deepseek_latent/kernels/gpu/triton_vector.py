"""Experts of one token: matrix-vector products, computed in registers.

Letters are those of `triton_experts`.
"""

import triton.language as tl

from .triton_packed import load_codes, load_scales, packed_product, stored_width, values_of
from .triton_tiles import (
    gate_and_up,
    is_here,
    kernel,
    load_row,
    load_rows,
    load_tile,
    normed,
    partly_summed,
    product,
    silu,
)


@kernel
def activate_vector(
    x,
    x_stride,
    norm_weight,
    chosen,
    weights,
    gate_up,
    gate_up_scales,
    nf4_table,
    gate,
    up,
    hidden,
    m,
    num_experts,
    f,
    g,
    eps,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """weight * silu(gate x) * up x for ROWS of one expert of one token.

    The last programs compute the shared experts, with weight 1. With a norm, x is normalized first, while the rows of
    gate and up are being loaded, unless they are packed.
    """
    block, token = tl.program_id(0), tl.program_id(1)
    row = load_row(x + token * x_stride, D, WIDTH)
    if norm_weight is not None:
        scale = load_row(norm_weight, D, WIDTH)
    blocks = tl.cdiv(f, ROWS)
    is_routed = block < K * blocks
    e, share = tl.cast(0, tl.int64), 1.0
    if K > 0:
        pair = token * K + block // tl.maximum(blocks, 1)
        e = tl.load(chosen + pair, mask=is_routed, other=0)
        share = tl.load(weights + pair, mask=is_routed, other=1.0)
        if is_routed & (not is_here(e, num_experts)):
            return
        first = tl.where(is_routed, block % tl.maximum(blocks, 1), block - K * blocks) * ROWS
        height = tl.where(is_routed, f, g)
        out = hidden + tl.where(is_routed, pair * f, m * K * f + token * g)
    else:
        first = block * ROWS
        height = g
        out = hidden + token * g
    rows = first + tl.arange(0, ROWS)
    inside = tl.minimum(rows, height - 1)
    gate_rows, up_rows = gate_and_up(e, is_routed, gate_up, gate, up, stored_width(D, BITS), f, K, SHARED)
    if BITS == 16:
        gates, ups = load_rows(gate_rows, inside, D, WIDTH), load_rows(up_rows, inside, D, WIDTH)
    if norm_weight is not None:
        row = normed(row, scale, eps, D, WIDTH)
    if BITS == 16:
        gated, value = product(gates, row, ROWS, D, WIDTH), product(ups, row, ROWS, D, WIDTH)
    else:
        gate_at, up_at = gate_and_up(e, is_routed, gate_up_scales, None, None, D // GROUP_SIZE, f, K, False)
        gated = packed_product(gate_rows, gate_at, nf4_table, inside, row, BITS, GROUP_SIZE, ROWS, D, WIDTH)
        value = packed_product(up_rows, up_at, nf4_table, inside, row, BITS, GROUP_SIZE, ROWS, D, WIDTH)
    result = silu(gated) * value * share
    tl.store(out + rows, result.to(hidden.dtype.element_ty), mask=rows < height)


@kernel
def down_vector(
    hidden,
    chosen,
    down,
    down_scales,
    nf4_table,
    shared_down,
    residual,
    residual_stride,
    out,
    m,
    num_experts,
    d,
    f,
    g,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """ROWS of the result for one token, summed over its experts and the shared experts."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(rows, d - 1)
    token = tl.program_id(1)
    total = tl.zeros((ROWS, WIDTH // 8), tl.float32)
    if SHARED:
        inputs_at = hidden + m * K * f + token * g
        for start in tl.range(0, g, WIDTH, num_stages=STAGES):
            columns = start + tl.arange(0, WIDTH)
            inputs = tl.load(inputs_at + columns, mask=columns < g, other=0).to(tl.float32)
            tile = load_tile(shared_down, inside, g, start, True, WIDTH, EVEN).to(tl.float32)
            total += partly_summed(tile * inputs[None, :], ROWS, WIDTH)
    if K > 0:
        steps = tl.cdiv(f, WIDTH)
        # one loop over all experts, so that the first tile of an expert is prefetched during the expert before it
        for step in tl.range(0, K * steps, num_stages=STAGES):
            pair, start = token * K + step // steps, step % steps * WIDTH
            e = tl.load(chosen + pair)
            is_ours = is_here(e, num_experts)
            columns = start + tl.arange(0, WIDTH)
            inputs = tl.load(hidden + pair * f + columns, mask=is_ours & (columns < f), other=0).to(tl.float32)
            codes = load_codes(down + e * d * stored_width(f, BITS), inside, f, start, is_ours, BITS, WIDTH, EVEN)
            part = partly_summed(values_of(codes, nf4_table, BITS) * inputs[None, :], ROWS, WIDTH)
            if BITS != 16:
                part *= load_scales(
                    down_scales + e * d * (f // GROUP_SIZE), inside, f, start, is_ours, GROUP_SIZE, WIDTH
                )
            total += part
    result = tl.sum(total, 1)
    if residual is not None:
        result += tl.load(residual + token * residual_stride + inside).to(tl.float32)
    tl.store(out + token * d + rows, result.to(out.dtype.element_ty), mask=rows < d)
