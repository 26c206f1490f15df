"""Masks: packed sequences do not attend to each other, and a mask of the wrong shape or dtype is refused."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from deepseek_latent import LatentCache
from deepseek_latent.attention.masks import held_tokens_mask
from deepseek_latent.cache.segments import Latents, SplitSegment
from tests.support import random_ids, relative_error, tiny_model


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(implementation, use_cache):
    model, ids = tiny_model(), random_ids(1, 20)
    model.set_attn_implementation(implementation)
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    packed = model(ids, position_ids=positions, use_cache=use_cache).logits
    assert relative_error(packed[:, :8], model(ids[:, :8]).logits) < 1e-5
    assert relative_error(packed[:, 8:], model(ids[:, 8:]).logits) < 1e-5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, 4, 6, dtype=torch.bool), "must cover all 8 visible tokens, cached or new, got 6"),
        (torch.ones(1, 1, 4, 8, dtype=torch.long), "boolean or additive in floating point, got torch.int64"),
    ],
)
def test_a_4d_mask_of_the_wrong_length_or_dtype_is_refused(mask, message):
    model, ids = tiny_model(), random_ids(1, 8)
    cache = model(ids[:, :4], use_cache=True).cache
    with pytest.raises(ValueError, match=message):
        model(ids[:, 4:], cache=cache, attention_mask=mask)


@pytest.mark.parametrize("shape", [(2, 7), (3, 8)], ids=str)
@pytest.mark.parametrize("value", [0, 1])
def test_a_2d_mask_of_another_shape_is_refused_whatever_its_values(shape, value):
    model, ids = tiny_model(), random_ids(2, 8)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, 0] = value
    with pytest.raises(ValueError, match=rf"\[batch, visible tokens\] = \[2, 8\].* got \[{shape[0]}, {shape[1]}\]"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_2d_mask_may_cover_all_rows_of_a_static_cache(implementation):
    model, ids = tiny_model(), random_ids(2, 8)
    model.set_attn_implementation(implementation)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    is_token = mask[:, :8] == 1
    logits = model(ids, attention_mask=mask, cache=StaticCache(model.config, max_cache_len=12)).logits
    assert relative_error(logits[is_token], model(ids, attention_mask=mask[:, :8]).logits[is_token]) < 1e-5


CACHES = {
    "DynamicCache": lambda config: DynamicCache(),
    "DynamicCache of the config": lambda config: DynamicCache(config=config),
    "LatentCache": LatentCache,
    "int8": lambda config: LatentCache(config, cache_dtype="int8"),
    "static": lambda config: LatentCache(config, max_cache_len=12),
}


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(
    ("implementation", "absorb"), [("sdpa", True), ("sdpa", False), ("eager", False), ("flex_attention", True)]
)
@torch.no_grad()
def test_a_prompt_in_chunks_may_have_the_mask_of_the_whole_prompt(implementation, absorb, make, monkeypatch):
    if not absorb:
        monkeypatch.setattr("deepseek_latent.attention.attention.absorbing_is_cheaper", lambda *args, **kwargs: False)
    model, ids = tiny_model(), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 7] = 0
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    cache = make(model.config)
    chunks = [model(chunk, attention_mask=mask, cache=cache).logits for chunk in ids.split([4, 1, 4], dim=1)]
    is_token = mask == 1
    limit = 0.05 if getattr(cache, "cache_dtype", None) == "int8" else 1e-5
    assert relative_error(torch.cat(chunks, dim=1)[is_token], expected[is_token]) < limit


@pytest.mark.parametrize("options", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
def test_a_2d_mask_longer_than_the_tokens_is_refused_without_a_cache(options):
    with pytest.raises(ValueError, match=r"\[batch, visible tokens\] = \[2, 8\].* got \[2, 9\]"):
        tiny_model()(random_ids(2, 8), attention_mask=torch.ones(2, 9), **options)


@pytest.mark.parametrize("make", [lambda config: None, *CACHES.values()], ids=["no cache", *CACHES])
@torch.no_grad()
def test_generate_refuses_a_mask_longer_than_the_prompt(make):
    model, mask = tiny_model(), torch.ones(2, 9, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask must cover the 8 tokens of the prompt, got 9; cut it"):
        model.generate(random_ids(2, 8), attention_mask=mask, cache=make(model.config), max_new_tokens=2)


@pytest.mark.parametrize(
    "make", [lambda config: DynamicCache(config=config), LatentCache], ids=["DynamicCache", "ours"]
)
@torch.no_grad()
def test_a_stage_without_the_first_layer_takes_a_4d_mask_over_its_own_tokens(make):
    model, embeds = tiny_model(), torch.randn(1, 6, 72, generator=torch.Generator().manual_seed(3))
    model.model.layers[0] = torch.nn.Identity()
    model.model.layers[0].forward = lambda hidden, **kwargs: hidden
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    expected = model(inputs_embeds=embeds, attention_mask=causal, use_cache=False).logits
    cache = make(model.config)
    parts = []
    for part, mask in ((slice(0, 4), causal[:, :, :4, :4]), (slice(4, 6), causal[:, :, 4:])):
        positions = torch.arange(6)[None, part]
        inputs = {"inputs_embeds": embeds[:, part], "attention_mask": mask, "position_ids": positions}
        parts.append(model(**inputs, cache=cache).logits)
    assert cache.layers[0].get_seq_length() == 0
    assert relative_error(torch.cat(parts, dim=1), expected) < 1e-5


def test_a_query_sees_the_tokens_held_up_to_itself_but_no_padding_and_no_row_after_them():
    # 5 of 8 rows are held; the padding mask covers 4 of them, and what it does not cover is no padding
    latents = Latents(SplitSegment(torch.empty(2, 8, 3), torch.empty(2, 8, 2)), num_held=torch.tensor(5))
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    mask = held_tokens_mask(padding, 2, latents)
    sees = [[[2, 3], [2, 3, 4]], [[0, 1, 2, 3], [0, 1, 2, 3, 4]]]
    assert [[row.nonzero().flatten().tolist() for row in one[0]] for one in mask] == sees
