"""Threads that generate at once with the same models get the tokens that each gets alone."""

import functools
import logging
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random

import torch

from deepseek_latent import LatentCache, PromptCache, optimize_for_inference
from deepseek_latent.cache.format import CACHE_DTYPES
from tests.cache.batching import batching, generation
from tests.support import needs_compiler, random_ids, tiny_model

from .campaign import Campaign

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPTS = [random_ids(1, length, seed=length) for length in (3, 9, 14, 23, 40, 57)]
SECONDS_TO_JOIN = 90


class Jobs:
    """What a thread can do: every method whose name begins with `job_` returns a prompt and the tokens after it."""

    def __init__(self, folder: Path):
        self.models = {"plain": tiny_model(num_hidden_layers=2)}
        if not needs_compiler.args[0]:
            for weights in (None, "int8"):
                model = tiny_model(num_hidden_layers=2)
                optimize_for_inference(model, weights=weights)
                self.models[f"kernels, {weights}"] = model
        self.folder, self.prompts = folder, PromptCache(folder / "prompts", max_bytes=1 << 18)
        # one manager that all threads add requests to
        self.manager = tiny_model(num_hidden_layers=2).init_continuous_batching(
            generation(max_new_tokens=8, eos_token_id=-1), batching(num_blocks=12)
        )
        self.manager.start()
        self.names = [name for name in dir(self) if name.startswith("job_")]
        # computed without other threads
        self.alone = functools.cache(self.run)

    def run(self, job: str, model: str, prompt: int) -> list[int]:
        ids = PROMPTS[prompt]
        with torch.no_grad():
            return getattr(self, job)(self.models[model], ids)[:, ids.shape[1] :].tolist()

    def job_default_cache(self, model, ids):
        return model.generate(ids, **GREEDY)

    def job_no_cache(self, model, ids):
        return model.generate(ids, **GREEDY, use_cache=False)

    def job_beams(self, model, ids):
        return model.generate(ids, **GREEDY, num_beams=3)

    def job_prompt_lookup(self, model, ids):
        return model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3)

    def job_static_cache(self, model, ids):
        cache = LatentCache(model.config, max_cache_len=ids.shape[1] + 16, cache_dtype="int8")
        return model.generate(ids, **GREEDY, cache=cache)

    def job_every_cache_dtype(self, model, ids):
        rows = [
            model.generate(ids, **GREEDY, cache=LatentCache(model.config, cache_dtype=cache_dtype))
            for cache_dtype in CACHE_DTYPES
        ]
        return torch.cat(rows)

    def job_continued(self, model, ids):
        cache = LatentCache(model.config)
        return model.generate(model.generate(ids, **GREEDY, cache=cache), **GREEDY, cache=cache)

    def job_saved_and_loaded(self, model, ids):
        path, cache = self.folder / f"{threading.get_ident()}.safetensors", LatentCache(model.config)
        output = model.generate(ids, **GREEDY, cache=cache)
        cache.save(path, tokens=output, model=model)
        return model.generate(output, **GREEDY, cache=LatentCache.load(path, model=model))

    def job_shared_prompts(self, model, ids):
        cache = self.prompts.load(ids, model)
        output = model.generate(ids, **GREEDY, cache=cache)
        self.prompts.store(cache, output, model)
        return output

    def job_batched(self, model, ids):
        prompt = ids[0].tolist()
        canceled, wanted = (self.manager.add_request(prompt) for _ in range(2))
        self.manager.cancel_request(canceled)
        while (output := self.manager.get_result(wanted, timeout=1)) is None and self.manager.is_running():
            # the first result may be that of another thread
            time.sleep(1e-3)
        # it may have ended before it was canceled
        while self.manager.get_result(canceled, timeout=0) is None and canceled in self.manager.ids_in_use:
            time.sleep(1e-3)
        return torch.tensor([prompt + output.generated_tokens])


def run(campaign: Campaign) -> None:
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # threads change places more often than in use
    sys.setswitchinterval(1e-4)
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(Path(folder))
        try:
            for random in campaign.cases():
                tasks = [_draw_tasks(jobs, random) for _ in range(random.randint(2, 6))]
                for task in {task for of_thread in tasks for task in of_thread}:
                    jobs.alone(*task)
                _run_at_once(campaign, jobs, tasks)
        finally:
            jobs.manager.stop(block=True, timeout=SECONDS_TO_JOIN)
        if jobs.manager.is_running():
            campaign.finding("hang", "continuous batching did not stop")


def _draw_tasks(jobs: Jobs, random: Random) -> list[tuple[str, str, int]]:
    """What one thread does: some jobs, each with a model and the number of a prompt."""
    return [
        (random.choice(jobs.names), random.choice([*jobs.models]), random.randrange(len(PROMPTS)))
        for _ in range(random.randint(1, 3))
    ]


def _run_at_once(campaign: Campaign, jobs: Jobs, tasks: list[list[tuple]]) -> None:
    start = threading.Barrier(len(tasks))
    wrong: list[tuple[str, str]] = []

    def work(of_thread: list[tuple]) -> None:
        start.wait()
        for task in of_thread:
            try:
                if jobs.run(*task) != jobs.alone(*task):
                    wrong.append(("wrong answer", f"{task} beside {tasks}"))
            except Exception as error:
                wrong.append(("raw exception", f"{task}: {type(error).__name__}: {error}"[:500]))

    threads = [threading.Thread(target=work, args=(of_thread,), daemon=True) for of_thread in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS_TO_JOIN)
        if thread.is_alive():
            wrong.append(("hang", f"a thread of {tasks} did not end within {SECONDS_TO_JOIN} s"))
    for kind, text in wrong:
        campaign.finding(kind, text)
    campaign.count("threads", len(threads))
    campaign.count("generations at once", sum(map(len, tasks)))
