"""Many calls in one process: the slope of its memory, and the numbers of open files and threads, stay flat."""

import contextlib
import ctypes
import gc
import logging
import os
import statistics
import tempfile
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from deepseek_latent import LatentCache, PromptCache
from deepseek_latent.commands.__main__ import main
from tests.cache.batching import batching, generation
from tests.support import random_ids, tiny_model

from .campaign import Campaign

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# rounds of all calls before memory is looked at, and how many are needed for a judgment
WARM_UP, FEWEST_ROUNDS = 10, 30
# a slope in bytes per call that is a finding if it is also far from its standard error; runs without a leak stay below
# 1,000, and 100 kB per call of one kind are 8,000
MOST_PER_CALL = 4_000


class Calls:
    """What is done again and again: every method whose name begins with `call_`."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, tiny_model(num_hidden_layers=2)
        self.model.save_pretrained(folder / "model")
        widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
        llama = LlamaForCausalLM(LlamaConfig(**widths, num_attention_heads=4, num_key_value_heads=2))
        llama.save_pretrained(folder / "llama")
        self.prompts = PromptCache(folder / "prompts", max_bytes=1 << 17)
        self.names = [name for name in dir(self) if name.startswith("call_")]
        self.count = 0

    def ids(self, length: int = 12):
        self.count += 1
        return random_ids(1, length, seed=self.count % 50)

    def call_generate(self):
        self.model.generate(self.ids(), **GREEDY)

    def call_generate_in_a_static_cache(self):
        self.model.generate(self.ids(), **GREEDY, cache=LatentCache(self.model.config, max_cache_len=32))

    def call_generate_in_int6(self):
        self.model.generate(self.ids(), **GREEDY, cache=LatentCache(self.model.config, cache_dtype="int6"))

    def call_train(self):
        ids = self.ids()
        with torch.enable_grad():
            self.model(ids, labels=ids).loss.backward()
        self.model.zero_grad()

    def call_load(self):
        AutoModelForCausalLM.from_pretrained(self.folder / "model")

    def call_save(self):
        self.model.save_pretrained(self.folder / "saved")

    def call_convert(self):
        status = main(["convert", "gqa-to-mla", str(self.folder / "llama"), str(self.folder / "mla"), "--force"])
        assert status == 0

    def call_save_and_load_a_cache(self):
        cache, ids = LatentCache(self.model.config), self.ids()
        output = self.model.generate(ids, **GREEDY, cache=cache)
        cache.save(self.folder / "cache.safetensors", tokens=output, model=self.model)
        LatentCache.load(self.folder / "cache.safetensors", model=self.model)

    def call_prompts(self):
        ids = self.ids()
        cache = self.prompts.load(ids, self.model)
        output = self.model.generate(ids, **GREEDY, cache=cache)
        self.prompts.store(cache, output, self.model)

    def call_batch(self):
        prompts = [self.ids(length)[0].tolist() for length in (3, 30, 9)]
        self.model.generate_batch(prompts, generation(max_new_tokens=4), batching(num_blocks=8))

    def call_batch_with_a_bad_prompt(self):
        self.model.generate_batch([[5, 6], [96], [5] * 2000], generation(max_new_tokens=2), batching(num_blocks=8))

    def call_refused(self):
        with contextlib.suppress(ValueError, RuntimeError, IndexError):
            self.model(torch.zeros(1, 0, dtype=torch.long))


def run(campaign: Campaign) -> None:
    if not Path("/proc/self/statm").exists():
        campaign.count("not measured, as there is no /proc")
        return
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    disable_progress_bar()
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        calls = Calls(Path(folder))
        # collections are many, and go through what was imported otherwise
        gc.collect()
        gc.freeze()
        for random in campaign.cases():
            for name in random.sample(calls.names, len(calls.names)):
                getattr(calls, name)()
            campaign.count("calls", len(calls.names))
            samples.append((_resident_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count()))
    judge(campaign, samples[WARM_UP:], len(calls.names))


def judge(campaign: Campaign, samples: list[tuple[int, int, int]], calls_per_round: int) -> None:
    """Reports a leak if a slope over the second half of the samples is clearly above zero."""
    if len(samples) < FEWEST_ROUNDS:
        campaign.count("too few rounds to judge", len(samples))
        return
    later = samples[len(samples) // 2 :]
    rounds = range(len(later))
    for what, most, values in zip(("bytes", "open files", "threads"), (MOST_PER_CALL, 0.01, 0.01), zip(*later)):
        slope, start = statistics.linear_regression(rounds, values)
        squares = sum((value - start - slope * i) ** 2 for i, value in enumerate(values)) / (len(later) - 2)
        error = (squares * 12 / len(later) ** 3) ** 0.5
        campaign.count(f"{what} per 1,000 calls", round(1000 * slope / calls_per_round))
        if slope / calls_per_round > most and slope > 4 * error:
            campaign.finding("leak", f"{slope / calls_per_round:,.2f} {what} per call over {len(later)} rounds")


def _resident_bytes() -> int:
    """The resident memory after what is free was given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
