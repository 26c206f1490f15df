"""Zeros of a converted model's weights are not read in decoding, and what is not read changes nothing."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig

from deepseek_latent import LatentCache
from deepseek_latent.attention.ops import UpProjection, absorbed_attention
from deepseek_latent.cache.segments import Latents, SplitSegment
from deepseek_latent.conversion.compression_report import build_model
from deepseek_latent.conversion.gqa_to_mla import GqaToMla
from deepseek_latent.conversion.source import Source
from deepseek_latent.kernels.cpu.attention import attend_in_place, find_runs, runs_to_read
from tests.conversion.sources import save_source
from tests.kernels.support import DTYPES, noise, optimized
from tests.support import assert_within_rounding, needs_compiler, random_ids, relative_error, tiny_model

pytestmark = needs_compiler
WIDE = {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24}


@pytest.fixture
def converted(tmp_path):
    save_source(tmp_path, LlamaConfig, **WIDE)
    return build_model(GqaToMla(Source(tmp_path)))


def grouped(h: int, w: int, g: int, rows: int) -> Tensor:
    """[h rows gw]: ones at the key of each head's group."""
    placed = torch.zeros(h, rows, g * w)
    for head in range(h):
        group = head // (h // g)
        placed[head, :, group * w : (group + 1) * w] = 1
    return placed


