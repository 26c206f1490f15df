"""What this package changes in the manager of transformers' continuous batching (5.17 to 5.24).

tests/compat/test_continuous_batching.py has a test for each entry.
"""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestState
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

from .pages import Overlay, tokens_in_all_pages

# how long `get_result` waits at most until it sees that no result can come
SECONDS_BETWEEN_LOOKS = 0.2


class CheckedManager(ContinuousBatchingManager):
    """A manager that judges a request before it joins the others, and in which a request that fails ends alone.

    transformers' own (5.17 to 5.24) takes any request, and what one of them raises in its thread ends all of them.
    It also has no argument for the layout of its pages, and reads it from the config of its model.
    TODO: drop each method when transformers does what its docstring says.
    """

    ids_in_use: set[str]

    @classmethod
    def adopt(cls, manager: ContinuousBatchingManager) -> "CheckedManager":
        """A manager of this class with the state of one that transformers has made, which is not used any more."""
        # a manager that was kept for another session is one already
        if isinstance(manager, cls):
            return manager
        adopted = cls.__new__(cls)
        vars(adopted).update(vars(manager))
        adopted.ids_in_use = set()
        adopted.output_router = _Router(adopted.ids_in_use, adopted._request_lock)
        return adopted

    # ---- what a subclass decides

    def config_of_pages(self, config: PreTrainedConfig) -> Any:
        """Returns the config from which transformers lays out the pages."""
        return config

    def check_request(
        self, input_ids: Any, max_new_tokens: Any, eos_token_id: Any, options: dict[str, Any]
    ) -> list[int]:
        """Returns the token ids of a prompt, or raises ValueError or TypeError if the request cannot be served.

        `options` are those of the request's logits processors, such as temperature; their names and types are right.
        """
        return list(input_ids)

    # ---- the pages

    @property
    def capacity(self) -> int | None:
        """How many tokens all pages hold; None before they are made."""
        return None if self.batch_processor is None else tokens_in_all_pages(self.batch_processor.cache)

    def start(self) -> None:
        """As in transformers, but makes the pages first, so that an error of theirs is raised here and not in a thread.

        From then on, requests are also judged by what the pages can hold.
        """
        if not self.is_running() and self.batch_processor is None:
            # the thread writes to these tensors outside of inference mode, except on later versions than 5.19
            with torch.inference_mode(False):
                self.batch_processor = self._create_batch_processor()
        super().start()

    def _create_batch_processor(self) -> Any:
        model, kept = self.model, self.batch_processor
        self.model = Overlay(model, config=self.config_of_pages(model.config))
        try:
            processor = super()._create_batch_processor()
        finally:
            self.model = model
        if processor is not kept:
            _let_requests_end_alone(processor, self)
        return processor

    # ---- requests

    def add_request(
        self,
        input_ids: Any,
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: Any = None,
        **options: Any,
    ) -> str | None:
        """As in transformers, but raises ValueError or TypeError for a request that cannot be served.

        It raises RuntimeError if the manager takes no more requests; transformers drops the request.
        """
        if not self.is_tp_driver:
            return None
        if request_id is not None and not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {request_id!r}.")
        try:
            tokens = self._judge(input_ids, max_new_tokens, eos_token_id, options)
        except (TypeError, ValueError):
            # `transformers serve` registers who waits for the result before it adds the request
            self.output_router.result_handlers.pop(request_id, None)
            raise
        request_id, added = self._take_id(request_id), None
        try:
            added = super().add_request(
                tokens, request_id, max_new_tokens, streaming, record_timestamps, eos_token_id, **options
            )
        finally:
            if added is None:
                self.ids_in_use.discard(request_id)
        if added is None:
            error = self.background_thread_status.fatal_error
            reason = "it was stopped" if error is None else f"it failed with {type(error).__name__}: {error}"
            raise RuntimeError(
                f"continuous batching takes no more requests, because {reason}; start it again."
            ) from error
        return added

    def add_requests(
        self,
        inputs: Sequence[Any],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **options: Any,
    ) -> list[str]:
        """As in transformers; a request that cannot be served has failed at once, with the reason as its error."""
        accepted, errors = [], {}
        for index, input_ids in enumerate(inputs):
            try:
                accepted.append(self._judge(input_ids, max_new_tokens, None, options))
            except (TypeError, ValueError) as error:
                errors[index] = error
        joined = iter(super().add_requests(accepted, max_new_tokens, streaming, record_timestamps, **options))
        ids = [self._take_id(None) if index in errors else next(joined) for index in range(len(inputs))]
        for index, error in errors.items():
            self.fail(RequestState(ids[index], [], num_children=self.num_return_sequences - 1), error)
        return ids

    def _judge(self, input_ids: Any, max_new_tokens: Any, eos_token_id: Any, options: dict[str, Any]) -> list[int]:
        try:
            self.logit_processor.check_kwargs(options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the options of the request do not fit: {error}") from None
        return self.check_request(input_ids, max_new_tokens, eos_token_id, options)

    def _take_id(self, wanted: str | None) -> str:
        """Reserves an id, or makes a new one if none is wanted; requests with the same id would share their pages."""
        with self._request_lock:
            if wanted is None:
                while (wanted := f"req_{self._request_counter}") in self.ids_in_use:
                    self._request_counter += 1
                self._request_counter += 1
            elif wanted in self.ids_in_use:
                raise ValueError(f"request_id {wanted!r} belongs to a request that has not ended yet; choose another.")
            self.ids_in_use.add(wanted)
        return wanted

    def fail(self, state: RequestState, error: Exception) -> None:
        """Delivers the end of a request, and of the other sequences that were wanted from it."""
        for number in range(state.num_children):
            self.output_router.fail_and_deliver(RequestState(f"{state.request_id}__child#{number}", []), error)
        self.output_router.fail_and_deliver(state, error)

    # ---- results

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """As in transformers, and None if no result can come: the thread ended, or the request was canceled."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            # looked at in this order, because what a thread delivers before it ends is then in the queue
            with self._request_lock:
                may_come = self.is_running() and self._may_give_results(request_id)
            left = min(end - time.monotonic(), SECONDS_BETWEEN_LOOKS) if may_come else 0
            result = super().get_result(request_id, timeout=max(left, 0))
            # as in transformers, the result of another request is a reason to return
            is_over = not may_come or time.monotonic() >= end or not self.output_router.output_queue.empty()
            if result is not None or is_over:
                return result

    def _may_give_results(self, request_id: str | None) -> bool:
        # sequences that were forked from a request have ids that are not known here
        return request_id is None or request_id in self.ids_in_use or "__child#" in request_id

    def __iter__(self) -> Iterator[GenerationOutput]:
        """As in transformers, and then what was delivered when the thread ended."""
        yield from super().__iter__()
        while (result := self.get_result(timeout=0)) is not None:
            yield result

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """As in transformers, and then what was delivered when the thread ended."""
        for result in super().request_id_iter(request_id):
            yield result
            if result.is_finished():
                return
        for _ in range(self.output_router.output_queue.qsize()):
            if (result := self.get_result(request_id, timeout=0)) is not None:
                yield result


class _Router(OutputRouter):
    """Delivers outputs as transformers does, and the ids of requests that ended can be used again."""

    def __init__(self, ids_in_use: set[str], lock: threading.Lock):
        super().__init__()
        self.ids_in_use, self.lock_of_ids = ids_in_use, lock

    def deliver(self, output: GenerationOutput) -> None:
        with self.lock_of_ids:
            super().deliver(output)
            self._release([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        with self.lock_of_ids:
            super().deliver_batch(outputs)
            self._release(outputs)

    def _release(self, outputs: list[GenerationOutput]) -> None:
        self.ids_in_use.difference_update(output.request_id for output in outputs if output.is_finished())


def _let_requests_end_alone(processor: Any, manager: CheckedManager) -> None:
    """Replaces two functions of a batch processor, so that a request that outgrows the pages or is canceled ends alone.

    In transformers (5.17 to 5.24), the thread ends if one request needs more than all pages. And no request joins any
    more if others were evicted for a request that is then canceled.
    """
    scheduler, offloading = processor.scheduler, processor.offloading_manager
    offload, clear_canceled = offloading.offload_requests, scheduler.clear_cancelled_requests

    def clear_and_admit_others() -> list[RequestState]:
        canceled = clear_canceled()
        manager.ids_in_use.difference_update(state.request_id for state in canceled)
        if not scheduler.active_requests:
            scheduler.block_new_requests = False
        return canceled

    def offload_or_fail() -> bool:
        if offload():
            return True
        # all others were evicted already, so this request does not fit into all pages
        states = [*(scheduler.active_requests or scheduler.waiting_requests).values()]
        if len(scheduler.active_requests) > 1 or not states:
            return False
        scheduler.set_request_cancellation(states[0].request_id)
        for state in clear_and_admit_others():
            offloading.free_request_cpu_cache(state)
            num_new = len(state.to_generation_output().generated_tokens)
            manager.fail(
                state,
                ValueError(
                    f"after {num_new} new tokens, the request needs more than the {manager.capacity} tokens that all "
                    "pages hold; lower max_new_tokens or raise num_blocks in the ContinuousBatchingConfig."
                ),
            )
        return True

    offloading.offload_requests, scheduler.clear_cancelled_requests = offload_or_fail, clear_and_admit_others
