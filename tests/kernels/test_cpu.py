"""The operators in C++ compute what torch computes, at every width; a model that uses them gives the same results."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from deepseek_latent import LatentCache
from deepseek_latent.attention.ops import _attend_to_blocks
from deepseek_latent.attention.rotary import rotate
from deepseek_latent.cache.format import LatentFormat, latent_format
from deepseek_latent.cache.segments import Latents, Segment, SplitSegment
from deepseek_latent.experts.codec import Packed, pack
from deepseek_latent.experts.weights import StackedWeights
from deepseek_latent.kernels import optimize_for_inference
from deepseek_latent.kernels.cpu import library
from deepseek_latent.kernels.cpu.experts import readable_experts
from tests.support import LITE, assert_within_rounding, needs_compiler, random_ids, relative_error, seeded, tiny_model

pytestmark = needs_compiler
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", autouse=True)
def operators():
    library.load_operators()
    return torch.ops.deepseek_latent


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def packed_by_rows(weight: Tensor) -> Packed:
    """A weight [.. n k] as codes and one scale per row [.. n 1]."""
    return pack(weight, bits=8, group=None)


def summed_in_order(x: Tensor, weight: Tensor) -> Tensor:
    """x [m k] times weight [n k], summed term by term in float32 and rounded once: a yardstick for errors."""
    total = torch.zeros(x.shape[0], weight.shape[0])
    for column, factors in zip(x.float().T, weight.float().T):
        total += column[:, None] * factors
    return total.to(x.dtype)


# operators


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
def test_attention_over_codes_is_that_over_the_latents_they_stand_for(cache_dtype, c, shared):
    from deepseek_latent.kernels.cached_latents import bits_of, stored_parts

    b, s, h, r, t = 2, 2, 5, 6, 90
    rows_format = latent_format(cache_dtype, c, r, torch.bfloat16)
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


# models


def optimized(model):
    """A copy of the model that uses the operators."""
    twin = copy.deepcopy(model)
    optimize_for_inference(twin)
    return twin


@DTYPES
@pytest.mark.parametrize("variant", [{}, LITE, {"attention_bias": True}, {"n_routed_experts": None}], ids=str)
@pytest.mark.parametrize("length", [1, 6, 40])
@torch.no_grad()
def test_logits_are_those_of_the_model_as_it_was(dtype, variant, length):
    model, ids = tiny_model(dtype, **variant), random_ids(2, length)
    exact = tiny_model(torch.float32, **variant)
    exact.load_state_dict(model.state_dict())
    fast = optimized(model)
    for cached in (0, 5):
        past = random_ids(2, cached, seed=3) if cached else None
        results = []
        for each in (fast, exact, model):
            cache = LatentCache(each.config)
            if cached:
                each(past, cache=cache)
            results.append(each(ids, cache=cache).logits)
        if dtype == torch.float32:
            assert relative_error(results[0], results[2]) < 1e-5
        else:
            # a router near a tie may choose another expert, so the mean counts
            errors = [(x.double() - results[1].double()).abs().mean() for x in (results[0], results[2])]
            assert errors[0] < 2 * errors[1]


CACHES = {
    "LatentCache": LatentCache,
    "int6": lambda config: LatentCache(config, cache_dtype="int6"),
    "DynamicCache": lambda config: DynamicCache(config=config),
    "StaticCache": lambda config: StaticCache(config, max_cache_len=40),
}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_text_is_that_of_the_model_as_it_was(make, mode):
    batch = 1 if "prompt_lookup_num_tokens" in mode else 2
    if "prompt_lookup_num_tokens" in mode and make is CACHES["StaticCache"]:
        pytest.skip("transformers refuses assisted decoding over a static cache")
    model, ids = tiny_model(), random_ids(batch, 11)
    mask = torch.ones_like(ids)
    mask[-1, :4] = 0 if batch == 2 else 1
    expected = model.generate(ids, attention_mask=mask, cache=make(model.config), **GREEDY, **mode)
    fast = optimized(model)
    actual = fast.generate(ids, attention_mask=mask, cache=make(model.config), **GREEDY, **mode)
    assert torch.equal(actual, expected)


def test_adapters_act_and_may_come_before_or_after():
    config = LoraConfig(r=3, target_modules=["kv_b_proj", "q_b_proj", "o_proj"], init_lora_weights=False)
    ids = random_ids(2, 9)
    torch.manual_seed(1)
    plain = get_peft_model(tiny_model(), config).eval()
    expected = plain.generate(input_ids=ids, **GREEDY)
    assert not torch.equal(expected, tiny_model().generate(ids, **GREEDY))
    torch.manual_seed(1)
    before = tiny_model()
    optimize_for_inference(before)
    before = get_peft_model(before, config).eval()
    assert torch.equal(before.generate(input_ids=ids, **GREEDY), expected)
    optimize_for_inference(plain.base_model.model)
    assert torch.equal(plain.generate(input_ids=ids, **GREEDY), expected)


@torch.no_grad()
def test_products_that_operators_cannot_compute_are_left_to_torch():
    linear = nn.Linear(16, 8).bfloat16()
    model = tiny_model(torch.bfloat16)
    model.score = linear
    optimize_for_inference(model)
    x = noise(3, 16).bfloat16()
    expected = F.linear(x, linear.weight, linear.bias)
    assert relative_error(linear(x[0]), expected[0]) < 0.01
    assert relative_error(linear(noise(16, 3).bfloat16().T), linear(noise(16, 3).bfloat16().T.contiguous())) == 0
    assert linear(x[:0]).shape == (0, 8)
    model.norms = nn.ModuleList(
        [nn.RMSNorm(16), nn.RMSNorm((2, 16), eps=1e-6), nn.RMSNorm(16, elementwise_affine=False)]
    )
    model.norms.bfloat16()
    expected = [norm(x[:2]) for norm in model.norms]
    optimize_for_inference(model)
    assert all(torch.equal(norm(x[:2]), y) for norm, y in zip(model.norms, expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.float())


@pytest.mark.parametrize(
    "hooked",
    [
        "layers.0.mlp.up_proj",
        "layers.0.self_attn.q_b_proj",
        "layers.0.self_attn.kv_a_proj_with_mqa",
        "layers.0.self_attn.kv_a_layernorm",
        "layers.1.mlp.experts",
        "layers.1.mlp.experts.act_fn",
        "layers.1.mlp.shared_experts.act_fn",
        "layers.1.mlp.shared_experts",
        "layers.1.mlp.shared_experts.down_proj",
    ],
)
@torch.no_grad()
def test_a_forward_hook_on_a_part_still_sees_it_called(hooked):
    model, ids, seen = tiny_model(), random_ids(1, 1), []
    optimize_for_inference(model)
    model.model.get_submodule(hooked).register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = tiny_model()(ids).logits
    assert relative_error(model(ids).logits, expected) < 1e-5
    assert len(seen) == 1


@torch.no_grad()
def test_weights_of_two_dtypes_are_left_to_torch_and_refused_by_the_operators(operators):
    model, ids = tiny_model(), random_ids(1, 1)
    model.set_experts_implementation("eager")
    optimize_for_inference(model)
    x, shares, chosen = noise(1, 16), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="one dtype"):
        operators.experts(x, noise(2, 8, 16), noise(2, 16, 4).bfloat16(), chosen, shares, [], [], [])
    experts = model.model.layers[1].mlp.experts
    assert readable_experts(experts.weights, model.model.embed_tokens(ids)[0]) is not None
    experts.down_proj = nn.Parameter(experts.down_proj.bfloat16())
    assert readable_experts(experts.weights, model.model.embed_tokens(ids)[0]) is None


@torch.no_grad()
def test_no_tokens_times_an_int8_weight_give_no_tokens():
    model = tiny_model()
    optimize_for_inference(model, weights="int8")
    assert model.lm_head(torch.empty(0, 3, 72)).shape == (0, 3, 96)


def test_undoing_leaves_the_model_as_it_was():
    model, ids = tiny_model(torch.bfloat16), random_ids(2, 9)
    attributes = [{**vars(module)} for module in model.modules()]
    with torch.no_grad():
        before = model(ids).logits
        done = optimize_for_inference(model)
        assert [vars(module) for module in model.modules()] != attributes
        done.undo()
        done.undo()
        assert [vars(module) for module in model.modules()] == attributes
        assert torch.equal(model(ids).logits, before)
        assert repr(done).endswith("; nothing)")


def test_files_gradients_and_copies_are_those_of_the_model_as_it_was(tmp_path):
    model, ids = tiny_model(), random_ids(2, 9)
    fast = optimized(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    fast.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    for each in (model, fast):
        each(ids, labels=ids).loss.backward()
    for (name, a), b in zip(model.named_parameters(), fast.parameters()):
        assert torch.equal(a.grad, b.grad), name
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fast)(ids[:, :3]).logits, fast(ids[:, :3]).logits)


@pytest.mark.slow
@DTYPES
@torch.no_grad()
def test_a_compiled_step_over_a_static_cache_is_that_of_the_model_as_it_was(dtype):
    # without experts to choose, which bfloat16 may choose otherwise
    model = tiny_model(dtype, **({} if dtype == torch.float32 else {"n_routed_experts": None}))
    fast, ids = optimized(model), random_ids(1, 9)
    steps = {}
    for name, each in (("plain", model), ("fast", torch.compile(fast, fullgraph=True))):
        cache = StaticCache(model.config, max_cache_len=20)
        model(ids, cache=cache)
        steps[name] = [each(ids[:, :1], cache=cache).logits for _ in range(3)]
    for one, other in zip(*steps.values()):
        assert relative_error(one, other) < (1e-5 if dtype == torch.float32 else 0.05)


# int8


# in bfloat16 without experts: a router near a tie may choose others
@pytest.mark.parametrize(
    ("dtype", "variant"), [(torch.float32, {}), (torch.bfloat16, {"n_routed_experts": None})], ids=str
)
@torch.no_grad()
def test_int8_weights_compute_what_the_rounded_weights_do(dtype, variant):
    model, ids = tiny_model(dtype, **variant), random_ids(2, 9)
    fast, by_hand = copy.deepcopy(model), copy.deepcopy(model).float()
    done = optimize_for_inference(fast, weights="int8")
    assert " int8 Linear" in repr(done)
    assert ("2 int8 Experts" in repr(done)) == (not variant)
    for name, parameter in by_hand.named_parameters():
        if "norm" in name or "gate.weight" in name or "embed" in name or "kv_b_proj" in name:
            continue
        codes, scales = packed_by_rows(parameter)
        assert ((codes * scales - parameter).abs() <= 1.001 * scales / 2).all()
        parameter.copy_(codes * scales)
    exact = copy.deepcopy(model).float()
    for cached in (0, 5):
        past, results = random_ids(2, cached, seed=3), []
        for each in (fast, by_hand, model, exact):
            cache = LatentCache(each.config)
            if cached:
                each(past, cache=cache)
            results.append(each(ids, cache=cache).logits.double())
        if dtype == torch.float32:
            assert relative_error(*results[:2]) < 1e-5
        else:
            assert (results[0] - results[1]).abs().mean() < 2 * (results[2] - results[3]).abs().mean()


def test_int8_weights_take_half_the_memory_and_adapters_act_on_them():
    model = tiny_model(torch.bfloat16, hidden_size=256, moe_intermediate_size=128)
    held = sum(x.nbytes for x in model.parameters())
    untouched = sum(p.nbytes for n, p in model.named_parameters() if "embed" in n or "kv_b" in n or "norm" in n)
    optimize_for_inference(model, weights="int8")
    now = sum(x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers()))
    assert now < untouched + 0.53 * (held - untouched)
    ids = random_ids(1, 9)
    before = model.generate(ids, **GREEDY)
    config = LoraConfig(r=3, target_modules=["q_b_proj", "o_proj"], init_lora_weights=False)
    assert not torch.equal(get_peft_model(model, config).generate(input_ids=ids, **GREEDY), before)


@pytest.mark.parametrize("int8_first", [True, False])
def test_adapters_act_on_int8_weights_whichever_comes_first(int8_first, tmp_path):
    config = LoraConfig(r=3, target_modules=["q_b_proj", "kv_b_proj", "o_proj"], init_lora_weights=False)
    ids = random_ids(2, 9)

    def adapted(model):
        torch.manual_seed(1)
        return get_peft_model(model, config).eval()

    with torch.no_grad():
        by_hand = tiny_model()
        optimize_for_inference(by_hand, weights="int8")
        rounded_model = tiny_model()
        rounded_model.load_state_dict(by_hand.state_dict())
        expected = adapted(rounded_model)(input_ids=ids).logits
        model = tiny_model()
        if int8_first:
            optimize_for_inference(model, weights="int8")
        peft_model = adapted(model)
        if not int8_first:
            optimize_for_inference(peft_model, weights="int8")
        assert relative_error(peft_model(input_ids=ids).logits, expected) < 1e-4
        peft_model.save_pretrained(tmp_path)
        bare = tiny_model()
        optimize_for_inference(bare, weights="int8")
        loaded = PeftModel.from_pretrained(bare, tmp_path)
        assert relative_error(loaded(input_ids=ids).logits, expected) < 1e-4


def test_an_int8_model_is_saved_as_what_it_was_rounded_to(tmp_path):
    model, ids = tiny_model(torch.bfloat16), random_ids(1, 80)
    optimize_for_inference(model, weights="int8")
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
        assert weight.isfinite().all()
    # a cache of it carries the fingerprint of the rounded weights
    cache = LatentCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    cache.save(tmp_path / "cache.safetensors", tokens=ids, model=model)
    LatentCache.load(tmp_path / "cache.safetensors", model=model)
    with pytest.raises(ValueError, match="other weights"):
        LatentCache.load(tmp_path / "cache.safetensors", model=tiny_model(torch.bfloat16))


def test_what_int8_weights_cannot_do_is_refused():
    model, ids = tiny_model(), random_ids(1, 4)
    done = optimize_for_inference(model, weights="int8")
    with pytest.raises(ValueError, match=r"int8 weights carry no gradient: .*no_grad\(\)\.$"):
        model(ids)
    with pytest.raises(RuntimeError, match="single memory location"):
        model.load_state_dict(tiny_model().state_dict())
    with pytest.raises(ValueError, match=r"cannot be undone; load the model again\.$"):
        done.undo()
    with pytest.raises(ValueError, match=r"weights must be None \(as they are\) or 'int8', got 'int4'"):
        optimize_for_inference(tiny_model(), weights="int4")
    merged = get_peft_model(model, LoraConfig(r=3, target_modules=["o_proj"], init_lora_weights=False)).eval()
    with pytest.raises(RuntimeError, match="single memory location"):
        merged.merge_adapter()
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    with torch.no_grad(), pytest.raises(ValueError, match="changed since it was rounded to int8"):
        model(ids)


@pytest.mark.parametrize("length", [1, 20])
@torch.no_grad()
def test_lora_acts_on_routed_experts_in_int8_and_merging_unpacks_them(length):
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    ids = random_ids(1, length)

    def adapted(model):
        torch.manual_seed(1)
        return get_peft_model(model, config).eval()

    in_codes, rounded = tiny_model(), tiny_model()
    optimize_for_inference(in_codes, weights="int8")
    rounded.load_state_dict(in_codes.state_dict())
    without = rounded(ids).logits
    in_codes, rounded = adapted(in_codes), adapted(rounded)
    expected = rounded(input_ids=ids).logits
    assert relative_error(expected, without) > 1e-2
    assert relative_error(in_codes(input_ids=ids).logits, expected) < 1e-5
    merged = in_codes.merge_and_unload()
    assert relative_error(merged(ids).logits, expected) < 1e-5
    assert all(type(layer.mlp.experts.weights) is StackedWeights for layer in merged.model.layers[1:])


def test_optimizing_twice_is_optimizing_once_and_int8_may_come_second():
    model, ids = tiny_model(), random_ids(1, 4)
    once = repr(optimize_for_inference(model))
    again = optimize_for_inference(model)
    assert repr(again) == once
    assert repr(optimize_for_inference(model, weights="int8")) == repr(
        optimize_for_inference(tiny_model(), weights="int8")
    )
    assert model.generate(ids, **GREEDY).shape == (1, 16)
    other = tiny_model()
    optimize_for_inference(other)
    optimize_for_inference(other).undo()
    assert [type(module) for module in other.modules()] == [type(module) for module in tiny_model().modules()]


def test_a_tied_head_is_left_to_the_embeddings():
    model = tiny_model(tie_word_embeddings=True)
    optimize_for_inference(model, weights="int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generate(random_ids(1, 3), **GREEDY).shape == (1, 15)


# messages


def test_the_printed_line_counts_the_modules():
    assert repr(optimize_for_inference(tiny_model())).startswith(f"Optimized({library.load_operators()}; ")
    done = optimize_for_inference(nothing := tiny_model(hidden_act="gelu"))
    assert "Experts" not in repr(done)
    assert nothing.generate(random_ids(1, 3), **GREEDY).shape == (1, 15)


def test_a_model_on_another_device_or_in_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"got torch\.float16 on cpu; load it with dtype=torch\.bfloat16\.$"):
        optimize_for_inference(tiny_model().half())
    with pytest.raises(ValueError, match=r"got torch\.float32 on meta"):
        optimize_for_inference(tiny_model().to("meta"))


@pytest.mark.parametrize("thing", [None, "folder", nn.Linear(2, 2)], ids=str)
def test_anything_but_a_model_is_refused_by_its_class(thing):
    with pytest.raises(TypeError, match=f"expected a model of transformers or peft, got {type(thing).__name__}"):
        optimize_for_inference(thing)


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"found neither g\+\+ nor clang\+\+; install one"):
        library._built()


def test_a_failed_build_gives_its_reason_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "constants", SimpleNamespace(HF_HOME=tmp_path))
    monkeypatch.setattr(library, "HERE", tmp_path)
    for name in library.SOURCES:
        (tmp_path / name).write_text("#error no luck today\n")
    with pytest.raises(RuntimeError, match=r"could not build the kernels: .*no luck today"):
        library._built()
    assert not list((tmp_path / "deepseek_latent").iterdir())
