"""The logits are the same with and without a cache, however tokens are split into steps, and with any mask."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import flash_attention_mask

from deepseek_latent import LatentCache
from deepseek_latent.attention.attention import DeepseekV2Attention
from tests.support import LITE, NATIVE, V2, random_ids, relative_error, tiny_model

LENGTH = 24
SCHEDULES = {
    "token by token": [1] * 24,
    "chunks": [7, 5, 12],
    "prompt then tokens": [20, 1, 1, 1, 1],
    "halves": [12, 12],
}


@pytest.fixture(params=["absorbed", "expanded", "as it chooses"])
def path(request, monkeypatch):
    """Forces one of the two paths through the whole model."""
    if request.param != "as it chooses":
        pick = request.param == "absorbed"
        monkeypatch.setattr("deepseek_latent.attention.attention.absorbing_is_cheaper", lambda *a, **k: pick)
    return request.param


def fed_in(model, ids, schedule, cache=None, mask=None):
    logits, start = [], 0
    for length in schedule:
        end = start + length
        output = model(
            ids[:, start:end],
            cache=cache,
            use_cache=True,
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end],
        )
        cache = output.cache
        logits.append(output.logits)
        start = end
    return torch.cat(logits, dim=1), cache


def left_padded(ids, padding):
    """Mask [b s] and ids in which sequence i starts after `padding[i]` pads."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
        ids[row, :count] = 0
    return ids, mask


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", [V2, LITE], ids=["V2", "Lite"])
@torch.no_grad()
def test_cached_equals_uncached(variant, schedule, path):
    model, ids = tiny_model(**variant), random_ids(2, LENGTH)
    expected = model(ids, use_cache=False).logits
    actual, cache = fed_in(model, ids, SCHEDULES[schedule])
    assert isinstance(cache, LatentCache)
    assert relative_error(actual, expected) < 1e-5


