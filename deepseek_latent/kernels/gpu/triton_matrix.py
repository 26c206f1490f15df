"""Experts of several tokens: a program multiplies rows of one expert by all tokens that chose it, on tensor cores.

Letters are those of `triton_experts`.
"""

import triton
import triton.language as tl

from .triton_packed import load_operand, stored_width
from .triton_tiles import gate_and_up, is_here, kernel, load_tile, silu


@triton.jit
def _group(chosen, tile, group, m, num_experts, K: tl.constexpr, K_PADDED: tl.constexpr, TOKENS: tl.constexpr, BY_PAIR):
    """The expert of a group, whether the group is to be computed, and the slot at which each token chose it, or -1.

    There is a group for each expert or, if there are fewer of these, for each pair of a token and its choice. Then
    several pairs may name the same expert, and only the group of the first pair is computed, for all of them.
    """
    tokens, slots = tile * TOKENS + tl.arange(0, TOKENS), tl.arange(0, K_PADDED)
    is_pair = (tokens < m)[:, None] & (slots < K)[None, :]
    of_pair = tl.load(chosen + tokens[:, None] * K + slots[None, :], mask=is_pair, other=-1)
    numbers = tl.arange(0, TOKENS)[:, None] * K + slots[None, :]
    e = tl.cast(group, tl.int64)
    if BY_PAIR:
        e = tl.load(chosen + tile * TOKENS * K + group, mask=tile * TOKENS * K + group < m * K, other=-1)
    matches = is_pair & (of_pair == e)
    slot = tl.max(tl.where(matches, slots[None, :], -1), 1)
    is_wanted = is_here(e, num_experts)
    if BY_PAIR:
        is_wanted = is_wanted & (tl.min(tl.min(tl.where(matches, numbers, TOKENS * K), 1), 0) == group)
    else:
        is_wanted = is_wanted & (tl.max(slot, 0) >= 0)
    return e, is_wanted, slot


