"""The kernels of a single token and the layer that uses them, on a GPU or, with TRITON_INTERPRET=1, on the CPU."""

import os

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU, Triton runs by TRITON_INTERPRET=1", allow_module_level=True)

from deepseek_latent import LatentCache  # noqa: E402
from deepseek_latent.cache.format import latent_format  # noqa: E402
from deepseek_latent.compat.bound_functions import bind  # noqa: E402
from deepseek_latent.kernels.gpu import layers as gpu_layers  # noqa: E402
from deepseek_latent.kernels.gpu import one_token as gpu_one_token  # noqa: E402
from deepseek_latent.kernels.gpu import triton_experts, triton_project  # noqa: E402
from deepseek_latent.kernels.gpu.triton_attention import Tiling, attend, attend_in_splits  # noqa: E402
from deepseek_latent.kernels.gpu.triton_experts import Plan, experts, mlp  # noqa: E402
from deepseek_latent.kernels.gpu.triton_norm import rms_norm  # noqa: E402
from deepseek_latent.kernels.gpu.triton_one_token import expand, rotate_write_absorb  # noqa: E402
from deepseek_latent.kernels.gpu.triton_project import project  # noqa: E402
from deepseek_latent.kernels.gpu.triton_router import choose  # noqa: E402
from deepseek_latent.kernels.gpu.triton_tiles import Norm, Tiles  # noqa: E402
from deepseek_latent.kernels.gpu.triton_write import norm_rotate_write  # noqa: E402
from deepseek_latent.modeling_deepseek_v2 import DeepseekV2DecoderLayer  # noqa: E402
from tests.support import random_ids, relative_error, tiny_model  # noqa: E402

EPS = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
BUDGET = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def random(*shape, dtype=torch.float32):
    return (torch.randn(*shape, device=DEVICE) * torch.linspace(0.5, 2.0, shape[-1], device=DEVICE)).to(dtype)


def assert_near(out, truth, dtype):
    assert out.shape == truth.shape
    error = (out.double() - truth.double()).norm() / truth.double().norm()
    assert error < BUDGET[dtype], f"relative error {error:.2e}"


def exact_norm(x, norm):
    """The exact norm, rounded to the dtype of x as the module rounds it, in float64."""
    return nn.functional.rms_norm(x.double(), norm.weight.shape, norm.weight.double(), EPS).to(x.dtype).double()


@DTYPES
@pytest.mark.parametrize("width", [37, 64, 1100], ids="w{}".format)
@pytest.mark.parametrize("tiles", [Tiles(2, 32, 4, 1), Tiles(1, 2048, 4, 1), None], ids=str)
def test_two_weights_and_a_norm_share_a_launch(tiles, width, dtype):
    x, norm = random(1, width, dtype=dtype), Norm(random(width, dtype=dtype), EPS)
    weights = [random(n, width, dtype=dtype) for n in (9, 6)]
    outs = project(x, weights, norm, tiles=tiles)
    for out, weight in zip(outs, weights):
        assert out.dtype == dtype
        assert_near(out, exact_norm(x, norm) @ weight.double().T, dtype)


