"""A request of continuous batching is judged before it joins, and one that fails ends alone."""

import _thread
import collections
import gc
import itertools
import signal
import threading

import numpy as np
import pytest
import torch
from transformers.generation.continuous_batching import RequestStatus

from tests.cache.batching import alone, batching, generation, prompts_of, result_of, running, stepping, tokens_alone
from tests.support import tiny_model

# a request, and what is said about it
REFUSED = {
    "an id outside the vocabulary": ({"input_ids": [5, 6, 96]}, "between 0 and 95, .* got 96 at index 2 of the prompt"),
    "a negative id": ({"input_ids": [5, -1, 6]}, "between 0 and 95, .* got -1 at index 1 of the prompt"),
    "no tokens": ({"input_ids": []}, "a prompt must have at least one token, got none"),
    "text": ({"input_ids": "hello"}, "a prompt must be a list of token ids, which are integers, got 'hello'"),
    "words": ({"input_ids": ["hello", "you"]}, "a prompt must be a list of token ids, .* got .'hello', 'you'."),
    "nested": ({"input_ids": [[5, 6]]}, r"a prompt must be a list of token ids, .* got \[\[5, 6\]\]"),
    "a batch": (
        {"input_ids": torch.tensor([[5], [6]])},
        r"a prompt must be a list of token ids, .* got \[\[5\], \[6\]\]",
    ),
    "floats": ({"input_ids": [5.0, 6.0]}, r"a prompt must be a list of token ids, .* got \[5.0, 6.0\]"),
    "nothing": ({"input_ids": None}, "a prompt must be a list of token ids, .* got None"),
    "longer than all pages": ({"input_ids": [5] * 400}, "the prompt has 400 tokens and all pages together hold 3.."),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, or None, got 0"),
    "fewer than none": ({"max_new_tokens": -3}, "max_new_tokens must be an integer of at least 1, or None, got -3"),
    "half a token": ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer of at least 1, or None, got 1.5"),
    "an end that is text": ({"eos_token_id": "</s>"}, "eos_token_id must be an integer or a list of integers"),
    "an end of fractions": ({"eos_token_id": [1.5]}, "eos_token_id must be an integer or a list of integers"),
    "an unknown option": ({"num_beams": 4}, "the options of the request do not fit: Unknown .*num_beams"),
    "an id that is no text": ({"request_id": 7}, "request_id must be a string, got 7"),
    "an option of another type": ({"temperature": "hot"}, "the options of the request do not fit: .*temperature"),
    "a temperature of zero": ({"temperature": 0.0}, "temperature must be finite and at least 1e-30, got 0.0"),
    "a temperature of nan": ({"temperature": float("nan")}, "temperature must be finite and at least 1e-30, got nan"),
    "top_k of zero": ({"top_k": 0}, "top_k must be at least 1, got 0"),
    "top_p above one": ({"top_p": 1.5}, "top_p must be between 0 and 1, got 1.5"),
}


