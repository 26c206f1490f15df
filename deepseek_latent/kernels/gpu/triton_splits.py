"""The kernels of absorbed attention: each program of one attends to a split of the cache, the other combines splits.

Letters: b batch, s query tokens, h heads, t cached tokens, c latent width, r rotary width, u unquantized channels.

A row is one head of one query token; all rows of a sequence read the same latents.
"""

# Triton compiles neither (*tuple, x) nor a return under `a and b` where only one of the two is known when it compiles
# ruff: noqa: RUF005, SIM102, RUF059

import triton
import triton.language as tl

from .triton_codes import _convert, _load, _load_bfloat16, _load_pieces, _load_scales, _scale, _unpack
from .triton_overlap import wait_for_inputs

# where the running maximum starts: below any score, but finite, so that a row that sees no token gives zeros, not NaN
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _find(tile, tiles_0, one, two, hidden, token, latent_alignment: tl.constexpr, rotary_alignment: tl.constexpr):
    """Pointers to the latents and rotary keys of a tile's tokens, a mask of the visible ones, and their positions.

    A segment, `one` or `two`, is (latents, step, rotary keys, step, tokens held); `two` may be None. The tiles of `two`
    follow the `tiles_0` tiles of `one`, so no tile has tokens of both.
    """
    latent, latent_step, rotary, rotary_step, held = one
    start = tile * token.shape[0]
    position = start + token
    if two is not None:
        latent_1, latent_step_1, rotary_1, rotary_step_1, held_1 = two
        in_second = tile >= tiles_0
        start = tl.where(in_second, (tile - tiles_0) * token.shape[0], start)
        position = tl.where(in_second, held, 0) + start + token
        latent = tl.where(in_second, latent_1, latent)
        rotary = tl.where(in_second, rotary_1, rotary)
        latent_step = tl.where(in_second, latent_step_1, latent_step)
        rotary_step = tl.where(in_second, rotary_step_1, rotary_step)
        held = tl.where(in_second, held_1, held)
    shown = start + token < held
    if hidden is not None:
        shown = shown & (position >= hidden)
    latent_rows = latent + start.to(tl.int64) * latent_step + token * latent_step
    rotary_rows = rotary + start.to(tl.int64) * rotary_step + token * rotary_step
    latent_rows = tl.multiple_of(latent_rows, latent_alignment)
    return latent_rows, tl.multiple_of(rotary_rows, rotary_alignment), shown, position


@triton.jit
def _scores(queries, queries_rotary, pieces, keys, scales, BITS: tl.constexpr):
    """Scores [BM BN] of one tile of tokens, before the softmax scale; pieces behind those with a scale have none."""
    scores = tl.dot(queries_rotary, tl.trans(keys), input_precision="ieee")
    for n in tl.static_range(len(pieces)):
        keys_of_piece = tl.trans(pieces[n].to(queries[n].dtype))
        if n < len(scales):
            product = tl.dot(queries[n], keys_of_piece, input_precision="ieee")
            scores += product * _scale(scales[n], BITS)[None, :]
        else:
            scores = tl.dot(queries[n], keys_of_piece, scores, input_precision="ieee")
    return scores


@triton.jit
def _add_weighted(scores, pieces, scales, largest, total, context, BITS: tl.constexpr, DOT: tl.constexpr):
    """Adds a tile of tokens: the largest score so far, and sums of weights and of weighted latents relative to it."""
    larger = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - larger[:, None])
    kept = tl.exp2(largest - larger)[:, None]
    # all scaled weights come before the first product, so that one barrier serves all products
    scaled = ()
    for n in tl.static_range(len(scales)):
        scaled = scaled + ((weights * _scale(scales[n], BITS)[None, :]).to(DOT),)
    if len(scales) < len(pieces):
        scaled = scaled + (weights.to(DOT),)
    added = ()
    for n in tl.static_range(len(pieces)):
        by_scale = scaled[n if n < len(scales) else len(scales)]
        product = tl.dot(by_scale, pieces[n].to(DOT), context[n] * kept, input_precision="ieee")
        added = added + (product,)
    return larger, total * kept + weights, added


