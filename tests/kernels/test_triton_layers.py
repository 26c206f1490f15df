"""A decoder layer that decodes by kernels, on a GPU or, with TRITON_INTERPRET=1, on the CPU."""

import os

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU, Triton runs by TRITON_INTERPRET=1", allow_module_level=True)

from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from deepseek_latent import LatentCache, pack_experts  # noqa: E402
from deepseek_latent.kernels.gpu import layers as gpu_layers  # noqa: E402
from deepseek_latent.kernels.gpu import triton_experts, triton_project  # noqa: E402
from deepseek_latent.kernels.gpu.triton_attention import attend  # noqa: E402
from deepseek_latent.kernels.gpu.triton_experts import Plan  # noqa: E402
from deepseek_latent.kernels.gpu.triton_tiles import Tiles  # noqa: E402
from tests.conversion.sources import convert_to_mla, save_source  # noqa: E402
from tests.kernels.support import with_gpu_layers  # noqa: E402
from tests.support import random_ids, relative_error, tiny_model  # noqa: E402

# one dense and one with experts; a prompt of more tokens than attention absorbs
TWO_LAYERS, PROMPT = {"num_hidden_layers": 2}, 17


def plain(dtype=torch.float32, **overrides):
    return tiny_model(dtype, **TWO_LAYERS | overrides).to(DEVICE)


def optimized(**overrides):
    return with_gpu_layers(plain(**overrides))


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


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_experts_take_the_short_way(bits, counted):
    models, ids = (plain(), optimized()), random_ids(1, PROMPT + 1).to(DEVICE)
    for model in models:
        pack_experts(model, bits)
    expected, out = (steps(model, ids, LatentCache(model.config)) for model in models)
    assert set(counted.values()) == {models[0].config.num_hidden_layers}
    assert relative_error(out, expected) < 5e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_experts_of_several_tokens_are_read_by_kernels(bits, counted, monkeypatch):
    models, ids, read = (plain(), optimized()), random_ids(2, PROMPT + 2).to(DEVICE), []
    experts = gpu_layers.experts
    monkeypatch.setattr(gpu_layers, "experts", lambda *args, **given: read.append(1) or experts(*args, **given))
    logits = []
    for model in models:
        pack_experts(model, bits)
        cache = LatentCache(model.config)
        with torch.no_grad():
            model(ids[:, :PROMPT], cache=cache)
            logits.append(model(ids[:, PROMPT:], cache=cache).logits)
    assert len(read) == 1  # the one layer with experts
    assert relative_error(*logits) < 5e-6


@pytest.mark.parametrize("heads", [1, 2], ids=["MQA", "GQA"])
@pytest.mark.parametrize("options", [[], ["--bias-free"]], ids=["biases", "bias-free"])
def test_a_converted_model_decodes_by_kernels(options, heads, tmp_path, counted, monkeypatch):
    save_source(tmp_path / "source", LlamaConfig, num_key_value_heads=heads)
    folder, attended = convert_to_mla(tmp_path / "source", tmp_path / "out", *options), []
    monkeypatch.setattr(gpu_layers, "attend", lambda *args, **given: attended.append(1) or attend(*args, **given))
    slow, fast = (AutoModelForCausalLM.from_pretrained(folder).to(DEVICE) for _ in range(2))
    ids = random_ids(1, PROMPT + 2).to(DEVICE)
    expected, out = (steps(model, ids, LatentCache(model.config)) for model in (slow, with_gpu_layers(fast)))
    # biases are added by the modules, and then the rest of the layer is computed by kernels
    taken = counted["attend_one_token"] + len(attended)
    assert taken == 2 * fast.config.num_hidden_layers
    assert relative_error(out, expected) < 5e-6


def test_groups_that_no_kernel_reads_are_unpacked_by_torch(counted):
    odd = {"moe_intermediate_size": 36}  # groups of 4 in the rows of down_proj
    models, ids = (plain(**odd), optimized(**odd)), random_ids(1, PROMPT + 1).to(DEVICE)
    for model in models:
        pack_experts(model, 8)
    expected, out = (steps(model, ids, LatentCache(model.config)) for model in models)
    assert counted["feed_forward_one_token"] == 1  # the dense layer
    assert relative_error(out, expected) < 5e-6


def test_latents_too_wide_for_the_gpu_are_read_by_torch(counted, monkeypatch):
    monkeypatch.setattr(gpu_layers, "has_room", lambda *widths: False)
    models, ids = (plain(), optimized()), random_ids(1, PROMPT + 1).to(DEVICE)
    expected, out = (steps(model, ids, LatentCache(model.config)) for model in models)
    assert counted == {}
    assert torch.equal(out, expected)
