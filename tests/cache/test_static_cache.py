"""A static LatentCache has buffers that never move, and counts its tokens on the host or on the device."""

import copy
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig
from transformers.cache_utils import StaticLayer

from deepseek_latent import LatentCache
from deepseek_latent.cache.static_layer import TokenCount
from tests.support import LITE, V2, random_ids, relative_error, tiny_model

B, C, R, ROOM = 2, V2["kv_lora_rank"], V2["qk_rope_head_dim"], 24
CACHE_DTYPES = [None, "int8", "int6", "int4", "fp8"]
PADDING = torch.ones(B, ROOM, dtype=torch.long)
PADDING[0, :5] = 0


@functools.cache
def model():
    return tiny_model()


def static(**options) -> LatentCache:
    return LatentCache(model().config, max_cache_len=ROOM, **options)


def tokens(length: int, batch: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 1, length, C), torch.randn(batch, 1, length, R)


def filled(length: int, **options) -> tuple[LatentCache, LatentCache]:
    """A static cache and a growing one with the same tokens."""
    caches = static(**options), LatentCache(model().config, **options)
    for layer in range(model().config.num_hidden_layers):
        new = tokens(length)
        for cache in caches:
            cache.update(*new, layer)
    return caches


def assert_same(cache: LatentCache, twin: LatentCache) -> None:
    assert cache.get_seq_length() == twin.get_seq_length()
    for layer, other in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(layer.rows(), other.rows())


OPERATIONS = {
    "update": lambda cache, new: [cache.update(*new, layer) for layer in range(3)],
    "crop": lambda cache, new: cache.crop(-4),
    "reorder": lambda cache, new: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache, new: cache.batch_repeat_interleave(2),
    "select": lambda cache, new: cache.batch_select_indices(torch.tensor([1])),
    "offload, then update": lambda cache, new: [
        (layer.offload(), layer.prefetch(), layer.update(*new)) for layer in cache.layers
    ],
}


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_leaves_what_a_growing_cache_holds(operation, cache_dtype):
    cache, twin = filled(9, cache_dtype=cache_dtype)
    new = tokens(2)
    for one in (cache, twin):
        OPERATIONS[operation](one, new)
    assert_same(cache, twin)