@kernel
def activate_matrix(
    x,
    x_stride,
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
    d,
    f,
    g,
    groups,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BY_PAIR: tl.constexpr,
    K_PADDED: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """weight * silu(gate x) * up x for ROWS of one expert, and for those among TOKENS tokens that chose it."""
    block, tile = tl.program_id(0), tl.program_id(1)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    blocks = tl.cdiv(f, ROWS)
    is_routed = block < groups * blocks
    e, is_in, share = tl.cast(0, tl.int64), tokens < m, tl.full((TOKENS,), 1.0, tl.float32)
    first, height, to = block * ROWS, g, tokens * g
    if K > 0:
        group = tl.where(is_routed, block // blocks, 0)
        e, is_wanted, slot = _group(chosen, tile, group, m, num_experts, K, K_PADDED, TOKENS, BY_PAIR)
        if is_routed & (not is_wanted):
            return
        first = tl.where(is_routed, block % blocks, block - groups * blocks) * ROWS
        height = tl.where(is_routed, f, g)
        pairs = tokens * K + slot
        is_in = tl.where(is_routed, slot >= 0, is_in)
        share = tl.load(weights + pairs, mask=is_in & is_routed, other=1.0)
        to = tl.where(is_routed, pairs * f, m * K * f + tokens * g)
    rows = first + tl.arange(0, ROWS)
    inside = tl.minimum(rows, height - 1)
    gate_rows, up_rows = gate_and_up(e, is_routed, gate_up, gate, up, stored_width(d, BITS), f, K, SHARED)
    gate_at, up_at = gate_up_scales, gate_up_scales
    if BITS != 16:
        gate_at, up_at = gate_and_up(e, is_routed, gate_up_scales, None, None, d // GROUP_SIZE, f, K, False)
    gates = tl.zeros((ROWS, TOKENS), tl.float32)
    ups = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, d, WIDTH, num_stages=STAGES):
        columns = start + tl.arange(0, WIDTH)
        mask = is_in[:, None] if EVEN else is_in[:, None] & (columns < d)[None, :]
        inputs = tl.load(x + tokens[:, None] * x_stride + columns[None, :], mask=mask, other=0).to(DOT).T
        gate_tile = load_operand(
            gate_rows, gate_at, nf4_table, inside, d, start, BITS, GROUP_SIZE, DOT, ROWS, WIDTH, EVEN
        )
        up_tile = load_operand(up_rows, up_at, nf4_table, inside, d, start, BITS, GROUP_SIZE, DOT, ROWS, WIDTH, EVEN)
        gates = tl.dot(gate_tile, inputs, gates, input_precision="ieee")
        ups = tl.dot(up_tile, inputs, ups, input_precision="ieee")
    result = silu(gates) * ups * share[None, :]
    mask = (rows < height)[:, None] & is_in[None, :]
    tl.store(hidden + to[None, :] + rows[:, None], result.to(hidden.dtype.element_ty), mask=mask)


@kernel
def down_matrix(
    hidden,
    chosen,
    down,
    down_scales,
    nf4_table,
    shared_down,
    parts,
    m,
    num_experts,
    d,
    f,
    g,
    groups,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BY_PAIR: tl.constexpr,
    K_PADDED: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """ROWS of the partial sums that one expert, or a piece of the shared experts, adds to the tokens that chose it."""
    tile = tl.program_id(1)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    blocks = tl.cdiv(d, ROWS)
    group, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    rows = first + tl.arange(0, ROWS)
    inside = tl.minimum(rows, d - 1)
    is_routed = group < groups
    piece = group - groups
    is_in, start, end, width = tokens < m, piece * PIECE, tl.minimum(piece * PIECE + PIECE, g), g
    to, inputs, input_rows, weight = m * K + piece * m + tokens, hidden, tokens, shared_down
    scales_at = down_scales
    if K > 0:
        number = tl.where(is_routed, group, 0)
        e, is_wanted, slot = _group(chosen, tile, number, m, num_experts, K, K_PADDED, TOKENS, BY_PAIR)
        if is_routed & (not is_wanted):
            return
        pairs = tokens * K + slot
        is_in = tl.where(is_routed, slot >= 0, is_in)
        start, end = tl.where(is_routed, 0, start), tl.where(is_routed, f, end)
        width = tl.where(is_routed, f, g)
        to, input_rows = tl.where(is_routed, pairs, to), tl.where(is_routed, pairs, tokens)
        inputs = tl.where(is_routed, hidden, hidden + m * K * f)
        weight = down + e * d * stored_width(f, BITS)
        if SHARED:
            weight = tl.where(is_routed, weight, shared_down)
        if BITS != 16:
            scales_at = down_scales + e * d * (f // GROUP_SIZE)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for at in tl.range(start, end, WIDTH, num_stages=STAGES):
        given = load_tile(inputs, input_rows, width, at, is_in[:, None], WIDTH, EVEN).to(DOT).T
        block = load_operand(weight, scales_at, nf4_table, inside, width, at, BITS, GROUP_SIZE, DOT, ROWS, WIDTH, EVEN)
        total = tl.dot(block, given, total, input_precision="ieee")
    mask = (rows < d)[:, None] & is_in[None, :]
    tl.store(parts + to[None, :] * d + rows[:, None], total, mask=mask)


@kernel
def sum_parts(
    parts,
    chosen,
    residual,
    residual_stride,
    out,
    m,
    num_experts,
    d,
    K: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up all partial sums of one token, in the order of its choices, so that equal inputs give equal bits."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        pair = token * K + slot
        is_ours = is_here(tl.load(chosen + pair), num_experts)
        total += tl.load(parts + pair * d + columns, mask=inside & is_ours, other=0)
    for piece in tl.static_range(PIECES):
        total += tl.load(parts + (m * K + piece * m + token) * d + columns, mask=inside, other=0)
    if residual is not None:
        total += tl.load(residual + token * residual_stride + columns, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * d + columns, total.to(out.dtype.element_ty), mask=inside)