@pytest.fixture(scope="module", autouse=True)
def _garbage_of_this_file_only():
    """Excludes imported objects from the garbage collections that transformers starts, which saves time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def manager():
    """A running manager, whose requests may have a temperature, top_k and top_p of their own."""
    config = generation(do_sample=True, temperature=0.9, top_k=20, top_p=0.9)
    with running(tiny_model(), config, per_request_processors=True, seed=3) as manager:
        yield manager


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_served_is_refused_when_it_is_added(manager, name):
    request, reason = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=reason):
        manager.add_request(**{"input_ids": [5, 6]} | request)
    assert len(result_of(manager, manager.add_request([5, 6, 7], eos_token_id=-1))) == 12


PROMPT = [5, 6, 7]
FORMS = {
    "tuple": tuple(PROMPT),
    "array": np.array(PROMPT),
    "tensor": torch.tensor(PROMPT),
    "range": range(5, 8),
    "array [1 t]": np.array([PROMPT]),
    "tensor [1 t]": torch.tensor([PROMPT]),
}


@pytest.mark.parametrize("prompt", FORMS.values(), ids=FORMS)
def test_a_prompt_may_be_any_sequence_of_integers(manager, prompt):
    assert len(result_of(manager, manager.add_request(prompt, max_new_tokens=3, eos_token_id=[]))) == 3


@pytest.mark.parametrize("form", [tuple, collections.UserList, collections.deque])
def test_a_batch_may_be_any_sequence_of_prompts(form):
    outputs = tiny_model().generate_batch(form([PROMPT, *FORMS.values()]), generation(), batching())
    tokens = [output.generated_tokens for output in outputs.values()]
    assert tokens == alone(tiny_model(), [PROMPT]) * (1 + len(FORMS))


def test_a_bad_prompt_fails_alone_in_a_batch():
    good, bad = prompts_of(), [[5, 96], [], "text", [5] * 400, None, [[5]], {"ids": [5]}]
    mixed = [prompt for pair in zip(bad, good) for prompt in pair] + good[len(bad) :]
    outputs = tiny_model().generate_batch(mixed, generation(), batching())
    assert len(outputs) == len(mixed)
    expected = dict(zip(map(str, good), tokens_alone()))
    for prompt, output in zip(mixed, outputs.values()):
        if prompt in good:
            assert (output.error, output.generated_tokens) == (None, expected[str(prompt)])
        else:
            assert (output.status, output.generated_tokens) == (RequestStatus.FAILED, [])
            assert "token" in output.error


def test_a_bad_prompt_fails_alone_when_several_sequences_of_each_are_wanted():
    config = generation(do_sample=True, num_return_sequences=3)
    outputs = tiny_model().generate_batch([[5, 6], [96], [7, 8]], config, batching(seed=1))
    errors = [output.error for output in outputs.values()]
    # transformers 5.17 returns one of the sequences
    each = len(errors) // 3
    assert [error is None for error in errors] == [True] * each + [False] * each + [True] * each


@pytest.mark.parametrize(
    "inputs", ["text", 5, torch.tensor([[5, 6]]), [5, 6, 7], [[5, 6], 7], range(5, 8), {"a": [5]}], ids=lambda x: str(x)
)
def test_what_is_no_list_of_prompts_is_refused_before_anything_starts(inputs):
    with pytest.raises(TypeError, match="inputs must be a list of prompts, each of which is a list of token ids"):
        tiny_model().generate_batch(inputs, generation(), batching())


def test_generate_over_pages_raises_what_is_wrong_with_a_prompt():
    with pytest.raises(ValueError, match="got 96 at index 1 of the prompt"):
        tiny_model().generate(
            torch.tensor([[5, 96], [6, 7]]),
            generation_config=generation(),
            cache_implementation="paged",
            continuous_batching_config=batching(),
        )


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
@pytest.mark.parametrize("allow_block_sharing", [True, False], ids=["shared", "unshared"])
def test_a_request_that_outgrows_all_pages_ends_alone(scheduler, allow_block_sharing):
    """Its result has the tokens so far, which are right, and the others, which it evicted, start again."""
    model, prompts = tiny_model(), prompts_of((9, 30, 17))
    config = generation(eos_token_id=-1)
    expected = alone(model, prompts, generation(eos_token_id=None))
    long = alone(model, [[5, 6]], generation(eos_token_id=None, max_new_tokens=120))[0]
    options = {"num_blocks": 10, "scheduler_type": scheduler, "allow_block_sharing": allow_block_sharing}
    with running(model, config, **options) as manager:
        ids = [manager.add_request([5, 6], max_new_tokens=2000), *map(manager.add_request, prompts)]
        outputs = {output.request_id: output for output in (manager.get_result(timeout=30) for _ in ids)}
        assert manager.is_running()
    failed, *others = (outputs[each] for each in ids)
    assert [(output.error, output.generated_tokens) for output in others] == [(None, tokens) for tokens in expected]
    assert failed.status == RequestStatus.FAILED
    assert f"after {len(failed.generated_tokens)} new tokens, the request needs more than the" in failed.error
    assert len(failed.generated_tokens) > 60
    assert failed.generated_tokens == long[: len(failed.generated_tokens)]


def test_a_prompt_longer_than_all_pages_that_was_added_before_they_exist_ends_alone():
    model, prompts = tiny_model(), prompts_of((9, 30))
    manager = model.init_continuous_batching(generation(), batching(num_blocks=10, max_batch_tokens=400))
    ids = [manager.add_request(prompt) for prompt in (prompts[0], [5] * 300, prompts[1])]
    manager.start()
    outputs = {output.request_id: output for output in (manager.get_result(timeout=30) for _ in ids)}
    manager.stop(block=True, timeout=10)
    assert "after 0 new tokens, the request needs more than" in outputs[ids[1]].error
    expected = alone(model, prompts)
    assert [outputs[each].generated_tokens for each in (ids[0], ids[2])] == expected


def test_canceling_the_request_for_which_others_were_evicted_lets_them_continue():
    model, prompts = tiny_model(), prompts_of((9, 30, 17))
    manager, step = stepping(model, num_blocks=10)
    scheduler = manager.batch_processor.scheduler
    manager.add_request([5, 6], request_id="long", max_new_tokens=2000, eos_token_id=-1)
    ids = []
    while not ([*scheduler.active_requests] == ["long"] and scheduler.block_new_requests):
        assert step()
        if len(scheduler.active_requests["long"].generated_tokens) == 30:
            ids = manager.add_requests(prompts)
    manager.cancel_request("long")
    for _ in range(100):
        step()
    assert not scheduler.has_pending_requests()
    outputs = {output.request_id: output.generated_tokens for output in (manager.get_result() for _ in prompts)}
    assert [outputs[each] for each in ids] == alone(tiny_model(), prompts)


def test_an_id_can_be_used_again_when_its_request_has_ended(manager):
    manager.add_request([5, 6], request_id="mine", max_new_tokens=60, eos_token_id=-1)
    with pytest.raises(ValueError, match="request_id 'mine' belongs to a request that has not ended yet"):
        manager.add_request([7], request_id="mine")
    assert len(result_of(manager, "mine")) == 60
    manager.add_request([5, 6], request_id="mine", max_new_tokens=2, eos_token_id=-1)
    assert len(result_of(manager, "mine")) == 2


def test_an_id_of_the_user_is_not_given_to_another_request(manager):
    taken = f"req_{manager._request_counter}"
    manager.add_request([5, 6], request_id=taken, max_new_tokens=100, eos_token_id=-1)
    other = manager.add_request([5, 6], max_new_tokens=2, eos_token_id=-1)
    assert other != taken
    lengths = {output.request_id: len(output.generated_tokens) for output in (manager.get_result() for _ in range(2))}
    assert lengths == {taken: 100, other: 2}


def test_waiting_for_a_request_that_was_canceled_ends(manager):
    manager.add_request([5, 6], request_id="canceled", max_new_tokens=5000, eos_token_id=-1)
    manager.cancel_request("canceled")
    assert manager.get_result("canceled") is None


def test_a_stopped_manager_refuses_requests():
    with running(tiny_model()) as manager:
        assert result_of(manager, manager.add_request([5, 6, 7]))
    with pytest.raises(RuntimeError, match="takes no more requests, because it was stopped; start it again"):
        manager.add_request([5, 6, 7])
    manager.start()
    assert result_of(manager, manager.add_request([5, 6, 7]))
    manager.stop(block=True, timeout=10)


def failing_model():
    """A model that raises an error in the forward pass that reads token 9."""
    model = tiny_model()

    def fail(module, args):
        if 9 in args[0]:
            raise ArithmeticError("nine")

    model.model.embed_tokens.register_forward_pre_hook(fail)
    return model


def test_an_error_in_the_forward_pass_is_said_to_everyone_who_waits():
    with running(failing_model(), generation(eos_token_id=-1)) as manager:
        outputs = []

        def collect():
            while (output := manager.get_result()) is not None:
                outputs.append(output)

        ids = [manager.add_request([5, 6], max_new_tokens=300) for _ in range(3)]
        threads = [threading.Thread(target=collect) for _ in range(2)]
        for thread in threads:
            thread.start()
        ids.append(manager.add_request([8, 9]))
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert sorted(output.request_id for output in outputs) == ids
        assert {output.error for output in outputs} == {"nine"}
        with pytest.raises(RuntimeError, match="takes no more requests, because it failed with ArithmeticError: nine"):
            manager.add_request([5, 6])


@pytest.mark.parametrize("by_id", [True, False])
def test_iterating_over_results_gives_those_that_failed_with_the_loop(by_id):
    with running(failing_model(), generation(eos_token_id=-1)) as manager:
        request = manager.add_request([8, 9], streaming=True)
        outputs = [*(manager.request_id_iter(request) if by_id else manager)]
        assert [(output.request_id, output.error) for output in outputs] == [(request, "nine")]


def test_outputs_of_a_batch_whose_forward_pass_fails_say_so_or_are_right():
    prompts = [[5, 6], [8, 9], [7]]
    outputs = failing_model().generate_batch(prompts, generation(), batching())
    assert [output.error for output in outputs.values()] == ["nine"] * 3


def loops() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_run_generation_loop" in thread.name]


@pytest.fixture
def interrupts_are_heard():
    """A shell ignores interrupts for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts_are_heard")
def test_an_interrupt_ends_a_batch_and_its_thread():
    model, steps = tiny_model(), itertools.count()

    def interrupt(module, args):
        if next(steps) == 3:
            _thread.interrupt_main()

    model.model.embed_tokens.register_forward_pre_hook(interrupt)
    before = loops()
    with pytest.raises(KeyboardInterrupt):
        model.generate_batch([[5, 6]] * 3, generation(max_new_tokens=10**6, eos_token_id=-1), batching(4000))
    assert loops() == before


def test_pages_that_cannot_be_made_are_an_error_where_the_manager_is_started():
    model = tiny_model()
    manager = model.init_continuous_batching(generation(), batching(scheduler_type="fifo", safety_margin=3.0))
    with pytest.raises(ValueError, match="safety_margin"):
        manager.start()
    assert not manager.is_running()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_manager_can_be_started_in_any_mode(mode):
    model = tiny_model()
    with mode(), running(model) as manager:
        tokens = result_of(manager, manager.add_request(prompts_of()[0]))
    assert tokens == tokens_alone()[0]