@DTYPES
def test_a_product_adds_its_residual_and_rounds_once(dtype):
    memory = torch.full((1, 100), torch.nan, device=DEVICE, dtype=dtype)
    memory[:, :50] = random(1, 50, dtype=dtype)
    x, weight, residual = memory[:, :50], random(7, 50, dtype=dtype), random(1, 7, dtype=dtype)
    (out,) = project(x, [weight], residual=residual)
    truth = x.double() @ weight.double().T + residual.double()
    error = (out.double() - truth).abs() - truth.abs() * torch.finfo(dtype).eps * 0.51
    assert (error <= 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_logits_are_float32(dtype):
    x, norm, weight = random(1, 72, dtype=dtype), Norm(random(72, dtype=dtype), EPS), random(12, 72, dtype=dtype)
    (out,) = project(x, [weight], norm, dtype=torch.float32, tiles=gpu_one_token.ROUTER_TILES)
    assert out.dtype == torch.float32
    assert_near(out, rms_norm(x, *norm).double() @ weight.double().T, torch.float32)


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU overlaps launches")
def test_overlapping_launches_give_the_same_bytes():
    first, router = random(1, 2048, dtype=torch.bfloat16), random(64, 2048, dtype=torch.bfloat16) / 64
    norms = [Norm(random(2048, dtype=torch.bfloat16), EPS) for _ in range(20)]
    square = random(2048, 2048, dtype=torch.bfloat16) / 64
    results = []
    for overlap in (False, True):
        x = first
        for norm in norms:
            (x,) = project(x, [square], norm, x, overlap=overlap)
            (logits,) = project(
                x, [router], norm, dtype=torch.float32, tiles=gpu_one_token.ROUTER_TILES, overlap=overlap
            )
            chosen = choose(logits, 6, 1, 1, normalize=True, scaling_factor=1.0, overlap=overlap)
        results.append((x, logits, *chosen))
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("on_device", [True, False], ids=["tensor", "int"])
@pytest.mark.parametrize(("bits", "u"), [(None, 0), (8, 0), (4, 0), (8, 6), (4, 6)], ids=str)
@pytest.mark.parametrize(("h", "n", "r", "c"), [(3, 12, 8, 40), (17, 16, 4, 300)], ids=str)
def test_one_launch_writes_rotates_and_absorbs(h, n, r, c, bits, u, on_device):
    dtype = torch.bfloat16
    queries, compressed = random(1, 1, h, n + r, dtype=dtype), random(1, 1, c + r, dtype=dtype)
    norm, angles = Norm(random(c, dtype=dtype), EPS), random(1, 1, r // 2) * 9
    # a view of both up-projections, whose other half is not to be read
    up = torch.full((h, n + 5, c), torch.nan, device=DEVICE, dtype=dtype)
    up[:, :n] = random(h, n, c, dtype=dtype)
    format = latent_format(bits and f"int{bits}", c, r, dtype, u)
    coded = {"bits": bits, "num_unquantized": u}
    rows = torch.full((2, 1, 9, format.row_width), 77, device=DEVICE, dtype=format.storage_dtype)
    start, turned = torch.tensor(4, device=DEVICE) if on_device else 4, queries.clone()
    rotation = angles.cos(), angles.sin()
    norm_rotate_write(turned, compressed, *norm, *rotation, rows[0], start, **coded)
    out = rotate_write_absorb(queries, compressed, norm, *rotation, rows[1], start, up[:, :n], **coded)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(queries, turned)
    truth = torch.einsum("bshn,hnc->bshc", queries[..., :n].double(), up[:, :n].double())
    assert_near(out, truth, dtype)


@DTYPES
@pytest.mark.parametrize("held", [1, 40, 133], ids="held{}".format)
@pytest.mark.parametrize("per_split", [16, 1000], ids="per_split{}".format)
def test_expansion_combines_splits_in_the_same_launch(per_split, held, dtype):
    h, c, r, v = 3, 40, 8, 21
    cut = Tiling(rows=16, tokens=16, num_warps=4, num_stages=2, programs_per_sm=1, tokens_per_split=per_split)
    queries = random(1, 1, h, c, dtype=dtype), random(1, 1, h, r, dtype=dtype)
    rows = torch.full((1, 400, c + r), torch.nan, device=DEVICE, dtype=dtype)
    rows[:, :held] = random(1, held, c + r, dtype=dtype)
    up = torch.full((h, v + 6, c), torch.nan, device=DEVICE, dtype=dtype)
    up[:, 6:] = random(h, v, c, dtype=dtype)
    given = [[x] for x in rows.split((c, r), dim=-1)]
    options = {"scale": 0.2, "length": torch.tensor([held], device=DEVICE), "cut": cut}
    context = attend(*queries, *given, **options)
    out = expand(*attend_in_splits(*queries, *given, **options), up[:, 6:])
    assert_near(out, torch.einsum("bshc,hvc->bshv", context.double(), up[:, 6:].double()).flatten(1), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [40, 1100], ids="d{}".format)
def test_experts_normalize_their_input_in_the_same_launch(d, dtype):
    x, norm, residual = random(1, d, dtype=dtype), Norm(random(d, dtype=dtype), EPS), random(1, d, dtype=dtype)
    shared = random(11, d, dtype=dtype), random(11, d, dtype=dtype), random(d, 11, dtype=dtype)
    stacked = random(5, 12, d, dtype=dtype), random(5, d, 6, dtype=dtype)
    chosen, weights = torch.tensor([[4, 1]], device=DEVICE), torch.tensor([[0.7, 0.2]], device=DEVICE)
    for layer, given in ((experts, (*stacked, chosen, weights, shared)), (mlp, shared)):
        out = layer(x, *given, residual=residual, norm=norm)
        assert_near(out, layer(rms_norm(x, *norm), *given, residual=residual), dtype)


# one dense and one with experts; a prompt of more tokens than attention absorbs
TWO_LAYERS, PROMPT = {"num_hidden_layers": 2}, 17


def plain(dtype=torch.float32, **overrides):
    return tiny_model(dtype, **TWO_LAYERS | overrides).to(DEVICE)


def optimized(**overrides):
    model = tiny_model(**TWO_LAYERS | overrides).to(DEVICE)
    for module in list(model.modules()):
        if type(module) is DeepseekV2DecoderLayer:
            bind(module, gpu_layers.REPLACEMENTS[DeepseekV2DecoderLayer])
    return model


WITHOUT_QUERY_LATENT = {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
MODELS = pytest.mark.parametrize(
    "overrides",
    [{}, WITHOUT_QUERY_LATENT | {"routed_scaling_factor": 1.0}, {"n_shared_experts": None}],
    ids=["query latent", "no query latent", "no shared experts"],
)


@pytest.fixture
def counted(monkeypatch):
    """Counts how often each half of a layer took the short way, that of a single token."""
    monkeypatch.setattr(gpu_layers, "DEVICES", ("cuda", "cpu"))
    # the interpreter runs one program at a time, so fewer programs are faster
    monkeypatch.setattr(triton_experts, "VECTOR", Plan(Tiles(8, 128, 4, 1), Tiles(8, 128, 4, 1)))
    monkeypatch.setattr(triton_project, "tiles_for", lambda width: Tiles(8, 128, 4, 1))
    counts = {}

    def watch(name):
        function = getattr(gpu_layers, name)

        def call(*args):
            out = function(*args)
            counts[name] = counts.get(name, 0) + (out is not None)
            return out

        monkeypatch.setattr(gpu_layers, name, call)

    watch("attend_one_token")
    watch("feed_forward_one_token")
    return counts


def steps(model, ids, cache, mask=None):
    """Logits of the tokens after the prompt, one at a time; the last step over a static cache runs as if captured."""
    out = []
    with torch.no_grad():
        for first, last in ((0, PROMPT), *((i, i + 1) for i in range(PROMPT, ids.shape[1]))):
            given = {} if mask is None else {"attention_mask": mask[:, :last]}
            if cache.is_static and last == ids.shape[1]:
                with cache.count.recorded():
                    out.append(model(ids[:, first:last], cache=cache, **given).logits)
            else:
                out.append(model(ids[:, first:last], cache=cache, **given).logits)
    return torch.cat([x[:, -1:] for x in out[1:]], dim=1)


def assert_short_way_gives_the_same_token(overrides, cache_dtype, static, counted):
    model, num_new = optimized(**overrides), 1 if static is None else 2
    ids = random_ids(1, PROMPT + num_new).to(DEVICE)
    out = steps(model, ids, LatentCache(model.config, cache_dtype=cache_dtype, max_cache_len=static))
    expected = steps(plain(**overrides), ids, LatentCache(model.config, cache_dtype=cache_dtype))
    assert set(counted.values()) == {num_new * model.config.num_hidden_layers}
    # a rounding may move a code to the next
    assert relative_error(out, expected) < (5e-6 if cache_dtype is None else 1e-2)


@MODELS
@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4"], ids=str)
@pytest.mark.parametrize("static", [None, PROMPT + 3], ids=["growing", "static"])
def test_a_token_by_the_short_way_is_the_same_token(static, cache_dtype, overrides, counted):
    assert_short_way_gives_the_same_token(overrides, cache_dtype, static, counted)


@pytest.mark.parametrize(
    ("cache_dtype", "c", "static"), [("int8", 88, None), ("int4", 144, PROMPT + 3), (None, 88, None)]
)
def test_a_token_with_unquantized_channels_takes_the_short_way_too(cache_dtype, c, static, counted):
    compressed = {"kv_lora_rank": c, "num_unquantized_channels": 8}
    assert_short_way_gives_the_same_token(compressed, cache_dtype, static, counted)


@pytest.mark.parametrize(
    ("cache_dtype", "c", "static"),
    [("int8", 88, 20), ("int6", 144, None), ("int5", 88, 20), ("int4", 144, None), ("fp8", 144, 20)],
)
def test_padded_sequences_with_unquantized_channels_are_computed_by_kernels(
    cache_dtype, c, static, counted, monkeypatch
):
    compressed, attended = {"kv_lora_rank": c, "num_unquantized_channels": 8}, []
    monkeypatch.setattr(gpu_layers, "attend", lambda *args, **given: attended.append(1) or attend(*args, **given))
    logits = []
    for model, max_cache_len in ((optimized(**compressed), static), (plain(**compressed), None)):
        cache = LatentCache(model.config, cache_dtype=cache_dtype, max_cache_len=max_cache_len)
        ids, outputs = random_ids(2, 20).to(DEVICE), []
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        with torch.no_grad():
            for first, last in ((0, PROMPT), (PROMPT, PROMPT + 2), (PROMPT + 2, 20)):
                given = {"attention_mask": mask[:, :last], "cache": cache}
                outputs.append(model(ids[:, first:last], **given).logits[:, -1])
        logits.append(torch.stack(outputs))
    assert len(attended) == 2 * model.config.num_hidden_layers
    assert relative_error(*logits) < 1e-2


def test_a_shared_prefix_with_unquantized_channels_is_computed_by_kernels(counted, monkeypatch):
    compressed, segments = {"kv_lora_rank": 144, "num_unquantized_channels": 8}, []
    monkeypatch.setattr(
        gpu_layers, "attend", lambda *args, **given: segments.append(len(given["latents"])) or attend(*args, **given)
    )
    logits = []
    for model in (optimized(**compressed), plain(**compressed)):
        ids, cache = random_ids(3, 4).to(DEVICE), LatentCache(model.config, cache_dtype="int8")
        with torch.no_grad():
            model(random_ids(1, PROMPT).to(DEVICE), cache=cache)
            cache.batch_repeat_interleave(3)
            logits.append(torch.stack([model(x, cache=cache).logits[:, -1] for x in ids.split((3, 1), dim=1)]))
    assert segments == 2 * model.config.num_hidden_layers * [2]
    assert relative_error(*logits) < 1e-2


@MODELS
def test_in_bfloat16_the_short_way_is_as_near_as_the_long_one(overrides, counted, monkeypatch):
    dtype = torch.bfloat16
    model, ids = optimized(dtype=dtype, **overrides), random_ids(1, PROMPT + 1).to(DEVICE)
    exact = steps(plain(torch.float64, **overrides), ids, LatentCache(model.config))
    short = steps(model, ids, LatentCache(model.config))
    for name in ("attend_one_token", "feed_forward_one_token"):
        monkeypatch.setattr(gpu_layers, name, lambda *args: None)
    long = steps(model, ids, LatentCache(model.config))
    assert (short - exact).norm() < 1.5 * (long - exact).norm() + 1e-3 * exact.norm()


def test_padding_is_hidden_from_a_token(counted):
    model, ids = optimized(), random_ids(1, PROMPT + 2).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    out = steps(model, ids, LatentCache(model.config), mask)
    assert relative_error(out, steps(plain(), ids, LatentCache(model.config), mask)) < 5e-6
    assert counted["attend_one_token"] == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("part", "half"),
    [("self_attn.o_proj", "attend_one_token"), ("mlp.shared_experts.up_proj", "feed_forward_one_token")],
)
def test_a_hook_on_a_part_sees_it_called(part, half, counted):
    model, ids = optimized(), random_ids(1, PROMPT + 1).to(DEVICE)
    calls = []
    model.model.layers[-1].get_submodule(part).register_forward_hook(lambda *args: calls.append(1))
    out = steps(model, ids, LatentCache(model.config))
    assert calls
    assert counted[half] == model.config.num_hidden_layers - 1
    assert relative_error(out, steps(plain(), ids, LatentCache(model.config))) < 5e-6


@pytest.mark.parametrize("cache_dtype", ["int6", "fp8"], ids=str)
def test_other_formats_of_rows_go_the_long_way(cache_dtype, counted):
    model, ids = optimized(), random_ids(1, PROMPT + 1).to(DEVICE)
    out = steps(model, ids, LatentCache(model.config, cache_dtype=cache_dtype))
    assert counted["attend_one_token"] == 0
    assert relative_error(out, steps(plain(), ids, LatentCache(model.config, cache_dtype=cache_dtype))) < 5e-2
