"""Products of few tokens with weights read once, where they lie: the chosen experts, the shared ones, a dense MLP.

Reading the weights is what takes the time, so each program streams a block of rows of one weight. A single token is a
matrix-vector product, multiplied and added up in registers ("vector"). For more tokens a program takes the rows of one
expert for all tokens that chose it, by products on tensor cores ("matrix"), so that every chosen expert is read once.

Nothing here depends on data but addresses and masks: grids follow from shapes, and no two programs add to one place.

Letters: m tokens, e routed experts, k experts per token, d model width, f width of one expert, g width of the shared
ones; of a plain product, n rows and w their width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# tokens up to which each reads its own experts
VECTOR_UP_TO = 1
# tokens up to which one product is multiplied and added up in registers
VECTOR_ROWS_UP_TO = 4
# columns of a wide down projection that one program takes for more tokens; DeepSeek-V2-Lite's experts are 1408 wide
PIECE = 1408
# elements of one output that a program sums
SUMMED = 256
# whether a kernel may start while the one before it ends (compute capability 9.0 on), which it then waits for
OVERLAPS = False


class Tiles(NamedTuple):
    """What one program works on at a time, and how many such tiles are on their way to it."""

    rows: int
    width: int
    warps: int
    stages: int


class Plan(NamedTuple):
    inner: Tiles  # gate and up
    outer: Tiles  # down
    tokens: int | None = None  # in a tile of a product on tensor cores; by default few for few tokens


VECTOR = Plan(Tiles(8, 512, 4, 3), Tiles(8, 512, 4, 4))
MATRIX = Plan(Tiles(32, 128, 4, 4), Tiles(32, 128, 4, 6))
VECTOR_ROW = Tiles(8, 512, 4, 4)
MATRIX_ROW = Tiles(32, 128, 4, 4)


def experts(
    x: Tensor,  # [m d]
    gate_up: Tensor,  # [e 2f d]  gate rows first
    down: Tensor,  # [e d f]
    chosen: Tensor,  # [m k]  int64, a token's own all different
    weights: Tensor,  # [m k]  float32
    shared: tuple[Tensor, Tensor, Tensor] | None = None,  # gate [g d], up [g d], down [d g]
    scales: tuple[Tensor, Tensor] | None = None,  # float32 [e 2f], [e d], of int8 weights
    shared_scales: tuple[Tensor, Tensor, Tensor] | None = None,  # float32 [g], [g], [d], of int8 weights
    residual: Tensor | None = None,  # [m d]
    *,
    plan: Plan | None = None,
) -> Tensor:  # [m d]  in the dtype of x
    """The weighted sum of each token's experts, plus the shared experts, plus the residual.

    A choice below 0 or past the last expert is another rank's, and adds nothing. Sums run in float32, in an order that
    the shapes decide; what lies between the two products is in the dtype of x.
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.2.1, eq. 20.
    """
    assert gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
    assert chosen.shape == weights.shape == (len(x), chosen.shape[1])
    for choice, dtype in ((chosen, torch.int64), (weights, torch.float32)):
        assert choice.is_contiguous()
        assert choice.dtype == dtype
    return _swiglu(x, (gate_up, down, chosen, weights), shared, scales, shared_scales, residual, plan)


def mlp(
    x: Tensor,  # [m d]
    gate: Tensor,  # [g d]
    up: Tensor,  # [g d]
    down: Tensor,  # [d g]
    scales: tuple[Tensor, Tensor, Tensor] | None = None,  # float32 [g], [g], [d], of int8 weights
    residual: Tensor | None = None,  # [m d]
    *,
    plan: Plan | None = None,
) -> Tensor:  # [m d]  in the dtype of x
    """down(silu(gate x) * up x) plus the residual: what `experts` does with shared experts alone."""
    return _swiglu(x, None, (gate, up, down), None, scales, residual, plan)


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
    tiles = tiles or (VECTOR_ROW if m <= VECTOR_ROWS_UP_TO else MATRIX_ROW)
    y = x.new_empty(m, n)
    _check(x, [weight], [scales])
    arguments = (x, x.stride(0), weight, scales, bias, y, m, n, weight.shape[1])
    block, blocks = _block(tiles, weight.shape[1]), triton.cdiv(n, tiles.rows)
    if _is_vector(tiles):
        tokens = min(m, VECTOR_ROWS_UP_TO)
        _linear_vector[blocks, triton.cdiv(m, tokens)](*arguments, TOKENS=tokens, **block)
    else:
        tokens = _tokens_at_once(m)
        _linear_matrix[blocks, triton.cdiv(m, tokens)](*arguments, TOKENS=tokens, DOT=_dot_dtype(x), **block)
    return y


def _swiglu(
    x: Tensor,
    routed: tuple[Tensor, Tensor, Tensor, Tensor] | None,  # gate_up, down, chosen, weights
    shared: tuple[Tensor, Tensor, Tensor] | None,
    scales: tuple[Tensor, Tensor] | None,
    shared_scales: tuple[Tensor, Tensor, Tensor] | None,
    residual: Tensor | None,
    plan: Plan | None,
) -> Tensor:
    m, d = x.shape
    gate_up, down, chosen, weights = routed or (None, None, None, None)
    gate, up, shared_down = shared or (None, None, None)
    in_scales, out_scales = scales or (None, None)
    gate_scales, up_scales, shared_out_scales = shared_scales or (None, None, None)
    own = [(gate_up, in_scales), (down, out_scales), (gate, gate_scales), (up, up_scales)]
    present = [(w, s) for w, s in (*own, (shared_down, shared_out_scales)) if w is not None]
    _check(x, *map(list, zip(*present)))
    assert residual is None or residual.stride(1) == 1
    e, f = (len(down), down.shape[2]) if routed else (0, 0)
    g = shared_down.shape[1] if shared else 0
    k = chosen.shape[1] if routed else 0
    # the activations of routed pairs [mk f], then those of the shared experts [m g]
    hidden = x.new_empty(m * (k * f + g))
    out = x.new_empty(m, d)
    inputs = (x, x.stride(0), chosen, weights, gate_up, in_scales, gate, up, gate_scales, up_scales)
    outputs = (chosen, down, out_scales, shared_down, shared_out_scales)
    added = (residual, 0 if residual is None else residual.stride(0))
    sizes = (m, e, d, f, g)
    kinds = {"K": k, "SHARED": shared is not None, "SCALED": present[0][1] is not None}

    plan = plan or (VECTOR if m <= VECTOR_UP_TO else MATRIX)
    launch = _launch_vector if _is_vector(plan.inner) else _launch_matrix
    launch(inputs, outputs, added, hidden, out, sizes, kinds, plan)
    return out


def _launch_vector(inputs, outputs, added, hidden, out, sizes, kinds, plan: Plan) -> None:
    """Each token by itself."""
    m, _, d, f, g = sizes
    inner, outer, _ = plan
    blocks = kinds["K"] * triton.cdiv(f, inner.rows) + triton.cdiv(g, inner.rows)
    _activate_vector[blocks, m](*inputs, hidden, *sizes, **kinds, **_block(inner, d))
    grid = triton.cdiv(d, outer.rows), m
    _down_vector[grid](hidden, *outputs, *added, out, *sizes, **kinds, **_block(outer, f, g))


def _launch_matrix(inputs, outputs, added, hidden, out, sizes, kinds, plan: Plan) -> None:
    """All tokens that chose an expert at once."""
    m, e, d, f, g = sizes
    k, (inner, outer, tokens) = kinds["K"], plan
    tokens = tokens or _tokens_at_once(m)
    tiles = triton.cdiv(m, tokens)
    # as many groups of tokens with one expert as there can be: one for each pair, or one for each expert
    groups = min(min(tokens, m) * k, e)
    of_groups = {"TOKENS": tokens, "BY_PAIR": groups < e, "K_PADDED": triton.next_power_of_2(max(k, 1))}
    kinds = kinds | of_groups | {"DOT": _dot_dtype(out)}
    blocks = groups * triton.cdiv(f, inner.rows) + triton.cdiv(g, inner.rows)
    _activate_matrix[blocks, tiles](*inputs, hidden, *sizes, groups, **kinds, **_block(inner, d))
    piece = triton.cdiv(PIECE, outer.width) * outer.width
    pieces = triton.cdiv(g, piece)
    # one row for each routed pair [mk d], then for the tokens [m d] of each piece of the shared experts
    parts = out.new_empty(m * (k + pieces), d, dtype=torch.float32)
    grid = triton.cdiv(d, outer.rows) * (groups + pieces), tiles
    block = _block(outer, f, g) | {"PIECE": piece}
    _down_matrix[grid](hidden, *outputs, parts, *sizes, groups, **kinds, **block)
    sums = {"K": k, "PIECES": pieces, "BLOCK": SUMMED} | _overlap()
    _sum_parts[m, triton.cdiv(d, SUMMED)](parts, outputs[0], *added, out, m, e, d, **sums)


def _is_vector(tiles: Tiles) -> bool:
    """Tensor cores take 16 rows at least."""
    return tiles.rows < 16


def _block(tiles: Tiles, *widths: int) -> dict:
    is_even = all(width % tiles.width == 0 for width in widths)
    sizes = {"ROWS": tiles.rows, "WIDTH": tiles.width, "EVEN": is_even, "STAGES": tiles.stages}
    return sizes | {"num_warps": tiles.warps} | _overlap()


def _overlap() -> dict:
    return {"OVERLAPS": OVERLAPS} | ({"launch_pdl": True} if OVERLAPS else {})


def _tokens_at_once(m: int) -> int:
    """Wide enough that every expert is read once, up to 64 tokens; tensor cores take no fewer than 8."""
    return min(max(triton.next_power_of_2(m), 8), 64)


def _dot_dtype(x: Tensor) -> tl.dtype:
    """In which tiles are multiplied; the interpreter, which alone takes CPU tensors, has no products in bfloat16."""
    known = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return tl.float32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else known[x.dtype]


def _check(x: Tensor, present: list[Tensor], scales: list[Tensor | None]) -> None:
    assert x.stride(1) == 1
    for weight, scale in zip(present, scales):
        assert weight.is_contiguous()
        assert weight.dtype == (x.dtype if scale is None else torch.int8)
        assert scale is None or (scale.dtype == torch.float32 and scale.is_contiguous())


# one compiled form for any number of tokens
_kernel = triton.jit(do_not_specialize=["m", "groups"])


# ---- What the kernels share ------------------------------------------------------------------------------------------


@triton.jit
def _tile(base, rows, width, start, mask, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Columns start.. of the given rows of a weight whose rows are `width` long; 0 past their end or where masked."""
    columns = start + tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * width + columns[None, :]
    if not EVEN:
        mask = mask & (columns < width)[None, :]
    return tl.load(at, mask=mask, other=0)