@triton.jit(
    do_not_specialize=["s", "t_0", "t_1", "num_splits", "tiles_per_split", "l0_b", "r0_b", "l1_b", "r1_b", "m_b", "m_s"]
)
def _attend_to_splits(
    q_absorbed,
    q_rotary,
    latent_0,
    rotary_0,
    latent_1,
    rotary_1,
    mask,
    length,
    first,
    parts,  # [b splits s h c]
    sizes,  # [b splits s h]  base-2 logarithm of the sum of weights
    scale,
    s,
    t_0,
    t_1,
    num_splits,
    tiles_per_split,
    qa_b,
    qa_s,
    qa_h,
    qr_b,
    qr_s,
    qr_h,
    l0_b,
    l0_t,
    r0_b,
    r0_t,
    l1_b,
    l1_t,
    r1_b,
    r1_t,
    m_b,
    m_s,
    m_t,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    HAS_TWO: tl.constexpr,
    BITS: tl.constexpr,
    BYTE_PLANES: tl.constexpr,
    CODE_PLANES: tl.constexpr,
    BOUNDS: tl.constexpr,
    PIECES: tl.constexpr,
    LEAST: tl.constexpr,
    SCALES: tl.constexpr,
    LATENT_ALIGNMENT: tl.constexpr,
    ROTARY_ALIGNMENT: tl.constexpr,
    DOT: tl.constexpr,
    WORDS: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM rows of one sequence attend to one split, a tile of BN tokens at a time."""
    wait_for_inputs(OVERLAPS)
    SCALED: tl.constexpr = len(PIECES) - (U > 0)
    # programs that read the same tokens are neighbors in the grid, so that all but the first find them in the L2 cache
    num_tiles = tl.cdiv(s * H, BM)
    program = tl.program_id(0)
    row = program % num_tiles * BM + tl.arange(0, BM)
    split = program // num_tiles % num_splits
    sequence = (program // num_tiles // num_splits).to(tl.int64)
    is_row = row < s * H
    query, head = row // H, row % H

    # queries are loaded once per split, and before `length` is used, so that neither load waits for the other
    q_rows = q_absorbed + sequence * qa_b + query * qa_s + head * qa_h
    queries = ()
    for n in tl.static_range(len(PIECES)):
        queries = queries + (_load(q_rows, is_row, PIECES[n][0], PIECES[n][1], PIECES[n][2]).to(DOT),)
    queries_rotary = _load(q_rotary + sequence * qr_b + query * qr_s + head * qr_h, is_row, 0, R, 16).to(DOT)

    held_0 = t_0
    held_1 = t_1
    if length is not None:
        if HAS_TWO:
            held_1 = tl.minimum(tl.load(length).to(tl.int32), t_1)
        else:
            held_0 = tl.minimum(tl.load(length).to(tl.int32), t_0)
    hidden = 0
    if first is not None:
        hidden = tl.load(first + sequence).to(tl.int32)
    total = held_0 + held_1
    tiles_0 = tl.cdiv(held_0, BN)
    end = tiles_0
    begin = hidden // BN
    if HAS_TWO:
        end = tiles_0 + tl.cdiv(held_1, BN)
        begin = tl.where(hidden < held_0, begin, tiles_0 + tl.maximum(hidden - held_0, 0) // BN)
    wanted = tl.maximum(end - begin, 0)
    used = tl.minimum(num_splits, tl.cdiv(wanted, tiles_per_split))
    part = (sequence * num_splits + split) * (s * H) + row
    if split >= used:
        if sizes is not None:
            tl.store(sizes + part, tl.full([BM], -float("inf"), tl.float32), is_row)
            return
    used = tl.maximum(used, 1)
    last_tile = begin + (split + 1) * wanted // used
    first_tile = begin + split * wanted // used

    largest = tl.full([BM], LOWEST, tl.float32)
    weights = tl.zeros([BM, BN], tl.float32)
    context = ()
    for n in tl.static_range(len(PIECES)):
        context = context + (tl.zeros([BM, queries[n].shape[1]], tl.float32),)

    one = (latent_0 + sequence * l0_b, l0_t, rotary_0 + sequence * r0_b, r0_t, held_0)
    two = (latent_1 + sequence * l1_b, l1_t, rotary_1 + sequence * r1_b, r1_t, held_1) if HAS_TWO else None
    before = hidden if first is not None else None
    token = tl.arange(0, BN)
    if BITS:
        rows, rows_of_keys, shown, place = _find(
            first_tile, tiles_0, one, two, before, token, LATENT_ALIGNMENT, ROTARY_ALIGNMENT
        )
        shown = shown & (first_tile < last_tile)
        codes = _load_pieces(rows, shown, BOUNDS, LEAST, BYTE_PLANES, WORDS, LATENT_ALIGNMENT)
        packed_keys = _load_bfloat16(rows_of_keys, shown, U, R, 16, WORDS, ROTARY_ALIGNMENT)
        unquantized = _load_bfloat16(rows_of_keys, shown, 0, U, LEAST, WORDS, ROTARY_ALIGNMENT) if U else None
        scales_ahead = _load_scales(rows, shown, BITS, SCALES, PIECES, SCALED)

    for tile in range(first_tile, last_tile):
        here = _find(tile, tiles_0, one, two, before, token, LATENT_ALIGNMENT, ROTARY_ALIGNMENT)
        latent_rows, rotary_rows, shown, position = here
        visible = shown[None, :]
        if mask is not None:
            mask_at = mask + sequence * m_b + (query * m_s)[:, None] + (position * m_t)[None, :]
            visible = tl.load(mask_at, visible & is_row[:, None], 0) != 0
        else:
            visible = visible & (position[None, :] <= (total - s + query)[:, None])

        if BITS:
            pieces = _convert(codes, BITS, BYTE_PLANES, CODE_PLANES, DOT, WORDS, PTX)
            keys = _unpack(packed_keys, DOT, WORDS, PTX)
            if U:
                pieces = pieces + (_unpack(unquantized, DOT, WORDS, PTX),)
            scales = scales_ahead
            ahead = _find(tile + 1, tiles_0, one, two, before, token, LATENT_ALIGNMENT, ROTARY_ALIGNMENT)
            is_ahead = ahead[2] & (tile + 1 < last_tile)
            scales_ahead = _load_scales(ahead[0], is_ahead, BITS, SCALES, PIECES, SCALED)
            scores = _scores(queries, queries_rotary, pieces, keys, scales, BITS)
            # after the scores, the registers that held this tile's codes are free for those of the next
            codes = _load_pieces(ahead[0], is_ahead, BOUNDS, LEAST, BYTE_PLANES, WORDS, LATENT_ALIGNMENT)
            packed_keys = _load_bfloat16(ahead[1], is_ahead, U, R, 16, WORDS, ROTARY_ALIGNMENT)
            if U:
                unquantized = _load_bfloat16(ahead[1], is_ahead, 0, U, LEAST, WORDS, ROTARY_ALIGNMENT)
            scores = tl.where(visible, scores * scale, -float("inf"))
            largest, weights, context = _add_weighted(scores, pieces, scales, largest, weights, context, BITS, DOT)
        else:
            keys = _load(rotary_rows, shown, 0, R, 16).to(DOT)
            pieces = _load_pieces(latent_rows, shown, BOUNDS, LEAST, 1, False, LATENT_ALIGNMENT)
            scores = _scores(queries, queries_rotary, pieces, keys, (), BITS)
            scores = tl.where(visible, scores * scale, -float("inf"))
            largest, weights, context = _add_weighted(scores, pieces, (), largest, weights, context, BITS, DOT)
    weight = tl.sum(weights, 1)
    share = 1.0 / tl.where(weight > 0, weight, 1.0)
    for n in tl.static_range(len(PIECES)):
        column = tl.arange(0, context[n].shape[1])
        out_at = parts + part[:, None] * C + (PIECES[n][0] + column)[None, :]
        value = (context[n] * share[:, None]).to(parts.dtype.element_ty)
        tl.store(out_at, value, is_row[:, None] & (column < PIECES[n][1])[None, :])
    if sizes is not None:
        size = tl.where(weight > 0, largest + tl.log2(tl.where(weight > 0, weight, 1.0)), -float("inf"))
        tl.store(sizes + part, size, is_row)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _combine(
    parts,  # [b splits rows c]
    sizes,  # [b splits rows]
    out,  # [b rows c]
    num_rows,
    num_splits,
    C: tl.constexpr,
    BC: tl.constexpr,
    SPLITS: tl.constexpr,  # no less than num_splits, a multiple of AT_ONCE
    BS: tl.constexpr,  # a power of two, no less than num_splits
    AT_ONCE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Combines one row's sums of all splits; the memory of splits that saw no token is uninitialized and unused."""
    wait_for_inputs(OVERLAPS)
    sequence = (tl.program_id(0) // num_rows).to(tl.int64)
    row = tl.program_id(0) % num_rows
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    sizes += sequence * num_splits * num_rows + row
    split = tl.arange(0, BS)
    size = tl.load(sizes + split * num_rows, split < num_splits, -float("inf"))
    largest = tl.maximum(tl.max(size, 0), LOWEST)
    total = tl.sum(tl.exp2(size - largest), 0)
    # a query that sees no token gives zeros
    share = 1.0 / tl.where(total > 0, total, 1.0)

    parts += (sequence * num_splits * num_rows + row) * C
    context = tl.zeros([BC], tl.float32)
    for start in tl.static_range(0, SPLITS, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        weight = tl.exp2(tl.load(sizes + split * num_rows, split < num_splits, -float("inf")) - largest)
        # masked by index and not by weight, so that these loads do not wait for those of the sizes
        shown = (split < num_splits)[:, None] & (column < C)[None, :]
        value = tl.load(parts + (split.to(tl.int64) * num_rows * C)[:, None] + column[None, :], shown, 0.0)
        context += tl.sum(tl.where((weight > 0)[:, None], value * weight[:, None], 0.0), 0)
    at = out + (sequence * num_rows + row) * C + column
    tl.store(at, (context * share).to(out.dtype.element_ty), column < C)
