"""Inputs of the wrong shape, dtype or value are refused in one sentence, before anything is computed or written."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from deepseek_latent import LatentCache
from tests.support import random_ids, tiny_model

MODEL = tiny_model()
IDS = random_ids(2, 9)
HELD = 4
CAUSAL = torch.ones(5, 9, dtype=torch.bool).tril(HELD)[None, None].expand(2, 1, -1, -1)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])


@pytest.fixture
def model():
    yield MODEL
    MODEL.set_attn_implementation("sdpa")


def message_of(caught) -> str:
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 400
    return text


WRONG_IDS = {
    "an empty batch": (IDS[:0], r"at least one sequence of at least one token, got input_ids of shape \[0, 9\]"),
    "no tokens": (IDS[:, :0], r"at least one sequence of at least one token, got input_ids of shape \[2, 0\]"),
    "rank 1": (IDS[0], r"token ids \[b s\], got shape \[9\]; a single sequence is ids\[None\]"),
    "rank 3": (IDS[None], r"got shape \[1, 2, 9\]"),
    "floats": (IDS.float(), "as integers, got shape .* of torch.float32"),
    "booleans": (IDS.bool(), "as integers, got shape .* of torch.bool"),
    "int16": (IDS.short(), r"in torch.int64 or torch.int32, got torch.int16; use ids.long\(\)"),
    "a list": (IDS.tolist(), r"in a tensor \[b t\], got list"),
    "a negative id": (IDS - 50, "expected ids from 0 to 95, got -"),
    "a large id": (IDS * 100, r"expected ids from 0 to 95, got \d"),
}


@pytest.mark.parametrize(("ids", "sentence"), WRONG_IDS.values(), ids=WRONG_IDS)
@pytest.mark.parametrize("use", [MODEL, MODEL.generate], ids=["forward", "generate"])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_wrong_ids_are_refused(ids, sentence, use, cached):
    cache = LatentCache(MODEL.config)
    if cached:
        MODEL(IDS[:, :HELD], cache=cache)
    options = {"cache": cache} if use is MODEL else {"max_new_tokens": 2}
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        use(ids, **options)
    message_of(caught)
    assert cache.get_seq_length() == (HELD if cached else 0)


WRONG_INPUTS = {
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 9, 72)}, "expected exactly one of"),
    "none": ({}, "expected exactly one of"),
    "width": ({"inputs_embeds": torch.zeros(2, 9, 71)}, r"with d = 72, got shape \[2, 9, 71\]"),
    "rank": ({"inputs_embeds": torch.zeros(9, 72)}, r"with d = 72, got shape \[9, 72\]"),
    "dtype": ({"inputs_embeds": torch.zeros(2, 9, 72).long()}, "of torch.int64"),
    "no embeddings": ({"inputs_embeds": torch.zeros(2, 0, 72)}, "at least one token"),
    "short labels": ({"input_ids": IDS, "labels": IDS[:, :5]}, r"\[2, 9\] as integers.* got shape \[2, 5\]"),
    "other batch": ({"input_ids": IDS, "labels": IDS[:1]}, r"\[2, 9\] as integers.* got shape \[1, 9\]"),
    "float labels": ({"input_ids": IDS, "labels": IDS.float()}, "of torch.float32"),
    "large labels": (
        {"input_ids": IDS, "labels": IDS + 900},
        r"labels from 0 to 95, or -100, which is ignored, got 9\d\d",
    ),
    "negative labels": ({"input_ids": IDS, "labels": IDS * 0 - 5}, "labels from 0 to 95, or -100, .* ignored, got -5;"),
    "fewer logits": ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 3}, r"\[2, 3\] as integers.* shape \[2, 9\]"),
    "few positions": ({"input_ids": IDS, "position_ids": IDS[:, :4]}, r"\[2 9\] or \[1 9\], got shape \[2, 4\]"),
    "few positions of one": ({"input_ids": IDS[:1], "position_ids": IDS[:1, :4]}, r"= \[1 9\], got shape \[1, 4\]"),
    "positions of three": ({"input_ids": IDS, "position_ids": torch.arange(27).view(3, 9)}, r"got shape \[3, 9\]"),
}


@pytest.mark.parametrize(("inputs", "sentence"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_wrong_inputs_are_refused(inputs, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        MODEL(**inputs)
    message_of(caught)


def test_ignored_labels_and_short_labels_for_the_logits_kept_are_right():
    labels = IDS.clone()
    labels[:, :3] = -100
    assert MODEL(IDS, labels=labels).loss.isfinite()
    assert MODEL(IDS, labels=labels[:, -3:], logits_to_keep=3).loss.isfinite()


def test_an_index_error_of_a_hook_stays_what_it_is():
    def fail(*seen):
        raise IndexError("of the hook")

    hook = MODEL.model.embed_tokens.register_forward_hook(fail)
    try:
        with pytest.raises(IndexError, match="of the hook"):
            MODEL(IDS)
    finally:
        hook.remove()


WRONG_MASKS = {
    "a dict": ({"full_attention": CAUSAL}, "must be a tensor .* got dict"),
    "a list": ([[1] * 9] * 2, "must be a tensor .* got list"),
    "rank 1": (torch.ones(9), r"\[b t\] = \[2 9\] or \[b 1 s t\] = \[2 1 5 9\], got shape \[9\]"),
    "rank 3": (CAUSAL[:, 0], r"got shape \[2, 5, 9\]"),
    "short": (torch.ones(2, 8), r"\[batch, visible tokens\] = \[2, 9\].* got \[2, 8\]"),
    "another batch": (torch.ones(3, 9), r"\[batch, visible tokens\] = \[2, 9\].* got \[3, 9\]"),
    "elsewhere": (torch.ones(2, 9, device="meta"), "expected attention_mask on cpu, got one on meta"),
    "4-D, fewer tokens": (CAUSAL[..., :8], "must cover all 9 visible tokens, cached or new, got 8"),
    "4-D, one token": (CAUSAL[..., :1], "must cover all 9 visible tokens, cached or new, got 1"),
    "4-D, other queries": (CAUSAL[:, :, :4], r"\[2 3 5 9\], .* got \[2, 1, 4, 9\]"),
    "4-D, another batch": (CAUSAL[:1].expand(3, -1, -1, -1), r"\[2 3 5 9\], .* got \[3, 1, 5, 9\]"),
    "4-D, other heads": (CAUSAL.expand(-1, 2, -1, -1), r"\[2 3 5 9\], .* got \[2, 2, 5, 9\]"),
    "4-D, integers": (CAUSAL.long(), "boolean or additive in floating point, got torch.int64"),
    "4-D, elsewhere": (CAUSAL.to("meta"), "expected attention_mask on cpu, got one on meta"),
    "a BlockMask": (
        create_block_mask(lambda b, h, q, k: q + HELD >= k, 2, None, 5, 8, device="cpu"),
        "must cover all 9 visible tokens, cached or new, got 8",
    ),
}


@IMPLEMENTATIONS
@pytest.mark.parametrize(("mask", "sentence"), WRONG_MASKS.values(), ids=WRONG_MASKS)
@torch.no_grad()
def test_wrong_masks_are_refused_before_anything_is_written(mask, sentence, implementation, model):
    for options in ({}, {"cache_dtype": "int8"}, {"max_cache_len": 12}):
        cache = LatentCache(model.config, **options)
        model.set_attn_implementation("sdpa")
        model(IDS[:, :HELD], cache=cache)
        model.set_attn_implementation(implementation)
        # nothing of a cache that refuses to be written to can be half written
        for layer in cache.layers:
            layer.update = None
        with pytest.raises((ValueError, TypeError), match=sentence) as caught:
            model(IDS[:, HELD:], cache=cache, attention_mask=mask)
        message_of(caught)
        assert cache.get_seq_length() == HELD


RIGHT_MASKS = {
    "boolean": CAUSAL,
    "additive": torch.zeros(2, 1, 5, 9).masked_fill(~CAUSAL, torch.finfo(torch.float32).min),
    "for all sequences": CAUSAL[:1],
    "for each head": CAUSAL.expand(-1, 3, -1, -1),
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("absorb", [True, False], ids=["absorbed", "expanded"])
@pytest.mark.parametrize("mask", RIGHT_MASKS.values(), ids=RIGHT_MASKS)
@torch.no_grad()
def test_every_kind_of_causal_mask_gives_the_same(mask, absorb, implementation, model, monkeypatch):
    if not absorb:
        monkeypatch.setattr("deepseek_latent.attention.attention.absorbing_is_cheaper", lambda *args, **kwargs: False)
    expected = model(IDS).logits[:, HELD:]
    cache = LatentCache(model.config)
    model(IDS[:, :HELD], cache=cache)
    model.set_attn_implementation(implementation)
    actual = model(IDS[:, HELD:], cache=cache, attention_mask=mask).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
