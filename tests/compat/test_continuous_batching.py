"""Canaries: what compat/continuous_batching.py and compat/pages.py use of transformers is still as it expects.

A test here fails with what changed and which code uses it. It passes on all versions that pyproject.toml admits.
"""

import inspect

import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache, RequestState
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor, OutputRouter
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.scheduler import Scheduler

from deepseek_latent.compat import pages as compat
from tests.compat.helpers import takes
from tests.support import tiny_model


def test_pages_are_made_and_written_as_paged_latents_expect():
    assert takes(PagedAttentionCache.update, "key_states", "value_states", "layer_idx"), "used by update_pages"
    rest = ("kwargs",) if compat._pages_take_all_arguments() else ("read_index", "write_index")
    assert takes(PagedAttentionCache.update, *rest), "used by update_pages"
    source = inspect.getsource(ContinuousBatchingManager)
    assert "self._create_batch_processor()" in source, "managers make pages elsewhere; used by CheckedManager"
    assert "self.model.config" in inspect.getsource(ContinuousBatchingManager._create_batch_processor), (
        "managers no longer read their model's config; used by CheckedManager"
    )


def test_continuous_batching_passes_its_pages_as_the_cache():
    given = {}
    model = tiny_model()
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: given.update(kwargs) or forward(*args, **kwargs)
    settings = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=1)
    few = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=8)
    model.generate_batch([[5, 6, 7]], generation_config=settings, continuous_batching_config=few)
    assert isinstance(given["cache"], PagedAttentionCache), "pages have another name or type; used by DeepseekV2Model"
    wanted = {"block_table", "cu_seq_lens_q", "cu_seq_lens_k", "read_index", "write_index"}
    assert wanted <= set(given), f"pages are passed without {wanted - set(given)}; used by PagedLatents"


def test_managers_take_requests_as_checked_managers_expect():
    for method, others in {"add_request": ["request_id", "eos_token_id"], "add_requests": []}.items():
        names = [*inspect.signature(getattr(ContinuousBatchingManager, method)).parameters]
        first = "inputs" if others == [] else "input_ids"
        wanted = [first, "max_new_tokens", "streaming", "record_timestamps", *others]
        assert {*names} - {"self", "logit_processor_kwargs"} == {*wanted}, f"{method} takes {names}"
    source = inspect.getsource(ContinuousBatchingManager.add_request)
    assert "return None" in source, "add_request says otherwise that no request is taken; used by CheckedManager"
    model = tiny_model()
    settings = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=1)
    manager = model.init_continuous_batching(settings, ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=8))
    used = ["_request_lock", "_request_counter", "logit_processor", "num_return_sequences", "background_thread_status"]
    for name in (*used, "batch_processor", "is_tp_driver", "output_router"):
        assert hasattr(manager, name), f"managers have no {name}; used by CheckedManager"
    manager.start()
    assert manager.add_requests([[5, 6], [7]]) == ["req_0", "req_1"], "ids are made otherwise; used by _take_id"
    assert {manager.get_result(timeout=20).status.name for _ in range(2)} == {"FINISHED"}
    processor = manager.batch_processor
    assert processor.output_router is manager.output_router, "processors deliver elsewhere; used by CheckedManager"
    assert compat.tokens_in_all_pages(processor.cache) >= 8 * 4, "pages are counted otherwise; used by capacity"
    manager.stop(block=True, timeout=10)


def test_what_lets_a_request_end_alone_is_called_by_the_loop():
    source = inspect.getsource(ContinuousBatchProcessor.prepare_next_batch)
    for name in ("self.offloading_manager.offload_requests()", "self.scheduler.clear_cancelled_requests()"):
        assert name in source, f"the loop no longer calls {name}; used by _let_requests_end_alone"
    source = inspect.getsource(OffloadingManager.offload_requests)
    assert "block_new_requests = True" in source, "evictions block no requests; _let_requests_end_alone can do less"
    for name in ("active_requests", "waiting_requests", "block_new_requests"):
        assert f"self.{name}" in inspect.getsource(Scheduler.reset), f"no {name}; used by _let_requests_end_alone"
    assert takes(Scheduler.set_request_cancellation, "request_id"), "used by _let_requests_end_alone"
    assert takes(OffloadingManager.free_request_cpu_cache, "state"), "used by _let_requests_end_alone"


def test_outputs_are_delivered_by_the_methods_that_are_overridden():
    for name in ("self.output_router.deliver_batch(", "self.output_router.fail_and_deliver("):
        assert name in inspect.getsource(ContinuousBatchProcessor), f"no {name}; used by _Router"
    assert "self.deliver(" in inspect.getsource(OutputRouter.fail_and_deliver), "used by _Router"
    source = inspect.getsource(ContinuousBatchProcessor.update_batch)
    assert "__child#" in source, "forked sequences have other ids; used by CheckedManager"
    assert RequestState("a", []).to_generation_output().generated_tokens == [], "used by _let_requests_end_alone"
