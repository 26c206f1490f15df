"""A step is all or nothing: when a call of the model does not return, its cache holds what it held before."""

import contextlib
import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from deepseek_latent import LatentCache
from deepseek_latent.cache.format import CACHE_DTYPES
from deepseek_latent.compat.cache_name import CACHE
from tests.support import random_ids, relative_error, tiny_model

PACKAGE = sys.modules["deepseek_latent"].__file__.rpartition("/")[0]
HELD = 7
IDS = random_ids(2, 12)
MODEL = tiny_model()
CACHES = {
    **{f"LatentCache {x}": lambda x=x: LatentCache(MODEL.config, cache_dtype=x) for x in CACHE_DTYPES},
    "static LatentCache": lambda: LatentCache(MODEL.config, max_cache_len=20),
    "static int8": lambda: LatentCache(MODEL.config, max_cache_len=20, cache_dtype="int8"),
    "DynamicCache": lambda: DynamicCache(config=MODEL.config),
    "lazy DynamicCache": DynamicCache,
    "StaticCache": lambda: StaticCache(MODEL.config, max_cache_len=20),
}
EVERY_CACHE = pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
PLACES = [
    "model.layers.0.self_attn.kv_a_proj_with_mqa",
    "model.layers.1.mlp",
    "model.layers.2",
    "model.norm",
    "lm_head",
]
PLACES += ["model", ""]


class Stop(Exception):
    pass


@contextlib.contextmanager
def failing(place: str, model=MODEL, error: type[BaseException] = Stop):
    """Inside, the call of a module fails after it has computed."""

    def fail(*seen):
        raise error

    hook = model.get_submodule(place).register_forward_hook(fail)
    try:
        with pytest.raises(error):
            yield
    finally:
        hook.remove()


def lengths(cache) -> list[int]:
    return [int(layer.get_seq_length()) for layer in cache.layers]


@EVERY_CACHE
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_step_that_fails_can_be_tried_again(make, place):
    expected, cache = make(), make()
    for each in (expected, cache):
        MODEL(IDS[:, :HELD], cache=each)
    with failing(place, error=KeyboardInterrupt):
        MODEL(IDS[:, HELD:10], cache=cache)
    assert lengths(cache) == [HELD] * 3
    for first, last in ((HELD, 10), (10, 11)):
        wanted = MODEL(IDS[:, first:last], cache=expected).logits
        assert torch.equal(MODEL(IDS[:, first:last], cache=cache).logits, wanted)


@EVERY_CACHE
@torch.no_grad()
def test_after_a_first_step_that_fails_another_batch_may_come(make):
    cache = make()
    with failing("model.layers.1"):
        MODEL(IDS, cache=cache)
    assert set(lengths(cache)) <= {0}
    assert torch.equal(MODEL(IDS[:1], cache=cache).logits, MODEL(IDS[:1], cache=make()).logits)


@torch.no_grad()
def test_a_step_may_be_stopped_at_any_line():
    expected = MODEL(IDS[:, : HELD + 2]).logits[:, HELD:]
    cache, line, was_stopped = LatentCache(MODEL.config), 0, True
    MODEL(IDS[:, :HELD], cache=cache)

    def trace(frame, event, argument):
        nonlocal line
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            line -= 1
            if line == 0:
                raise KeyboardInterrupt
        return trace

    start = 1
    while was_stopped:
        line, was_stopped = start, False
        sys.settrace(trace)
        try:
            MODEL(IDS[:, HELD : HELD + 2], cache=cache)
        except KeyboardInterrupt:
            was_stopped = True
        finally:
            sys.settrace(None)
        if was_stopped:
            assert lengths(cache) == [HELD] * 3, start
            start += 7
    assert start > 200
    cache.crop(-2)
    assert relative_error(MODEL(IDS[:, HELD : HELD + 2], cache=cache).logits, expected) < 1e-5


@torch.no_grad()
def test_a_shared_prefix_stays_shared():
    cache = LatentCache(MODEL.config)
    MODEL(IDS[:1, :HELD], cache=cache)
    cache.batch_repeat_interleave(3)
    held, ids = cache.nbytes, random_ids(3, 2, seed=4)
    with failing("lm_head"):
        MODEL(ids, cache=cache)
    assert (lengths(cache), cache.nbytes, cache.batch_size) == ([HELD] * 3, held, 3)
    whole = torch.cat((IDS[:1, :HELD].expand(3, -1), ids), dim=1)
    assert relative_error(MODEL(ids, cache=cache).logits, MODEL(whole).logits[:, HELD:]) < 1e-5


@pytest.mark.parametrize("make", [CACHES["LatentCache None"], CACHES["LatentCache int8"], CACHES["DynamicCache"]])
@torch.no_grad()
def test_a_failed_step_of_a_wider_model_leaves_the_dtype(make):
    narrow, cache = tiny_model(torch.bfloat16), make()
    narrow(IDS[:, :HELD], cache=cache)
    keys = cache.layers[0].keys.clone()
    with failing("model.layers.1"):
        MODEL(IDS[:, HELD:10], cache=cache)
    assert all(torch.equal(layer.keys, keys) for layer in cache.layers[:1])
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
    narrow(IDS[:, HELD:10], cache=cache)
    assert lengths(cache) == [10] * 3