@triton.jit
def _gate_and_up(e, is_routed, gate_up, gate, up, stride, f, K: tl.constexpr, SHARED: tl.constexpr):
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
def _after_the_last_kernel(OVERLAPS: tl.constexpr):
    """Waits for all that the last kernel writes, and lets the next one start.

    Every program calls it before it reads or writes anything else than weights: then the kernels before the last one
    have ended too.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _prefetch(base, rows, width):
    """Asks for the first 16 cache lines of some rows of a weight, while its inputs are still being computed."""
    LINE: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth
    columns = tl.minimum(tl.arange(0, 16) * LINE, width - 1)
    at = base + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _is_here(e, num_experts):
    return (e >= 0) & (e < num_experts)


@triton.jit
def _partly_summed(products, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[rows width] to [rows width/8]: sums of what one thread holds, so that totals take few registers."""
    return tl.sum(tl.reshape(products, (ROWS, WIDTH // 8, 8)), 2)


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


# ---- One token -------------------------------------------------------------------------------------------------------


@_kernel
def _activate_vector(
    x,
    x_stride,
    chosen,
    weights,
    gate_up,
    gate_up_scales,
    gate,
    up,
    gate_scales,
    up_scales,
    hidden,
    m,
    num_experts,
    d,
    f,
    g,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """weight * silu(gate x) * up x for ROWS of one expert of one token; the shared experts follow with weight 1."""
    _after_the_last_kernel(OVERLAPS)
    block, token = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(f, ROWS)
    is_routed = block < K * blocks
    e, share = tl.cast(0, tl.int64), 1.0
    if K > 0:
        pair = token * K + block // tl.maximum(blocks, 1)
        e = tl.load(chosen + pair, mask=is_routed, other=0)
        share = tl.load(weights + pair, mask=is_routed, other=1.0)
        if is_routed & (not _is_here(e, num_experts)):
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
    gate_rows, up_rows = _gate_and_up(e, is_routed, gate_up, gate, up, d, f, K, SHARED)
    gates = tl.zeros((ROWS, WIDTH // 8), tl.float32)
    ups = tl.zeros((ROWS, WIDTH // 8), tl.float32)
    for start in tl.range(0, d, WIDTH, num_stages=STAGES):
        columns = start + tl.arange(0, WIDTH)
        inputs = tl.load(x + token * x_stride + columns, mask=columns < d, other=0).to(tl.float32)[None, :]
        gate_tile = _tile(gate_rows, inside, d, start, True, WIDTH, EVEN).to(tl.float32)
        up_tile = _tile(up_rows, inside, d, start, True, WIDTH, EVEN).to(tl.float32)
        gates += _partly_summed(gate_tile * inputs, ROWS, WIDTH)
        ups += _partly_summed(up_tile * inputs, ROWS, WIDTH)
    gated, value = tl.sum(gates, 1), tl.sum(ups, 1)
    if SCALED:
        gate_at, up_at = _gate_and_up(e, is_routed, gate_up_scales, gate_scales, up_scales, 1, f, K, SHARED)
        gated *= tl.load(gate_at + inside)
        value *= tl.load(up_at + inside)
    result = _silu(gated) * value * share
    tl.store(out + rows, result.to(hidden.dtype.element_ty), mask=rows < height)


@_kernel
def _down_vector(
    hidden,
    chosen,
    down,
    down_scales,
    shared_down,
    shared_scales,
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
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS of the result of one token: its experts and the shared ones as one long product."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(rows, d - 1)
    if OVERLAPS and SHARED:
        _prefetch(shared_down, inside, g)
    _after_the_last_kernel(OVERLAPS)
    token = tl.program_id(1)
    total = tl.zeros((ROWS, WIDTH // 8), tl.float32)
    if SHARED:
        inputs_at = hidden + m * K * f + token * g
        for start in tl.range(0, g, WIDTH, num_stages=STAGES):
            columns = start + tl.arange(0, WIDTH)
            inputs = tl.load(inputs_at + columns, mask=columns < g, other=0).to(tl.float32)
            tile = _tile(shared_down, inside, g, start, True, WIDTH, EVEN).to(tl.float32)
            total += _partly_summed(tile * inputs[None, :], ROWS, WIDTH)
        if SCALED:
            total *= tl.load(shared_scales + inside)[:, None]
    if K > 0:
        steps = tl.cdiv(f, WIDTH)
        # one loop over all experts, so that the first tile of the next one is on its way in time
        for step in tl.range(0, K * steps, num_stages=STAGES):
            pair, start = token * K + step // steps, step % steps * WIDTH
            e = tl.load(chosen + pair)
            is_here = _is_here(e, num_experts)
            columns = start + tl.arange(0, WIDTH)
            inputs = tl.load(hidden + pair * f + columns, mask=is_here & (columns < f), other=0).to(tl.float32)
            tile = _tile(down + e * d * f, inside, f, start, is_here, WIDTH, EVEN).to(tl.float32)
            part = _partly_summed(tile * inputs[None, :], ROWS, WIDTH)
            if SCALED:
                part *= tl.load(down_scales + e * d + inside, mask=is_here, other=0)[:, None]
            total += part
    result = tl.sum(total, 1)
    if residual is not None:
        result += tl.load(residual + token * residual_stride + inside).to(tl.float32)
    tl.store(out + token * d + rows, result.to(out.dtype.element_ty), mask=rows < d)


@_kernel
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
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(rows, n - 1)
    if OVERLAPS:
        _prefetch(weight, inside, width)
    _after_the_last_kernel(OVERLAPS)
    first = tl.program_id(1) * TOKENS
    none = tl.zeros((ROWS, WIDTH // 8), tl.float32)
    totals = (none,) * TOKENS
    for start in tl.range(0, width, WIDTH, num_stages=STAGES):
        columns = start + tl.arange(0, WIDTH)
        tile = _tile(weight, inside, width, start, True, WIDTH, EVEN).to(tl.float32)
        sums = ()
        for i in tl.static_range(TOKENS):
            mask = (first + i < m) & (columns < width)
            inputs = tl.load(x + (first + i) * x_stride + columns, mask=mask, other=0).to(tl.float32)
            sums = sums + (totals[i] + _partly_summed(tile * inputs[None, :], ROWS, WIDTH),)  # noqa: RUF005
        totals = sums
    for i in tl.static_range(TOKENS):
        result = tl.sum(totals[i], 1)
        if scales is not None:
            result *= tl.load(scales + inside)
        if bias is not None:
            result += tl.load(bias + inside).to(tl.float32)
        to = y + (first + i) * n + rows
        tl.store(to, result.to(y.dtype.element_ty), mask=(rows < n) & (first + i < m))


# ---- Several tokens --------------------------------------------------------------------------------------------------


@triton.jit
def _group(chosen, tile, group, m, num_experts, K: tl.constexpr, K_PADDED: tl.constexpr, TOKENS: tl.constexpr, BY_PAIR):
    """Which expert a group is, whether a program has it to compute, and at which slot tokens chose it, -1 where none.

    Groups are numbered by experts, or by pairs of a token and its choice where these are fewer; the first pair with an
    expert then stands for all.
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
    is_wanted = _is_here(e, num_experts)
    if BY_PAIR:
        is_wanted = is_wanted & (tl.min(tl.min(tl.where(matches, numbers, TOKENS * K), 1), 0) == group)
    else:
        is_wanted = is_wanted & (tl.max(slot, 0) >= 0)
    return e, is_wanted, slot


@_kernel
def _activate_matrix(
    x,
    x_stride,
    chosen,
    weights,
    gate_up,
    gate_up_scales,
    gate,
    up,
    gate_scales,
    up_scales,
    hidden,
    m,
    num_experts,
    d,
    f,
    g,
    groups,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    BY_PAIR: tl.constexpr,
    K_PADDED: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """weight * silu(gate x) * up x for ROWS of one expert and all of TOKENS tokens that chose it."""
    _after_the_last_kernel(OVERLAPS)
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
    gate_rows, up_rows = _gate_and_up(e, is_routed, gate_up, gate, up, d, f, K, SHARED)
    gates = tl.zeros((ROWS, TOKENS), tl.float32)
    ups = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, d, WIDTH, num_stages=STAGES):
        columns = start + tl.arange(0, WIDTH)
        mask = is_in[:, None] if EVEN else is_in[:, None] & (columns < d)[None, :]
        inputs = tl.load(x + tokens[:, None] * x_stride + columns[None, :], mask=mask, other=0).to(DOT).T
        gate_tile = _tile(gate_rows, inside, d, start, True, WIDTH, EVEN).to(DOT)
        up_tile = _tile(up_rows, inside, d, start, True, WIDTH, EVEN).to(DOT)
        gates = tl.dot(gate_tile, inputs, gates, input_precision="ieee")
        ups = tl.dot(up_tile, inputs, ups, input_precision="ieee")
    if SCALED:
        gate_at, up_at = _gate_and_up(e, is_routed, gate_up_scales, gate_scales, up_scales, 1, f, K, SHARED)
        gates *= tl.load(gate_at + inside)[:, None]
        ups *= tl.load(up_at + inside)[:, None]
    result = _silu(gates) * ups * share[None, :]
    mask = (rows < height)[:, None] & is_in[None, :]
    tl.store(hidden + to[None, :] + rows[:, None], result.to(hidden.dtype.element_ty), mask=mask)


@_kernel
def _down_matrix(
    hidden,
    chosen,
    down,
    down_scales,
    shared_down,
    shared_scales,
    parts,
    m,
    num_experts,
    d,
    f,
    g,
    groups,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    BY_PAIR: tl.constexpr,
    K_PADDED: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """ROWS of what one expert, or one piece of the shared ones, gives to the tokens that chose it."""
    _after_the_last_kernel(OVERLAPS)
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
    scale_at = shared_scales
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
        weight = down + e * d * f
        if SHARED:
            weight = tl.where(is_routed, weight, shared_down)
        if SCALED:
            scale_at = down_scales + e * d
            if SHARED:
                scale_at = tl.where(is_routed, scale_at, shared_scales)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for at in tl.range(start, end, WIDTH, num_stages=STAGES):
        given = _tile(inputs, input_rows, width, at, is_in[:, None], WIDTH, EVEN).to(DOT).T
        block = _tile(weight, inside, width, at, True, WIDTH, EVEN).to(DOT)
        total = tl.dot(block, given, total, input_precision="ieee")
    if SCALED:
        total *= tl.load(scale_at + inside)[:, None]
    mask = (rows < d)[:, None] & is_in[None, :]
    tl.store(parts + to[None, :] * d + rows[:, None], total, mask=mask)


@_kernel
def _sum_parts(
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
    OVERLAPS: tl.constexpr,
):
    """All that was computed for one token, in the order of its choices."""
    _after_the_last_kernel(OVERLAPS)
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        pair = token * K + slot
        is_here = _is_here(tl.load(chosen + pair), num_experts)
        total += tl.load(parts + pair * d + columns, mask=inside & is_here, other=0)
    for piece in tl.static_range(PIECES):
        total += tl.load(parts + (m * K + piece * m + token) * d + columns, mask=inside, other=0)
    if residual is not None:
        total += tl.load(residual + token * residual_stride + columns, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * d + columns, total.to(out.dtype.element_ty), mask=inside)


@_kernel
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
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(rows, n - 1)
    if OVERLAPS:
        _prefetch(weight, inside, width)
    _after_the_last_kernel(OVERLAPS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_in = tokens < m
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, width, WIDTH, num_stages=STAGES):
        columns = start + tl.arange(0, WIDTH)
        mask = is_in[:, None] if EVEN else is_in[:, None] & (columns < width)[None, :]
        inputs = tl.load(x + tokens[:, None] * x_stride + columns[None, :], mask=mask, other=0).to(DOT).T
        block = _tile(weight, inside, width, start, True, WIDTH, EVEN).to(DOT)
        total = tl.dot(block, inputs, total, input_precision="ieee")
    if scales is not None:
        total *= tl.load(scales + inside)[:, None]
    if bias is not None:
        total += tl.load(bias + inside).to(tl.float32)[:, None]
    mask = (rows < n)[:, None] & is_in[None, :]
    tl.store(y + tokens[None, :] * n + rows[:, None], total.to(y.dtype.element_ty), mask=mask)