@pytest.fixture
def _one_thread():
    """Uses one thread: torch 2.10's flex kernel aborts on several CPU threads if new memory is filled with NaN."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()
def test_every_attention_implementation_gives_the_same(implementation):
    model, ids = tiny_model(), random_ids(2, LENGTH)
    ids, mask = left_padded(ids, (0, 5))
    expected, _ = fed_in(model, ids, [LENGTH], mask=mask)
    model.set_attn_implementation(implementation)
    for schedule in ([LENGTH], [20, 1, 1, 2]):
        actual, _ = fed_in(model, ids, schedule, mask=mask)
        visible = mask[:, : sum(schedule)].bool()
        assert relative_error(actual[visible], expected[visible]) < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_left_padding_does_not_change_the_logits_of_tokens(schedule, path):
    model, ids = tiny_model(), random_ids(3, LENGTH)
    padding = (0, 3, 9)
    alone = [model(ids[[row], count:]).logits[0] for row, count in enumerate(padding)]
    ids, mask = left_padded(ids, padding)
    batched, _ = fed_in(model, ids, SCHEDULES[schedule], mask=mask)
    for row, count in enumerate(padding):
        assert relative_error(batched[row, count:], alone[row]) < 1e-5


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
@torch.no_grad()
def test_a_4d_mask_decides_what_is_attended_to(kind, path):
    """Puts two sequences that share their first 10 tokens into one row, as a tree."""
    model, ids = tiny_model(), random_ids(1, 20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[15:, 10:15] = False
    positions = torch.cat((torch.arange(15), torch.arange(10, 15)))[None]
    other = torch.cat((ids[:, :10], ids[:, 15:]), dim=1)
    given = mask[None, None]
    if kind == torch.float32:
        given = torch.zeros(1, 1, 20, 20).masked_fill(~given, torch.finfo(torch.float32).min)
    logits = model(ids, attention_mask=given, position_ids=positions).logits
    assert relative_error(logits[:, :15], model(ids[:, :15]).logits) < 1e-5
    assert relative_error(logits[:, 15:], model(other).logits[:, 10:]) < 1e-5


@torch.no_grad()
def test_a_cropped_cache_continues_as_if_the_tokens_had_never_come(path):
    model, ids = tiny_model(), random_ids(2, LENGTH)
    _, cache = fed_in(model, ids, [LENGTH])
    cache.crop(-10)
    other = random_ids(2, 10, seed=7)
    expected = model(torch.cat((ids[:, :14], other), dim=1)).logits[:, 14:]
    assert relative_error(model(other, cache=cache).logits, expected) < 1e-5


@torch.no_grad()
def test_reordered_sequences_continue_from_their_own_past(path):
    model, ids = tiny_model(), random_ids(3, LENGTH)
    _, cache = fed_in(model, ids[:, :20], [20])
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    logits = model(ids[:, 20:], cache=cache).logits
    expected = model(torch.cat((ids[order, :20], ids[:, 20:]), dim=1)).logits[:, 20:]
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize(
    "make",
    [DynamicCache, lambda: StaticCache(NATIVE.DeepseekV2Config(**copy.deepcopy(V2)), max_cache_len=40)],
    ids=["dynamic", "static"],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_transformers_own_caches_give_the_same_logits(make, schedule, path):
    model, ids = tiny_model(), random_ids(2, LENGTH)
    expected = model(ids, use_cache=False).logits
    actual, _ = fed_in(model, ids, SCHEDULES[schedule], cache=make())
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("schedule", [[LENGTH], [20, 1, 3]], ids=str)
def test_output_attentions_are_the_weights_that_were_used(implementation, schedule):
    model, ids = tiny_model(), random_ids(2, LENGTH)
    model.set_attn_implementation(implementation)
    ids, mask = left_padded(ids, (0, 4))
    cache, start = None, 0
    for length in schedule:
        end = start + length
        with torch.no_grad():
            output = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                cache=cache,
                use_cache=True,
                output_attentions=True,
            )
        cache = output.cache
        assert [tuple(x.shape) for x in output.attentions] == [(2, 3, length, end)] * 3
        seen = mask[:, None, start:end].expand(-1, 3, -1).bool()
        for weights in output.attentions:
            torch.testing.assert_close(weights.sum(-1)[seen], torch.ones(int(seen.sum())))
            assert (weights[1, ..., :4] == 0).all()
            future = torch.ones(length, end, dtype=torch.bool).triu(start + 1)
            assert (weights.masked_select(future) == 0).all()
        start = end


@pytest.fixture
def users_function(monkeypatch):
    """Registers an attention function as a user would, with the masks that transformers makes for flash attention."""
    calls = []

    def attend(module, query, key, value, attention_mask, *, scaling, **kwargs):
        calls.append(query.shape[2])
        s, t = query.shape[2], key.shape[2]
        visible = torch.ones(s, t, dtype=torch.bool).tril(t - s)[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None].bool()
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling)
        return context.transpose(1, 2), None

    # both interfaces are global, so monkeypatch adds the entries and removes them after the test
    monkeypatch.setitem(AttentionInterface._global_mapping, "users_own", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "users_own", flash_attention_mask)
    return calls


@torch.no_grad()
def test_a_users_function_gets_many_queries_and_decoding_still_absorbs(users_function):
    model, ids = tiny_model(), random_ids(2, LENGTH)
    ids, mask = left_padded(ids, (0, 5))
    expected, _ = fed_in(model, ids, [LENGTH], mask=mask)
    model.set_attn_implementation("users_own")
    actual, _ = fed_in(model, ids, [18, 1, 4, 1], mask=mask)
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < 1e-5
    assert users_function == [18] * 3 + [4] * 3


@torch.no_grad()
def test_output_attentions_with_a_users_function_are_causal_although_its_mask_is_not(users_function):
    model, ids = tiny_model(), random_ids(2, LENGTH)
    ids, mask = left_padded(ids, (0, 5))
    expected, _ = fed_in(model, ids, [LENGTH], mask=mask)
    model.set_attn_implementation("users_own")
    cache, start = None, 0
    for end in (12, 20, 24):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        output = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions,
            cache=cache,
            use_cache=True,
            output_attentions=True,
        )
        cache, seen = output.cache, mask[:, start:end].bool()
        assert relative_error(output.logits[seen], expected[:, start:end][seen]) < 1e-5
        future = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
        assert all((weights.masked_select(future) == 0).all() for weights in output.attentions)
        start = end
    assert not users_function


def test_flex_attention_over_a_static_cache_is_refused():
    model, ids = tiny_model(), random_ids(1, 8)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention cannot read a StaticCache"):
        model(ids, cache=StaticCache(model.config, max_cache_len=16))


def test_chunks_of_a_sequence_train_as_the_whole_does():
    """This includes `kv_b_proj`, whose input is the cached latents."""
    model, ids = tiny_model(), random_ids(1, LENGTH)
    model.requires_grad_(False)
    weight = model.model.layers[0].self_attn.kv_b_proj.weight.requires_grad_(True)
    logits, _ = fed_in(model, ids, [9, 15])
    (chunked,) = torch.autograd.grad(logits.square().sum(), weight)
    (whole,) = torch.autograd.grad(model(ids).logits.square().sum(), weight)
    assert relative_error(chunked, whole) < 1e-5


def test_an_unknown_attention_function_is_refused_by_name():
    with pytest.raises(ValueError, match="no_such_attention"):
        tiny_model().set_attn_implementation("no_such_attention")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_dropout_acts_only_in_training(implementation):
    model, ids = tiny_model(attention_dropout=0.5), random_ids(2, LENGTH)
    model.set_attn_implementation(implementation)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)


@torch.no_grad()
def test_decoding_absorbs_and_prefill_expands(monkeypatch):
    from deepseek_latent.attention import attention as latent_attention

    calls = []
    for name in ("absorbed_attention", "expanded_attention"):
        original = getattr(latent_attention, name)
        monkeypatch.setattr(
            latent_attention,
            name,
            lambda *a, name=name, original=original, **k: calls.append(name) or original(*a, **k),
        )
    model, ids = tiny_model(), random_ids(1, 8)
    cache = model(ids, use_cache=True).cache
    assert calls == ["expanded_attention"] * 3
    model(ids[:, :1], cache=cache)
    assert calls[3:] == ["absorbed_attention"] * 3


def test_expand_kv_gives_keys_and_values_of_all_heads():
    attention = tiny_model().model.layers[0].self_attn
    assert isinstance(attention, DeepseekV2Attention)
    keys, values = attention.expand_kv(torch.randn(2, 1, 5, 40), torch.randn(2, 1, 5, 8))
    assert keys.shape == (2, 3, 5, 24)
    assert values.shape == (2, 3, 5, 24)
