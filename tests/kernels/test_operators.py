"""The operators in C++ compute what torch computes, at every width."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_latent.attention.ops import _attend_to_blocks
from deepseek_latent.attention.rotary import rotate
from deepseek_latent.cache.format import LatentFormat, latent_format
from deepseek_latent.cache.segments import Latents, Segment, SplitSegment
from tests.kernels.support import DTYPES, noise, packed_by_rows
from tests.support import assert_within_rounding, needs_compiler, seeded

pytestmark = needs_compiler


def summed_in_order(x: Tensor, weight: Tensor) -> Tensor:
    """x [m k] times weight [n k], summed term by term in float32 and rounded once: a yardstick for errors."""
    total = torch.zeros(x.shape[0], weight.shape[0])
    for column, factors in zip(x.float().T, weight.float().T):
        total += column[:, None] * factors
    return total.to(x.dtype)


# numbers of tokens: up to the change from dot products to lanes and above it, and more than a group of lanes
@DTYPES
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 32, 33, 70])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 5), (33, 16), (40, 37), (65, 300), (2500, 3)])
def test_products_are_those_of_torch(dtype, m, n, k, operators):
    x, weight = noise(m, k).to(dtype), noise(n, k, seed=1).to(dtype)
    exact = x.double() @ weight.double().T
    assert_within_rounding(operators.linear(x, weight), exact, summed_in_order(x, weight))


@DTYPES
@pytest.mark.parametrize("m", [1, 3, 9, 40])
@pytest.mark.parametrize(("n", "k"), [(7, 5), (33, 16), (65, 300)])
def test_products_with_int8_weights_are_those_with_the_weights_they_stand_for(dtype, m, n, k, operators):
    x, scales = noise(m, k).to(dtype), noise(n, seed=2).abs()
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=seeded(3))
    exact = x.double() @ (weight.double() * scales[:, None].double()).T
    yardstick = summed_in_order(x, weight * scales[:, None])
    assert_within_rounding(operators.linear(x, weight, scales), exact, yardstick)


# groups of 1, 4, 5, 16, 48, 64 and 128 elements, and rows as one group
GROUPS = pytest.mark.parametrize(
    ("k", "groups"), [(5, 5), (37, 1), (300, 75), (35, 7), (48, 3), (96, 2), (640, 10), (384, 3)]
)
SCALES = pytest.mark.parametrize("scales_dtype", [torch.float32, torch.bfloat16], ids="scales {}".format)


def codes_in_groups(*shape: int, groups: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [.. n k], scales [.. n groups] in dtype, and the weight [.. n k] that they stand for in float64."""
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=seeded(seed))
    scales = noise(*shape[:-1], groups, seed=seed + 1).abs().to(dtype) / 20
    return codes, scales, codes.double() * scales.double().repeat_interleave(shape[-1] // groups, dim=-1)


@DTYPES
@SCALES
@GROUPS
@pytest.mark.parametrize("m", [1, 2, 7, 9, 40])
def test_products_with_scales_per_group_are_those_with_the_weight_they_stand_for(
    dtype, scales_dtype, m, k, groups, operators
):
    x, (codes, scales, weight) = noise(m, k).to(dtype), codes_in_groups(33, k, groups=groups, dtype=scales_dtype)
    exact = x.double() @ weight.T
    assert_within_rounding(operators.linear(x, codes, scales), exact, summed_in_order(x, weight.float()))


@SCALES
@GROUPS
@pytest.mark.parametrize("counts", [(0, 1, 0), (2, 0, 6), (1, 33, 9)], ids=str)
def test_grouped_products_with_scales_per_group_are_those_of_each_expert(scales_dtype, counts, k, groups, operators):
    x, (codes, scales, weight) = noise(sum(counts), k), codes_in_groups(3, 18, k, groups=groups, dtype=scales_dtype)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    pairs = list(zip(x.split(counts), weight))
    exact = torch.cat([rows.double() @ one.T for rows, one in pairs])
    yardstick = torch.cat([summed_in_order(rows, one.float()) for rows, one in pairs])
    assert_within_rounding(operators.grouped(x, codes, ends, scales), exact, yardstick)


@DTYPES
@SCALES
@pytest.mark.parametrize("m", [1, 5, 60])
@pytest.mark.parametrize(("d", "d_groups", "f", "f_groups"), [(10, 5, 7, 1), (40, 5, 33, 3), (128, 2, 64, 1)])
def test_routed_and_shared_experts_take_scales_per_group(dtype, scales_dtype, m, d, d_groups, f, f_groups, operators):
    x, chosen, shares = noise(m, d).to(dtype), noise(m, 6, seed=3).topk(3).indices, noise(m, 3, seed=6).abs()
    shapes = [(6, 2 * f, d), (6, d, f), (f, d), (f, d), (d, f)]
    all_groups = [d_groups, f_groups, d_groups, d_groups, f_groups]
    made = [
        codes_in_groups(*shape, groups=groups, dtype=scales_dtype, seed=i)
        for i, (shape, groups) in enumerate(zip(shapes, all_groups))
    ]
    codes, scales, (gate_up, down, *shared) = (list(x) for x in zip(*made))
    result = operators.experts(x, *codes[:2], chosen, shares, scales[:2], codes[2:], scales[2:])
    floats = [w.float() for w in (gate_up, down, *shared)]
    wide = operators.experts(x.float(), *floats[:2], chosen, shares, [], floats[2:], [])
    assert_within_rounding(result, wide.double(), wide.to(dtype), slack=4)
    alone, wide = operators.mlp(x, codes[2:], scales[2:]), operators.mlp(x.float(), floats[2:], [])
    assert_within_rounding(alone, wide.double(), wide.to(dtype), slack=4)


def test_scales_that_do_not_fit_their_weight_are_refused(operators):
    x, codes = noise(2, 6), torch.zeros(3, 6, dtype=torch.int8)
    for scales in (torch.ones(2), torch.ones(3, 4), torch.ones(3, 2).half(), torch.ones(2, 3).T, torch.ones(3, 0)):
        with pytest.raises(ValueError, match="expected scales of"):
            operators.linear(x, codes, scales)
    with pytest.raises(ValueError, match="scales for an int8 weight, and for no other"):
        operators.linear(x, codes, None)
    with pytest.raises(ValueError, match="scales for an int8 weight, and for no other"):
        operators.linear(x, codes.float(), torch.ones(3))


# one row; experts without rows; few and many rows; more rows than are multiplied at once
@DTYPES
@pytest.mark.parametrize("counts", [(0, 1, 0), (2, 0, 6), (1, 33, 9), (0, 600, 3)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(7, 5), (40, 37), (33, 300)])
def test_grouped_products_are_those_of_each_expert(dtype, counts, n, k, operators):
    x, weight = noise(sum(counts), k).to(dtype), noise(3, n, k, seed=1).to(dtype)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    pairs = list(zip(x.split(counts), weight))
    exact = torch.cat([rows.double() @ one.double().T for rows, one in pairs])
    yardstick = torch.cat([summed_in_order(*pair) for pair in pairs])
    assert_within_rounding(operators.grouped(x, weight, ends), exact, yardstick)


@DTYPES
@pytest.mark.parametrize("m", [1, 2, 5, 60])
@pytest.mark.parametrize(("d", "f"), [(5, 7), (40, 33), (72, 32), (9, 1100)])
@pytest.mark.parametrize("in_int8", [False, True])
def test_experts_are_those_of_torch(dtype, m, d, f, in_int8, operators):
    e, k = 6, 3
    x, gate_up, down = noise(m, d).to(dtype), noise(e, 2 * f, d, seed=1).to(dtype), noise(e, d, f, seed=2).to(dtype)
    scales = []
    if in_int8:
        gate_up, down = (w.mul(20).clamp(-127, 127).to(torch.int8) for w in (gate_up, down))
        scales = [noise(e, 2 * f, seed=4).abs() / 20, noise(e, d, seed=5).abs() / 20]
    chosen, shares = noise(m, e, seed=3).topk(k).indices, noise(m, k, seed=6).abs()
    chosen[0, 0] = e  # an expert of another rank
    result = operators.experts(x, gate_up, down, chosen, shares, scales, [], [])
    exact, yardstick = torch.zeros(m, d, dtype=torch.float64), torch.zeros(m, d)
    gates, downs = (
        w.double() * s.double()[..., None] if in_int8 else w.double()
        for w, s in zip((gate_up, down), scales or (None, None))
    )
    for token, slot in torch.cartesian_prod(torch.arange(m), torch.arange(k)).tolist():
        expert, share = chosen[token, slot], shares[token, slot]
        if expert == e:
            continue
        sides = ((exact, torch.float64, F.linear), (yardstick, dtype, summed_in_order))
        for total, kind, multiplied in sides:
            gate, up = multiplied(x[token][None].to(kind), gates[expert].to(kind)).chunk(2, dim=1)
            total[token] += multiplied(F.silu(gate) * up, downs[expert].to(kind))[0] * share
    assert result.dtype == dtype
    assert_within_rounding(result, exact, yardstick.to(dtype))


@DTYPES
@pytest.mark.parametrize("m", [1, 9, 300])
@pytest.mark.parametrize(("d", "f"), [(5, 7), (40, 33), (1100, 20)])
@pytest.mark.parametrize("in_int8", [False, True])
def test_the_mlp_of_a_layer_is_that_of_torch(dtype, m, d, f, in_int8, operators):
    x = noise(m, d).to(dtype)
    weights = [noise(*shape, seed=i).to(dtype) for i, shape in enumerate(((f, d), (f, d), (d, f)))]
    scales, exact_weights = [], [w.double() for w in weights]
    if in_int8:
        weights, scales = zip(*map(packed_by_rows, weights))
        exact_weights = [w.double() * scale.double() for w, scale in zip(weights, scales)]
    gate, up, down = exact_weights
    exact = (F.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    gate, up, down = (w.to(dtype) for w in exact_weights)
    yardstick = summed_in_order(F.silu(summed_in_order(x, gate)) * summed_in_order(x, up), down)
    result = operators.mlp(x, list(weights), list(scales))
    assert result.dtype == dtype
    assert_within_rounding(result, exact, yardstick)


@DTYPES
@pytest.mark.parametrize("m", [1, 2, 5, 8])
@pytest.mark.parametrize(("d", "f", "shared_f"), [(5, 7, 3), (40, 33, 66), (72, 32, 500)])
@pytest.mark.parametrize("in_int8", [False, True])
def test_routed_and_shared_experts_in_one_pass_are_their_sum(dtype, m, d, f, shared_f, in_int8, operators):
    x, chosen, shares = noise(m, d).to(dtype), noise(m, 6, seed=3).topk(3).indices, noise(m, 3, seed=6).abs()
    shapes = [(6, 2 * f, d), (6, d, f), (shared_f, d), (shared_f, d), (d, shared_f)]
    weights = [noise(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    scales = []
    if in_int8:
        weights, scales = zip(*map(packed_by_rows, weights))
    (gate_up, down, *shared), (routed_scales, shared_scales) = weights, (list(scales[:2]), list(scales[2:]))
    result = operators.experts(x, gate_up, down, chosen, shares, routed_scales, shared, shared_scales)
    wide = x.float()
    routed = operators.experts(x.float(), gate_up, down, chosen, shares, routed_scales, [], [])
    exact = routed.double() + operators.mlp(wide, shared, shared_scales).double()
    assert_within_rounding(result, exact, exact.to(dtype), slack=4)


@DTYPES
@pytest.mark.parametrize(("b", "s"), [(1, 1), (2, 1), (1, 5), (2, 4)])
@pytest.mark.parametrize("in_int8", [False, True])
def test_projecting_in_one_pass_is_projecting_norming_and_rotating(dtype, b, s, in_int8, operators):
    d, a, h, n, r, c, eps = 37, 20, 3, 5, 6, 18, 1e-3
    x, q_x = noise(b, s, d).to(dtype), noise(b, s, a, seed=1).to(dtype)
    q, kv_a = noise(h * (n + r), a, seed=2).to(dtype), noise(c + r, d, seed=3).to(dtype)
    norm, angles = noise(c, seed=4).to(dtype), noise(b, s, r // 2, seed=5)
    q_scales = kv_a_scales = None
    if in_int8:
        (q, q_scales), (kv_a, kv_a_scales) = packed_by_rows(q), packed_by_rows(kv_a)
    rotation = (angles.cos(), angles.sin())
    queries, rows = operators.project(q_x, q, q_scales, x, kv_a, kv_a_scales, norm, eps, *rotation, n + r)
    q_content, q_rotary = operators.linear(q_x.flatten(0, 1), q, q_scales).view(b, s, h, n + r).split((n, r), dim=-1)
    latent, k_rotary = operators.linear(x.flatten(0, 1), kv_a, kv_a_scales).view(b, s, c + r).split((c, r), dim=-1)
    expected = torch.cat((q_content, operators.rotate(q_rotary, *rotation)), dim=-1)
    assert torch.equal(queries.view_as(expected), expected)
    assert torch.equal(rows[..., :c], operators.rms_norm(latent.contiguous(), norm, eps))
    assert torch.equal(rows[..., c:], operators.rotate(k_rotary, *rotation))


@DTYPES
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 40, 1, 8), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("angles_of", ["each", "all"])
def test_rotation_is_that_of_torch(dtype, shape, angles_of, operators):
    angles = noise(shape[0] if angles_of == "each" else 1, shape[1], shape[-1] // 2, seed=1) * 100
    # a part of something wider, as queries are
    x = noise(*shape[:-1], shape[-1] + 3).to(dtype)[..., 3:]
    cos, sin = angles.cos(), angles.sin()
    turns = torch.complex(cos.double(), sin.double()).view(*cos.shape[:2], *[1] * (len(shape) - 3), -1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    exact = torch.view_as_real(pairs * turns).flatten(-2)
    assert_within_rounding(operators.rotate(x, cos, sin), exact, rotate(x, cos, sin))


@DTYPES
@pytest.mark.parametrize("m", [1, 2, 9])
@pytest.mark.parametrize(("n", "v", "c"), [(5, 7, 3), (16, 24, 40), (9, 6, 130)])
def test_absorbing_and_expanding_read_the_projection_where_it_lies(dtype, m, n, v, c, operators):
    h = 3
    kv_b = noise(h, n + v, c).to(dtype)
    w_uk, w_uv = kv_b.split((n, v), dim=1)
    queries = noise(m, h, n + 2, seed=1).to(dtype)[..., :n]
    absorbed = operators.absorb(queries, w_uk)
    exact = torch.einsum("mhn,hnc->mhc", queries.double(), w_uk.double())
    assert_within_rounding(absorbed, exact, torch.einsum("mhn,hnc->mhc", queries.float(), w_uk.float()))
    context = noise(m, h, c, seed=2)
    exact = torch.einsum("mhc,hvc->mhv", context.double(), w_uv.double())
    yardstick = torch.einsum("mhc,hvc->mhv", context.to(dtype), w_uv)
    assert_within_rounding(operators.expand(context, w_uv), exact, yardstick)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 80), (2, 3, 65)], ids=str)
def test_norms_are_those_of_torch(dtype, shape, operators):
    x, norm = (noise(*shape) * 3).to(dtype), nn.RMSNorm(shape[-1], eps=1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(noise(shape[-1], seed=1))
        exact = copy.deepcopy(norm).double()(x.double())
        assert_within_rounding(operators.rms_norm(x, norm.weight, 1e-6), exact, norm(x))


MASKS = ["none", "boolean", "additive", "per head", "sees nothing", "additive, sees nothing"]


def mask_of(kind: str, b: int, s: int, h: int, t: int) -> Tensor | None:
    if kind == "none":
        return None
    mask = noise(b, h if kind == "per head" else 1, s, t, seed=7) > -1
    if "sees nothing" in kind:
        mask[0] = False
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if "additive" in kind else mask


@DTYPES
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("lies", ["in rows", "apart", "a part shared"])
@pytest.mark.parametrize(
    ("b", "s", "h", "c", "r", "t"),
    [(1, 1, 16, 40, 8, 700), (2, 3, 5, 17, 4, 20), (1, 20, 3, 16, 2, 300), (3, 1, 33, 64, 6, 130), (1, 2, 1, 3, 1, 2)],
    ids=str,
)
def test_attention_over_the_cache_is_that_of_torch(dtype, kind, lies, b, s, h, c, r, t):
    from deepseek_latent.kernels.cached_latents import stored_parts
    from deepseek_latent.kernels.cpu.attention import additive_mask

    queries, rows = noise(b, s, h, c + r) / c**0.5, noise(b, t, c + r, seed=1).to(dtype)
    rows_format = LatentFormat(c, r, dtype)
    if lies == "in rows":
        buffer = torch.full((b, t + 5, c + r), torch.nan, dtype=dtype)
        buffer[:, :t] = rows
        latents = Latents(Segment(buffer[:, :t], rows_format))
    elif lies == "apart":
        latents = Latents(SplitSegment(rows[..., :c].contiguous(), rows[..., c:].contiguous()))
    else:
        latents = Latents(Segment(rows[:1, : t // 2], rows_format), Segment(rows[:, t // 2 :], rows_format))
    mask = mask_of(kind, b, s, h, t)
    exact = _attend_to_blocks(queries.double(), latents, mask, c)
    pairs = zip(*map(stored_parts, latents.segments))
    absorbed, q_rotary = (2 * queries).split((c, r), dim=-1)
    result = torch.ops.deepseek_latent.attend(
        absorbed.contiguous(), q_rotary, *map(list, pairs), 0.5, additive_mask(mask)
    )
    assert_within_rounding(result, exact, _attend_to_blocks(queries, latents, mask, c), slack=4)


@pytest.mark.parametrize("cache_dtype", ["int8", "int6", "int5", "int4", "fp8"])
@pytest.mark.parametrize("c", [3, 17, 40, 128, 200, 512])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("unquantized", [0, 2, 8])
def test_attention_over_codes_is_that_over_the_latents_they_stand_for(cache_dtype, c, shared, unquantized, operators):
    from deepseek_latent.kernels.cached_latents import bits_of, stored_parts

    b, s, h, r, t = 2, 2, 5, 6, 90
    rows_format = latent_format(cache_dtype, c, r, torch.bfloat16, min(unquantized, c - 1))
    latent, k_rotary = noise(b, t, c).bfloat16() * 3, noise(b, t, r, seed=1).bfloat16()
    rows = rows_format.encode(latent * noise(b, t, 1, seed=4).exp(), k_rotary)
    parts = (rows[:1, :40], rows[:, 40:]) if shared else (rows,)
    latents = Latents(*(Segment(part, rows_format) for part in parts))
    queries = noise(b, s, h, c + r, seed=2) / c**0.5
    exact = _attend_to_blocks(queries.double(), latents, None, c)
    pairs = zip(*map(stored_parts, latents.segments))
    absorbed, q_rotary = queries[..., :c].contiguous(), queries[..., c:]
    result = torch.ops.deepseek_latent.attend(absorbed, q_rotary, *map(list, pairs), 1.0, None, bits_of(latents))
    assert_within_rounding(result, exact, _attend_to_blocks(queries, latents, None, c), slack=4)


def test_attention_between_projections_is_absorbing_attending_and_expanding(operators):
    b, s, h, n, v, c, r, t = 2, 3, 5, 7, 4, 18, 6, 90
    kv_b, rows = noise(h, n + v, c).bfloat16(), noise(b, t, c + r, seed=1).bfloat16()
    queries, mask = noise(b, s, h, n + r, seed=2).bfloat16(), mask_of("additive", b, s, h, t)
    (w_uk, w_uv), (q_content, q_rotary) = kv_b.split((n, v), dim=1), queries.split((n, r), dim=-1)
    past = ([rows[..., :c]], [rows[..., c:]], 0.3, mask)
    absorbed = operators.absorb(q_content.flatten(0, 1), w_uk).unflatten(0, (b, s))
    expected = operators.expand(operators.attend(absorbed, q_rotary, *past).flatten(0, 1), w_uv).view(b, s, h, v)
    assert torch.equal(operators.attention(q_content, q_rotary, w_uk, w_uv, *past), expected)


def test_what_operators_promise_torch_compile_is_kept(operators):
    x, weight = noise(3, 16).bfloat16(), noise(5, 16).bfloat16()
    shares, chosen = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long)
    calls = [
        (operators.linear, (x, weight)),
        (operators.grouped, (x, noise(2, 5, 16).bfloat16(), torch.tensor([1, 3], dtype=torch.int32))),
        (operators.linear, (x, weight.char(), torch.ones(5, 2))),
        (operators.grouped, (x, weight[None].char(), torch.tensor([3], dtype=torch.int32), torch.ones(1, 5))),
        (operators.rms_norm, (x, weight[0], 1e-6)),
        (operators.experts, (x, noise(2, 8, 16), noise(2, 16, 4), chosen, shares, [], [], [])),
        (operators.mlp, (x, [weight, weight, weight.T.contiguous()], [])),
        (operators.rotate, (noise(1, 3, 2, 4), noise(1, 3, 2), noise(1, 3, 2))),
        (operators.absorb, (noise(3, 2, 4), noise(2, 4, 7))),
        (operators.expand, (noise(3, 2, 7), noise(2, 5, 7).bfloat16())),
        (operators.attend, (noise(1, 2, 3, 7), noise(1, 2, 3, 2), [noise(1, 6, 7)], [noise(1, 6, 2)], 0.5)),
        (
            operators.attention,
            (
                noise(1, 2, 3, 4),
                noise(1, 2, 3, 2),
                noise(3, 4, 7),
                noise(3, 5, 7),
                [noise(1, 6, 7)],
                [noise(1, 6, 2)],
                0.5,
            ),
        ),
        (
            operators.project,
            (
                x[None],
                weight,
                None,
                x[None],
                weight,
                None,
                noise(3).bfloat16(),
                1e-6,
                noise(1, 3, 1),
                noise(1, 3, 1),
                5,
            ),
        ),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
