"""Decoding steps as CUDA graphs: when they are captured, replayed and counted, with a fake graph instead of a GPU."""

import contextlib
import copy

import pytest
import torch

from deepseek_latent import LatentCache
from deepseek_latent.compat.cache_name import CACHE
from deepseek_latent.kernels.gpu.replayed_steps import ReplayedSteps
from tests.support import random_ids, tiny_model

NEW = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
MASK = torch.ones(2, 7, dtype=torch.long)
PADDED = MASK.clone()
PADDED[0, :3] = 0


class Stream:
    def wait_stream(self, other) -> None:
        pass


class Graph:
    """A fake CUDA graph: capturing counts no token, since nothing runs; a replay computes into the captured tensors."""

    steps, cache, fails = None, None, False

    def capture_begin(self, capture_error_mode: str) -> None:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nwith details")
        self.count = self.cache.count
        self.held = self.count.before_step.clone()
        self.inside = contextlib.ExitStack()
        self.inside.enter_context(self.count.recorded())

    def capture_end(self) -> None:
        if not self.fails:
            self.inside.close()
            self.count.before_step.copy_(self.held)

    def replay(self) -> None:
        with self.count.recorded():
            self.steps._logits.copy_(self.steps._step(self.cache).logits)


@pytest.fixture
def model(monkeypatch):
    graph = type("GraphOfThisTest", (Graph,), {})

    class Steps(ReplayedSteps):
        made = []

        def __init__(self, model):
            super().__init__(model)
            self.made.append(self)

        def __call__(self, **inputs):
            graph.steps, graph.cache = self, inputs[CACHE]
            return super().__call__(**inputs)

    for name, stub in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    model = copy.deepcopy(tiny_model())
    model.replayed_steps = Steps
    # transformers asks whether the device is one that compiles, too
    monkeypatch.setattr(
        type(model),
        "_valid_auto_compile_criteria",
        lambda self, kwargs, config: CACHE in kwargs and kwargs[CACHE].is_compileable,
    )
    model.graph, model.steps = graph, Steps
    return model


@pytest.mark.parametrize("mask", [None, MASK, PADDED], ids=["no mask", "ones", "padded"])
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_replayed_steps_say_what_computed_ones_say(model, cache_dtype, mask):
    given = {} if mask is None else {"attention_mask": mask}
    expected = tiny_model().generate(
        random_ids(2, 7), **NEW, **given, cache=LatentCache(model.config, cache_dtype=cache_dtype)
    )
    cache = LatentCache(model.config, cache_dtype=cache_dtype, max_cache_len=20)
    assert torch.equal(model.generate(random_ids(2, 7), **NEW, **given, cache=cache), expected)
    (steps,) = model.steps.made
    assert steps._graph is not None
    assert cache.get_seq_length() == 15


def test_chunks_of_one_token_see_the_holes_of_their_prompt(model):
    holes = torch.tensor([[1, 1, 0, 0, 1, 1, 1]])
    given = NEW | {"attention_mask": holes, "prefill_chunk_size": 1}
    expected = tiny_model().generate(random_ids(1, 7), **NEW, attention_mask=holes)
    cache = LatentCache(model.config, max_cache_len=20)
    assert torch.equal(model.generate(random_ids(1, 7), **given, cache=cache), expected)


def test_a_static_cache_is_taken_where_none_is_named(model):
    output = model.generate(random_ids(2, 7), **NEW, return_dict_in_generate=True)
    assert output.cache.is_static
    assert (
        model.generate(
            random_ids(2, 7), **NEW, return_dict_in_generate=True, cache_implementation="dynamic"
        ).cache.count
        is None
    )


def test_every_call_captures_anew(model):
    first = model.generate(random_ids(2, 7), **NEW)
    with torch.no_grad():
        model.lm_head.weight.data = model.lm_head.weight.flip(0)
    assert not torch.equal(model.generate(random_ids(2, 7), **NEW), first)
    assert len(model.steps.made) == 2


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_what_is_not_replayed_is_computed(model, options):
    expected = tiny_model().generate(random_ids(1, 7), **NEW, **options)
    assert torch.equal(model.generate(random_ids(1, 7), **NEW, **options), expected)


def test_a_step_that_cannot_be_captured_is_computed_with_a_warning(model):
    model.graph.fails = True
    with pytest.warns(UserWarning, match=r"not replayed.*operation not permitted when stream is capturing$"):
        output = model.generate(random_ids(2, 7), **NEW)
    assert torch.equal(output, tiny_model().generate(random_ids(2, 7), **NEW))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@torch.no_grad()
def test_a_step_that_fails_leaves_the_cache_as_it_was(model, error):
    def fail(*seen):
        raise error

    cache, ids = LatentCache(model.config, max_cache_len=20), random_ids(2, 8)
    model(ids[:, :7], cache=cache)
    held, call = cache.layers[0].rows().clone(), model.get_compiled_call(None)
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        call(input_ids=ids[:, 7:], **{CACHE: cache})
    hook.remove()
    assert cache.get_seq_length() == 7
    assert torch.equal(cache.layers[0].rows(), held)
    logits = model.get_compiled_call(None)(input_ids=ids[:, 7:], **{CACHE: cache}).logits
    expected = tiny_model()(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
