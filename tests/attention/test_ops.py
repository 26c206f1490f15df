"""Latent attention as functions of tensors, compared with the paper's equations in float64."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepseek_latent.attention import ops as latent_ops
from deepseek_latent.attention.ops import UpProjection, absorbed_attention, absorbing_is_cheaper, expanded_attention
from deepseek_latent.attention.sdpa import explicit_attention, fused_attention, masked_softmax
from deepseek_latent.cache.format import latent_format
from deepseek_latent.cache.segments import Latents, Segment, SplitSegment
from tests import reference
from tests.support import assert_within_rounding, relative_error

B, H, N, R, V, C = 2, 3, 16, 8, 24, 40
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def attention_inputs(new: int, cached: int, dtype: torch.dtype, rank: int = 0) -> dict:
    """Random queries, latents and up-projections [b=2], with one LoRA adapter of the given rank (0: none)."""
    t = new + cached
    up = {}
    for name, m in (("w_uk", N), ("w_uv", V)):
        factors = ((torch.randn(H, m, rank) * 0.3, torch.randn(rank, C) * 0.3),) if rank else ()
        up[name] = UpProjection((torch.randn(H, m, C) * C**-0.5).to(dtype), factors)
    return {
        "q_content": torch.randn(B, new, H, N).to(dtype),
        "q_rotary": torch.randn(B, new, H, R).to(dtype),
        "latent": torch.randn(B, t, C).to(dtype),
        "k_rotary": torch.randn(B, t, R).to(dtype),
        **up,
        "mask": torch.ones(B, 1, new, t, dtype=torch.bool).tril(cached),
        "scale": (N + R) ** -0.5,
    }


def absorbed(*, latent: torch.Tensor, k_rotary: torch.Tensor, **others) -> torch.Tensor:
    return absorbed_attention(latents=Latents(SplitSegment(latent, k_rotary)), **others)


def expanded(*, latent: torch.Tensor, k_rotary: torch.Tensor, **others) -> torch.Tensor:
    return expanded_attention(latents=Latents(SplitSegment(latent, k_rotary)), **others)


def exact(inputs: dict) -> torch.Tensor:
    visible = inputs["mask"][:, 0] if inputs["mask"].dtype == torch.bool else inputs["mask"][:, 0] == 0
    weights = {}
    for name in ("w_uk", "w_uv"):
        up = inputs[name]
        weights[name] = up.weight.double() + sum(
            torch.einsum("hmk,kc->hmc", b.double(), a.double()) for b, a in up.factors
        )
    others = {k: v for k, v in inputs.items() if k not in ("w_uk", "w_uv", "mask", "scale")}
    return reference.attention(**others, **weights, visible=visible, scale=inputs["scale"])


def test_reference_absorbed_is_the_same_equation():
    inputs = attention_inputs(3, 4, torch.float64)
    others = {k: v for k, v in inputs.items() if k not in ("w_uk", "w_uv", "mask")}
    weights = {name: inputs[name].weight for name in ("w_uk", "w_uv")}
    absorbed = reference.absorbed_attention(**others, **weights, visible=inputs["mask"][:, 0])
    assert relative_error(absorbed, exact(inputs)) < 1e-13


@DTYPES
@pytest.mark.parametrize("rank", [0, 5], ids="rank{}".format)
@pytest.mark.parametrize("cached", [0, 1, 7], ids="cached{}".format)
@pytest.mark.parametrize("new", [1, 3], ids="new{}".format)
@pytest.mark.parametrize("attend", [absorbed, expanded])
def test_both_paths_equal_the_paper(attend, new, cached, rank, dtype):
    inputs = attention_inputs(new, cached, dtype, rank)
    # the yardstick is the error of explicit attention, with keys and values of this dtype
    keys, values = (
        torch.einsum("btc,hmc->bhtm", inputs["latent"], inputs[w].merged_weight()) for w in ("w_uk", "w_uv")
    )
    keys = torch.cat((keys, inputs["k_rotary"][:, None].expand(-1, H, -1, -1)), -1)
    queries = torch.cat((inputs["q_content"], inputs["q_rotary"]), -1).transpose(1, 2)
    yardstick, _ = explicit_attention(queries, keys, values, mask=inputs["mask"], scale=inputs["scale"])
    actual = attend(**inputs)
    assert actual.dtype == dtype
    assert_within_rounding(actual, exact(inputs), yardstick.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [1, 4], ids="spread{}".format)
def test_at_deepseek_v2_widths_absorbing_rounds_no_more_than_fused_expansion(spread, dtype):
    h, n, r, v, c, t = 2, 128, 64, 128, 512, 300
    inputs = {
        "q_content": torch.randn(1, 1, h, n) * spread,
        "q_rotary": torch.randn(1, 1, h, r) * spread,
        "latent": torch.randn(1, t, c),
        "k_rotary": torch.randn(1, t, r),
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    weights = {"w_uk": (torch.randn(h, n, c) * c**-0.5).to(dtype), "w_uv": (torch.randn(h, v, c) * c**-0.5).to(dtype)}
    scale = (n + r) ** -0.5
    truth = reference.attention(**inputs, **weights, visible=torch.ones(1, 1, t, dtype=torch.bool), scale=scale)
    inputs |= {name: UpProjection(weight) for name, weight in weights.items()}
    yardstick = expanded(**inputs, mask=None, scale=scale)
    assert_within_rounding(absorbed(**inputs, mask=None, scale=scale), truth, yardstick)


@pytest.mark.parametrize("attend", [absorbed, expanded])
@pytest.mark.parametrize("rank", [0, 5], ids="rank{}".format)
@DTYPES
def test_blocks_change_nothing(attend, rank, dtype, monkeypatch):
    inputs = attention_inputs(5, 6, dtype, rank)
    whole = attend(**inputs)
    monkeypatch.setattr(latent_ops, "SCORES_PER_BLOCK", B * H * 5 * 2)  # two cached tokens
    monkeypatch.setattr(latent_ops, "ELEMENTS_PER_BLOCK", 1)  # one head
    monkeypatch.setattr(latent_ops, "TOKENS_PER_BLOCK", 3)
    # the order of sums differs, so the result may be rounded the other way once
    assert relative_error(attend(**inputs), whole) < max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("attend", [absorbed, expanded])
def test_a_block_of_queries_gets_its_own_part_of_a_mask_per_head(attend, monkeypatch):
    inputs = attention_inputs(5, 6, torch.float32)
    inputs["mask"] = torch.rand(B, H, 5, 11) < 0.6
    inputs["mask"][..., 0] = True
    whole = attend(**inputs)
    per_head = [attend(**inputs | {"mask": inputs["mask"][:, [h]]})[:, :, h] for h in range(H)]
    torch.testing.assert_close(torch.stack(per_head, 2), whole, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(latent_ops, "SCORES_PER_BLOCK", 1)
    monkeypatch.setattr(latent_ops, "ELEMENTS_PER_BLOCK", 1)
    torch.testing.assert_close(attend(**inputs), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attend", [absorbed, expanded])
@pytest.mark.parametrize("cached", [0, 1, 9], ids="cached{}".format)
@pytest.mark.parametrize("tokens_per_block", [1, 4, 99])
def test_no_mask_means_causal(attend, cached, tokens_per_block, monkeypatch):
    monkeypatch.setattr(latent_ops, "TOKENS_PER_BLOCK", tokens_per_block)
    inputs = attention_inputs(6, cached, torch.float32)
    torch.testing.assert_close(attend(**inputs | {"mask": None}), attend(**inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("cache_dtype", "blocks"), [(None, 1), ("int8", 2)])
def test_latents_that_need_no_decoding_are_one_block_on_a_gpu(cache_dtype, blocks):
    b, h, c, r, t = 8, 16, 512, 64, 1 << 13
    form = latent_format(cache_dtype, c, r, torch.bfloat16)
    with torch.device("meta"):
        rows = torch.empty(b, t, form.row_width, dtype=form.storage_dtype)
        queries = torch.empty(b, 1, h, 128, dtype=torch.bfloat16), torch.empty(b, 1, h, r, dtype=torch.bfloat16)
        w = UpProjection(torch.empty(h, 128, c, dtype=torch.bfloat16))
    with torch.profiler.profile() as profile:
        absorbed_attention(*queries, Latents(Segment(rows, form)), w, w, mask=None, scale=1.0)
    products = sum(event.count for event in profile.key_averages() if event.key == "aten::bmm")
    # two for each block, and one for each up-projection
    assert products == 2 * blocks + 2


@pytest.mark.parametrize("attend", [absorbed_attention, expanded_attention])
@pytest.mark.parametrize("cache_dtype", [None, "int6"])
def test_a_shared_prefix_is_read_as_if_every_sequence_had_its_own(attend, cache_dtype, monkeypatch):
    monkeypatch.setattr(latent_ops, "TOKENS_PER_BLOCK", 4)
    inputs, rows_format = attention_inputs(3, 11, torch.float32), latent_format(cache_dtype, C, R, torch.float32)
    rows = rows_format.encode(inputs.pop("latent"), inputs.pop("k_rotary"))
    rows[:, :9] = rows[:1, :9]
    apart = Latents(Segment(rows[:1, :9], rows_format), Segment(rows[:, 9:], rows_format))
    whole = Latents(Segment(rows, rows_format))
    torch.testing.assert_close(attend(latents=apart, **inputs), attend(latents=whole, **inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attend", [absorbed, expanded])
def test_additive_mask_equals_boolean_mask(attend):
    inputs = attention_inputs(4, 3, torch.float32)
    additive = torch.zeros(B, 1, 4, 7).masked_fill(~inputs["mask"], torch.finfo(torch.float32).min)
    torch.testing.assert_close(attend(**inputs | {"mask": additive}), attend(**inputs), rtol=1e-5, atol=1e-6)


def test_absorbed_attention_gives_zeros_to_a_query_that_an_additive_mask_hides_everything_from():
    inputs = attention_inputs(4, 3, torch.float32)
    inputs["mask"][1, :, :2] = False
    additive = torch.zeros(B, 1, 4, 7).masked_fill(~inputs["mask"], torch.finfo(torch.float32).min)
    context = absorbed(**inputs | {"mask": additive})
    assert (context[1, :2] == 0).all()
    torch.testing.assert_close(context, absorbed(**inputs), rtol=1e-5, atol=1e-6)


def test_a_row_that_an_additive_mask_hides_everything_from_gives_zeros():
    mask = torch.zeros(1, 1, 2, 3)
    mask[..., 0, :] = torch.finfo(torch.float32).min
    weights = masked_softmax(torch.randn(1, 1, 2, 3), mask, 1.0)
    assert (weights[..., 0, :] == 0).all()
    torch.testing.assert_close(weights[..., 1, :].sum(), torch.tensor(1.0))


def test_a_row_of_minus_infinity_gives_a_zero_gradient_and_not_nan():
    scores = torch.randn(1, 1, 2, 3, requires_grad=True)
    mask = torch.zeros(1, 1, 2, 3)
    mask[..., 0, :] = -torch.inf
    masked_softmax(scores, mask, 1.0)[..., 0].sum().backward()
    assert (scores.grad[..., 0, :] == 0).all()
    assert (scores.grad[..., 1, :] != 0).all()


@DTYPES
@pytest.mark.parametrize("attend", [absorbed, expanded])
def test_a_query_that_may_attend_to_nothing_gives_zeros(attend, dtype):
    inputs = attention_inputs(4, 0, dtype)
    inputs["mask"][1, :, :2] = False
    context = attend(**inputs)
    assert torch.isfinite(context).all()
    assert (context[1, :2] == 0).all()
    assert (context[1, 2:] != 0).all()


def test_masked_softmax_ignores_the_magnitude_of_masked_scores():
    scores = torch.tensor([[[[1e4, 1.0, 2.0]]]])
    mask = torch.tensor([[[[False, True, True]]]])
    expected = torch.tensor([1.0, 2.0]).softmax(-1)
    torch.testing.assert_close(masked_softmax(scores, mask, 1.0)[0, 0, 0], torch.cat((torch.zeros(1), expected)))


@DTYPES
@pytest.mark.parametrize("v", [8, 24, 40], ids="v{}".format)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_sdpa_uses_a_fused_kernel_whatever_the_widths(v, masked, dtype):
    queries, keys = (torch.randn(B, H, 9, N + R).to(dtype) for _ in range(2))
    values = torch.randn(B, H, 9, v).to(dtype)
    mask = torch.ones(B, 1, 9, 9, dtype=torch.bool).tril() if masked else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises if that kernel would not be used
        fused = fused_attention(queries, keys, values, mask=mask, scale=0.2)
    plain, _ = explicit_attention(queries, keys, values, mask=mask, scale=0.2)
    truth, _ = explicit_attention(queries.double(), keys.double(), values.double(), mask=mask, scale=0.2)
    assert fused.shape == plain.shape
    assert_within_rounding(fused, truth, plain)


def test_break_even_is_171_tokens_at_deepseek_v2_widths():
    widths = {"c": 512, "n": 128, "v": 128}
    far = 1 << 30
    assert absorbing_is_cheaper(170, far, **widths)
    assert not absorbing_is_cheaper(171, far, **widths)
    assert absorbing_is_cheaper(1, 2, **widths)
    # with nothing cached, both expand every token once, and narrower scores are cheaper
    assert not absorbing_is_cheaper(8, 8, **widths)


@pytest.mark.parametrize(("s", "t"), [(1, 64), (16, 64), (40, 64), (60, 64), (64, 64)])
def test_choice_of_path_agrees_with_counted_products(s, t):
    n, r, v, c = 16, 8, 24, 40
    absorbed = s * c * (n + v) + s * t * (2 * c + r)
    expanded = t * c * (n + v) + s * t * (n + r + v)
    assert absorbing_is_cheaper(s, t, c=c, n=n, v=v) == (absorbed < expanded)