@DTYPES
@pytest.mark.parametrize(("b", "s"), [(1, 1), (2, 3)])
def test_rows_that_are_zero_need_not_be_read(dtype, b, s, operators):
    h, n, w, g, c, a = 6, 2, 18, 3, 20, 37
    r = g * w
    rows = grouped(h, w, g, 1)[:, 0].bool()
    q = noise(h, n + r, a) * torch.nn.functional.pad(rows, (n, 0))[..., None]
    q = q.flatten(0, 1).to(dtype)
    runs = find_runs(q)
    assert runs == [x for head in range(h) for x in (head * (n + r) + n + head // 2 * w, w)]
    angles, norm = noise(b, s, r // 2, seed=5), noise(c, seed=4).to(dtype)
    x, kv_a = noise(b, s, a, seed=1).to(dtype), noise(c + r, a, seed=3).to(dtype)

    def project(q: Tensor, runs: list[int]) -> tuple[Tensor, Tensor]:
        return operators.project(x, q, None, x, kv_a, None, norm, 1e-6, angles.cos(), angles.sin(), n + r, runs)

    for skipping, reading in zip(project(q, runs), project(q, [])):
        assert torch.equal(skipping, reading)
    # these rows were zero when the runs were found
    changed = q + noise(1, a, seed=7).to(dtype)
    for skipping, reading in zip(project(changed, runs), project(changed, [])):
        assert torch.equal(skipping, reading)


@pytest.mark.parametrize("runs", [[0], [0, 0], [4, 2, 3, 1], [0, 3, 2, 1], [-1, 2], [6, 3], [8, 1], [0, 9]], ids=str)
def test_impossible_runs_are_refused_before_they_are_read(runs, operators):
    x, one = torch.ones(1, 1, 3), torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match="expected q_runs as pairs"):
        operators.project(x, torch.zeros(8, 3), None, x, torch.ones(5, 3), None, torch.ones(3), 1e-6, one, one, 4, runs)


def test_only_long_runs_of_many_zeros_are_worth_skipping():
    assert find_runs(noise(64, 5)) == []
    assert find_runs(torch.zeros(64, 5)) == []
    few, short = noise(64, 5), noise(64, 5)
    few[:8] = 0
    assert find_runs(few) == []
    short[::2] = 0
    assert find_runs(short) == []
    long = noise(64, 5)
    long[20:] = 0
    assert find_runs(long) == [0, 20]
    # a first column of zeros is no row of zeros
    column = noise(64, 5)
    column[:, 0] = 0
    assert find_runs(column) == []


@DTYPES
@pytest.mark.parametrize(("b", "s", "h", "g", "w", "t"), [(1, 1, 9, 3, 32, 700), (2, 3, 10, 5, 17, 600)], ids=str)
def test_columns_that_queries_and_values_do_not_use_need_not_be_multiplied(dtype, b, s, h, g, w, t, operators):
    n, c, r = 3, g * w + 5, g * w
    uses = grouped(h, w, g, s).transpose(0, 1)
    q_rotary = (noise(b, s, h, r) * uses / w**0.5).to(dtype)
    q_content, w_uk = torch.zeros(b, s, h, n, dtype=dtype), UpProjection(noise(h, n, c, seed=2).to(dtype))
    selected = noise(h, w, c, seed=3) * torch.nn.functional.pad(grouped(h, w, g, w), (0, 5))
    w_uv = UpProjection(selected.to(dtype))
    latents = Latents(SplitSegment(noise(b, t, c, seed=4).to(dtype), noise(b, t, r, seed=5).to(dtype)))
    options = {"mask": None, "scale": 0.5}
    result = attend_in_place(q_content, q_rotary, latents, w_uk, w_uv, **options)
    wide = [UpProjection(each.weight.double()) for each in (w_uk, w_uv)]
    exact_latents = Latents(SplitSegment(*(x.double() for x in latents.dense(b))))
    exact = absorbed_attention(q_content.double(), q_rotary.double(), exact_latents, *wide, **options)
    yardstick = absorbed_attention(q_content, q_rotary, latents, w_uk, w_uv, **options)
    assert_within_rounding(result, exact, yardstick, slack=4)


@torch.no_grad()
def step(model, cached: Tensor, token: Tensor) -> Tensor:
    cache = LatentCache(model.config)
    model(cached, cache=cache)
    return model(token, cache=cache).logits


@torch.no_grad()
def test_a_converted_model_skips_most_of_its_queries_and_gives_the_same_logits(converted):
    cached, token = random_ids(1, 9) % 96, random_ids(1, 1, seed=1) % 96
    fast = optimized(converted)
    assert relative_error(step(fast, cached, token), step(converted, cached, token)) < 1e-5
    attention = fast.model.layers[1].self_attn
    runs = runs_to_read(attention, attention.q_proj.weight)
    assert sum(runs[1::2]) == 8 * 24
    assert len(attention.q_proj.weight) == 8 * (8 + 96)
    dense = optimized(tiny_model(n_routed_experts=None, q_lora_rank=None)).model.layers[0].self_attn
    assert runs_to_read(dense, dense.q_proj.weight) == []


def in_place(model) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.add_(0.01)


def through_data(model) -> None:
    """As peft merges."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data += 0.01


def loaded(model) -> None:
    state = {name: x + 0.01 if "q_proj" in name else x for name, x in model.state_dict().items()}
    model.load_state_dict(state)


@pytest.mark.parametrize("change", [in_place, through_data, loaded])
@torch.no_grad()
def test_zeros_that_a_change_fills_are_read_from_then_on(converted, change):
    cached, token = random_ids(1, 9) % 96, random_ids(1, 1, seed=1) % 96
    plain, fast = copy.deepcopy(converted), optimized(converted)
    before = step(fast, cached, token)
    change(plain)
    change(fast)
    after = step(fast, cached, token)
    assert relative_error(after, step(plain, cached, token)) < 1e-5
    assert relative_error(after, before) > 1e-3


@torch.no_grad()
def test_an_adapter_on_queries_acts_before_and_after_it_is_merged(converted):
    cached, token = random_ids(1, 9) % 96, random_ids(1, 1, seed=1) % 96
    fast = optimized(converted)
    before = step(fast, cached, token)
    torch.manual_seed(0)
    adapted = get_peft_model(fast, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    acting = step(adapted.base_model.model, cached, token)
    assert relative_error(acting, before) > 1e-3
    merged = step(adapted.merge_and_unload(), cached, token)
    assert relative_error(merged, acting) < 1e-4