@pytest.mark.parametrize("operation", ["update", "crop", "reorder"])
def test_buffers_never_move(operation):
    cache, _ = filled(9)
    before = [layer._buffer.data_ptr() for layer in cache.layers]
    OPERATIONS[operation](cache, tokens(2))
    cache.reset()
    OPERATIONS["update"](cache, tokens(2))
    assert [layer._buffer.data_ptr() for layer in cache.layers] == before
    assert cache.get_seq_length() == 2


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, LITE], ids=["V2", "Lite"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_a_recorded_step_gives_the_logits_of_a_plain_one(cache_dtype, padded, new, overrides):
    subject, ids = tiny_model(**overrides), random_ids(B, 17)
    caches = static(cache_dtype=cache_dtype), LatentCache(subject.config, cache_dtype=cache_dtype)

    def logits(cache, first, last):
        mask = {"attention_mask": PADDING[:, :last]} if padded else {}
        return subject(ids[:, first:last], cache=cache, **mask).logits

    for cache in caches:
        logits(cache, 0, 11)
    with caches[0].count.recorded():
        recorded = [logits(caches[0], 11, 11 + new), logits(caches[0], 11 + new, 12 + new)]
    plain = [logits(caches[1], 11, 11 + new), logits(caches[1], 11 + new, 12 + new)]
    # both use absorbed attention, one of them over a whole buffer
    assert max(map(relative_error, recorded, plain)) < 1e-5
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 12 + new
    # the host continues from there
    assert relative_error(logits(caches[0], 12 + new, 13 + new), logits(caches[1], 12 + new, 13 + new)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("on_host", ["a plain step", "crop", "reset"])
def test_a_recorded_step_counts_what_the_host_changed_since_the_last_recorded_one(on_host):
    cache, ids = static(), random_ids(B, 12)
    model()(ids[:, :7], cache=cache)
    with cache.count.recorded():
        model()(ids[:, 7:8], cache=cache)
    if on_host == "a plain step":
        model()(ids[:, 8:10], cache=cache)
    elif on_host == "crop":
        cache.crop(-3)
    else:
        cache.reset()
        model()(ids[:, :4], cache=cache)
    held = cache.get_seq_length()
    with cache.count.recorded():
        actual = model()(ids[:, held : held + 1], cache=cache).logits
    assert relative_error(actual, model()(ids[:, : held + 1], use_cache=False).logits[:, -1:]) < 1e-5
    assert cache.get_seq_length() == held + 1


class Waiting(TorchDispatchMode):
    """Records the calls that would make the host wait for the device, or read a size from it."""

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique"):
            self.met.append(name)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_a_recorded_step_waits_for_nothing(cache_dtype, padded):
    # half precision, in which torch's grouped products do not read where experts end
    subject, ids = tiny_model(torch.bfloat16), random_ids(B, 12)
    cache = static(cache_dtype=cache_dtype)
    subject(ids[:, :11], cache=cache)
    mask = {"attention_mask": PADDING} if padded else {}
    with cache.count.recorded(), Waiting() as waiting:
        cache.count.to_device(ids.device)
        subject(ids[:, 11:], cache=cache, **mask)
        cache.count.advance_on_host(1)
    assert waiting.met == []
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_generate_does_not_ask_the_device_for_the_length(monkeypatch):
    """Between the prompt and the last token, steps are compiled for all lengths."""
    asked = []
    monkeypatch.setattr(TokenCount, "to_host", lambda count: asked.append(count.is_host_current))
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    expected = model().generate(random_ids(B, 5), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    asked.clear()
    from_static = model().generate(
        random_ids(B, 5),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="static",
        compile_config=compiled,
    )
    assert torch.equal(from_static, expected)
    assert asked
    assert all(asked)


@pytest.mark.skipif(
    not hasattr(StaticLayer, "crop"), reason="this transformers refuses prompt lookup with a static cache"
)
def test_a_smaller_max_cache_len_leaves_room_for_the_drafts_of_prompt_lookup():
    # a new model, because transformers makes no static cache that is smaller than an earlier one of the same model
    subject, ids = tiny_model(), random_ids(1, 4).repeat(1, 3)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"prompt_lookup_num_tokens": 4, "return_dict_in_generate": True}
    output = subject.generate(ids, **options, cache_implementation="static", max_cache_len=5)
    assert torch.equal(output.sequences, subject.generate(ids, **options).sequences)
    assert output.cache.max_cache_len == 12 + 9 - 1 + 4


def test_a_copy_is_independent():
    cache, twin = filled(9)
    other = copy.deepcopy(cache)
    OPERATIONS["update"](other, tokens(3))
    other.crop(-1)
    assert_same(cache, twin)
    assert other.get_seq_length() == 11
    assert other.count is other.layers[0].count is other.layers[1].count is not cache.count


def test_it_allocates_its_whole_buffer_and_holds_the_tokens_only():
    cache, _ = filled(9)
    assert cache.nbytes == B * 9 * 3 * (C + R) * 4
    assert f"{B * ROOM * 3 * (C + R) * 4:,} allocated" in repr(cache)


@torch.no_grad()
def test_what_does_not_fit_is_refused_and_nothing_is_lost():
    cache = static()
    model()(random_ids(B, ROOM - 1), cache=cache)
    held = [layer.rows().clone() for layer in cache.layers]
    with pytest.raises(ValueError, match=f"room for {ROOM} tokens and would have to hold {ROOM + 1}"):
        model()(random_ids(B, 2), cache=cache)
    with pytest.raises(ValueError, match=f"room for {ROOM} tokens and would have to hold {ROOM + 1}"):
        cache.update(*tokens(2), 0)
    with pytest.raises(ValueError, match=f"room for {ROOM} tokens and would have to hold"):
        model().generate(random_ids(B, ROOM), max_new_tokens=5, cache=cache)
    assert all(torch.equal(layer.rows(), rows) for layer, rows in zip(cache.layers, held))
    model()(random_ids(B, 1), cache=cache)
    assert cache.get_seq_length() == ROOM


def test_wider_tokens_are_refused():
    cache = static()
    cache.update(*(x.bfloat16() for x in tokens(2)), 0)
    with pytest.raises(ValueError, match=r"holds torch\.bfloat16, the new tokens are torch\.float32"):
        cache.update(*tokens(2), 0)


@torch.no_grad()
@pytest.mark.parametrize("forget", [lambda cache: cache.reset(), lambda cache: cache.crop(-11)], ids=["reset", "crop"])
def test_forgotten_rows_do_not_reach_the_output(forget):
    cache, ids = static(), random_ids(B, 12)
    for layer in range(3):
        cache.update(*(torch.full_like(x, torch.nan) for x in tokens(11)), layer)
    forget(cache)
    model()(ids[:, :11], cache=cache)
    cache.crop(-6)
    with cache.count.recorded():
        actual = model()(ids[:, 5:6], cache=cache).logits
    assert relative_error(actual, model()(ids[:, :6], use_cache=False).logits[:, -1:]) < 1e-5


@torch.no_grad()
def test_rows_that_two_crops_forgot_do_not_reach_the_output():
    cache, ids = static(), random_ids(B, 6)
    model()(ids[:, :5], cache=cache)
    for layer in range(3):
        cache.update(*(torch.full_like(x, torch.nan) for x in tokens(6)), layer)
    cache.crop(-4)
    cache.crop(-2)
    with cache.count.recorded():
        actual = model()(ids[:, 5:], cache=cache).logits
    assert relative_error(actual, model()(ids, use_cache=False).logits[:, -1:]) < 1e-5


@torch.no_grad()
def test_a_recorded_step_that_did_not_finish_is_counted_nowhere_once_it_is_undone():
    cache, ids = static(), random_ids(B, 8)
    model()(ids[:, :7], cache=cache)
    with cache.count.recorded():
        model()(ids[:, 7:], cache=cache)
    cache.count.undo()
    assert cache.get_seq_length() == 7
    with cache.count.recorded():
        actual = model()(ids[:, 7:], cache=cache).logits
    assert relative_error(actual, model()(ids, use_cache=False).logits[:, -1:]) < 1e-5
    assert cache.get_seq_length() == 8


def test_a_cache_made_in_inference_mode_continues_outside_it():
    cache, ids = static(), random_ids(B, 12)
    expected = model()(ids, use_cache=False).logits
    with torch.inference_mode(), cache.count.recorded():
        model()(ids[:, :9], cache=cache)
    with torch.no_grad():
        model()(ids[:, 9:10], cache=cache)
        with cache.count.recorded():
            actual = [model()(ids[:, i : i + 1], cache=cache).logits for i in (10, 11)]
    assert relative_error(torch.cat(actual, dim=1), expected[:, 10:]) < 1e-5
    cache.crop(-3)
    assert cache.get_seq_length() == 9


def test_gradients_are_refused_and_nothing_is_written():
    cache = static()
    with pytest.raises(ValueError, match="carries no gradient"):
        model()(random_ids(B, 4), cache=cache)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_recorded_step_refuses_a_cache_whose_layers_differ_in_length():
    cache = static()
    model()(random_ids(B, 4), cache=cache)
    cache.update(*tokens(1), 0)
    with cache.count.recorded(), pytest.raises(ValueError, match="holds 5 tokens in one layer and 4 in another"):
        model()(random_ids(B, 1), cache=cache)


@pytest.mark.parametrize("room", [0, -3, True, 2.5, "64"], ids=repr)
def test_max_cache_len_is_a_positive_number_of_tokens(room):
    with pytest.raises(ValueError, match="max_cache_len must be a number of tokens, at least 1"):
        LatentCache(model().config, max_cache_len=room)


def test_a_static_cache_cannot_be_offloaded():
    with pytest.raises(ValueError, match=r"moves and a static one must not|CUDA"):
        static(offloading=True)