def test_a_failed_step_with_gradients_leaves_no_graph():
    cache = LatentCache(MODEL.config)
    with torch.no_grad():
        MODEL(IDS[:, :HELD], cache=cache)
    with failing("lm_head"):
        MODEL(IDS[:, HELD:], cache=cache)
    assert lengths(copy.deepcopy(cache)) == [HELD] * 3
    MODEL(IDS[:, HELD:], cache=cache).logits.sum().backward()


@torch.no_grad()
def test_a_step_through_an_adapter_is_all_or_nothing():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_b_proj"]))
    cache = LatentCache(model.config)
    model(input_ids=IDS[:, :HELD], cache=cache)
    with failing("base_model.model.lm_head", model):
        model(input_ids=IDS[:, HELD:], cache=cache)
    assert lengths(cache) == [HELD] * 3


@torch.no_grad()
def test_the_body_alone_and_a_positional_cache_are_all_or_nothing():
    cache = LatentCache(MODEL.config)
    MODEL.model(IDS[:, :HELD], None, None, cache)
    with failing("model.norm"):
        MODEL.model(IDS[:, HELD:], None, None, cache)
    assert lengths(cache) == [HELD] * 3


@torch.no_grad()
def test_labels_that_do_not_fit_take_the_step_back():
    cache = LatentCache(MODEL.config)
    MODEL(IDS[:, :HELD], cache=cache)
    with pytest.raises(ValueError, match=r"expected labels \[b s\] = \[2, 5\] as integers.* got shape \[2, 4\]"):
        MODEL(IDS[:, HELD:], labels=IDS[:, HELD:-1], cache=cache)
    assert lengths(cache) == [HELD] * 3


@torch.no_grad()
def test_an_earlier_step_is_not_taken_back_by_a_call_that_is_refused():
    cache = LatentCache(MODEL.config)
    MODEL(IDS[:, :HELD], cache=cache)
    for refused in ({"attention_mask": torch.ones(2, 3)}, {"inputs_embeds": torch.zeros(2, 1, 9)}):
        with pytest.raises(ValueError, match=r"expected exactly one|attention_mask"):
            MODEL(IDS[:, HELD:], cache=cache, **refused)
        assert lengths(cache) == [HELD] * 3


@torch.no_grad()
def test_a_cache_that_cannot_forget_is_refused_until_it_is_reset():
    cache = DynamicCache(config=MODEL.config)
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=64) for _ in range(3)]
    MODEL(IDS[:, :HELD], cache=cache)
    with failing("lm_head"):
        MODEL(IDS[:, HELD:], cache=cache)
    with pytest.raises(ValueError, match="interrupted, and DynamicSlidingWindowLayer cannot remove its tokens"):
        MODEL(IDS[:, HELD:], cache=cache)


@pytest.mark.parametrize("make", [CACHES["LatentCache None"], CACHES["static LatentCache"], CACHES["DynamicCache"]])
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 3}], ids=str)
def test_a_generation_that_is_stopped_leaves_the_tokens_of_its_finished_steps(make, options):
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    seen = []

    def stop(ids, scores):
        seen.append(ids)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return scores

    cache, ids = make(), IDS[:1]
    with pytest.raises(KeyboardInterrupt):
        MODEL.generate(ids, cache=cache, logits_processor=[stop], **greedy, **options)
    (held,) = set(lengths(cache))
    assert held >= 12
    cache.crop(10 - held)
    assert torch.equal(MODEL.generate(ids, cache=cache, **greedy), MODEL.generate(ids, **greedy))


@pytest.mark.parametrize("place", ["model.layers.1", "model.norm"])
@torch.no_grad()
def test_a_recorded_step_that_fails_is_not_counted(place):
    cache = LatentCache(MODEL.config, max_cache_len=20)
    MODEL(IDS[:, :HELD], cache=cache)
    with cache.count.recorded():
        MODEL(IDS[:, HELD : HELD + 1], cache=cache)
        with failing(place):
            MODEL(IDS[:, HELD + 1 : HELD + 2], cache=cache)
        logits = MODEL(IDS[:, HELD + 1 : HELD + 2], cache=cache).logits
    assert relative_error(logits, MODEL(IDS[:, : HELD + 2]).logits[:, -1:]) < 1e-5
    assert lengths(cache) == [HELD + 2] * 3


@torch.no_grad()
def test_a_compiled_step_that_fails_while_it_runs_is_not_counted():
    fails = []

    @torch.library.custom_op("deepseek_latent_tests::may_fail", mutates_args=())
    def may_fail(x: torch.Tensor) -> torch.Tensor:
        if fails:
            raise fails.pop()
        return x.clone()

    may_fail.register_fake(torch.empty_like)
    model = tiny_model(num_hidden_layers=1)
    model.model.norm.forward = lambda x: may_fail(x)
    cache = LatentCache(model.config, max_cache_len=20)
    model(IDS[:, :HELD], cache=cache)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    step(input_ids=IDS[:, HELD : HELD + 1], **{CACHE: cache})
    fails.append(Stop())
    with pytest.raises(Stop):
        step(input_ids=IDS[:, HELD + 1 : HELD + 2], **{CACHE: cache})
    logits = step(input_ids=IDS[:, HELD + 1 : HELD + 2], **{CACHE: cache}).logits
    assert relative_error(logits, model(IDS[:, : HELD + 2]).logits[:, -1:]) < 1e-5
    assert cache.get_seq_length() == HELD + 2
