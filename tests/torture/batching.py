"""Continuous batching against plain greedy generation of each prompt alone, with bad requests and few pages.

No thread: each case does the steps of the loop itself, so that it can be repeated from its number.
"""

import gc
import logging
from random import Random

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.cache.batching import PAGE_SIZE
from tests.support import tiny_model

from .campaign import Campaign, is_refusal

NUM_PROMPTS, MOST_TOKENS, EOS = 48, 32, 1
SIZES = {"num_hidden_layers": 1, "first_k_dense_replace": 1}
BAD = [[], [96], [3, -1], "text", [[3]], [0.5], [5] * 2000, None]
BAD_OPTIONS = [{"max_new_tokens": 0}, {"eos_token_id": "end"}, {"num_beams": 2}, {"request_id": 3}]


def draw_prompts() -> list[list[int]]:
    """Prompts of 1 to 60 tokens, many of which begin alike."""
    random = Random(0)
    stems = [[random.randrange(2, 96) for _ in range(44)] for _ in range(4)]
    tails = [[random.randrange(2, 96) for _ in range(random.randint(1, 16))] for _ in range(NUM_PROMPTS)]
    return [random.choice(stems)[: random.choice((0, 0, 8, 17, 32, 44))] + tail for tail in tails]


def run(campaign: Campaign) -> None:
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    model, prompts = tiny_model(**SIZES), draw_prompts()
    settings = GenerationConfig(max_new_tokens=MOST_TOKENS, do_sample=False, eos_token_id=EOS, pad_token_id=0)
    rows = [model.generate(torch.tensor([prompt]), generation_config=settings)[0].tolist() for prompt in prompts]
    alone = [row[len(prompt) :] for row, prompt in zip(rows, prompts)]
    # transformers collects garbage for each manager
    gc.freeze()
    for random in campaign.cases():
        _Case(campaign, random, model, prompts, alone).run()
        if campaign.case % 100 == 99:
            gc.collect()


class _Case:
    def __init__(self, campaign: Campaign, random: Random, model, prompts: list[list[int]], alone: list[list[int]]):
        self.campaign, self.random, self.prompts, self.alone = campaign, random, prompts, alone
        config = {
            "num_blocks": random.choice((6, 10, 16, 40)),
            PAGE_SIZE: random.choice((8, 16)),
            "max_batch_tokens": random.choice((5, 24, 64)),
            "scheduler_type": random.choice(("fifo", "prefill_first")),
            "allow_block_sharing": random.random() < 0.6,
            "max_requests_per_batch": random.choice((2, 8, 64)),
        }
        settings = GenerationConfig(max_new_tokens=MOST_TOKENS, do_sample=False, eos_token_id=EOS)
        self.manager = model.init_continuous_batching(settings, ContinuousBatchingConfig(**config))
        self.processor = self.manager.batch_processor = self.manager._create_batch_processor()
        self.model, self.config = model, config
        self.wanted: dict[str, list[int]] = {}
        self.may_outgrow: set[str] = set()
        self.canceled: set[str] = set()
        self.evicted: set[str] = set()
        self.outputs: dict[str, object] = {}

    def run(self) -> None:
        num_to_add, idle = self.random.randint(1, 20), 0
        while num_to_add or idle < 2:
            for _ in range(min(num_to_add, self.random.choice((0, 0, 1, 2, 8)))):
                num_to_add -= 1
                self.add_bad() if self.random.random() < 0.2 else self.add()
            if self.wanted and self.random.random() < 0.03:
                self.cancel(self.random.choice([*self.wanted]))
            try:
                idle = 0 if self.step() else idle + 1
            except Exception as error:
                self.campaign.finding("raw exception", f"the loop ended: {type(error).__name__}: {error} {self.config}")
                return
            self.collect()
        self.campaign.count("evictions", len(self.evicted))
        self.check_ends()

    def add(self) -> None:
        index, num_new = self.random.randrange(NUM_PROMPTS), self.random.randint(1, MOST_TOKENS)
        needed = len(self.prompts[index]) + num_new
        try:
            name = self.manager.add_request(self.prompts[index], max_new_tokens=num_new)
        except ValueError as error:
            if len(self.prompts[index]) <= self.manager.capacity or not is_refusal(error, (ValueError,)):
                self.campaign.finding("raw exception", f"a good request was refused: {error}")
            self.campaign.count("too long for all pages")
            return
        self.wanted[name] = self.alone[index][:num_new]
        # transformers 5.17 reserves up to two pages more than are needed
        if needed > self.manager.capacity - 2 * self.config[PAGE_SIZE]:
            self.may_outgrow.add(name)
        self.campaign.count("requests")

    def add_bad(self) -> None:
        request = {"input_ids": self.prompts[0][:3]} | self.random.choice(
            [{"input_ids": prompt} for prompt in BAD] + BAD_OPTIONS
        )
        if self.wanted and self.random.random() < 0.2:
            # the id of a request that runs
            running = [name for name in self.wanted if name not in self.outputs and name not in self.canceled]
            request = {"input_ids": [5], "request_id": running[0]} if running else request
        self.campaign.count("bad requests")
        try:
            self.manager.add_request(**request)
        except (TypeError, ValueError) as error:
            if not is_refusal(error, (TypeError, ValueError)):
                self.campaign.finding("raw exception", f"{request}: {error!r}")
        else:
            self.campaign.finding("wrong answer", f"a bad request was accepted: {str(request)[:200]}")

    def cancel(self, name: str) -> None:
        self.manager.cancel_request(name)
        self.canceled.add(name)
        self.campaign.count("cancellations")

    def step(self) -> bool:
        self.campaign.count("steps")
        with torch.no_grad():
            if not self.processor.prepare_next_batch():
                return False
            waiting = self.processor.scheduler.waiting_requests
            self.evicted |= {name for name, state in waiting.items() if state._true_initial_tokens}
            self.processor._generation_step(self.model)
            self.processor.update_batch()
        return True

    def collect(self) -> None:
        while (output := self.manager.get_result(timeout=0)) is not None:
            if output.request_id in self.outputs:
                self.campaign.finding("wrong answer", f"two results of {output.request_id}")
            self.outputs[output.request_id] = output

    def check_ends(self) -> None:
        for name, tokens in self.wanted.items():
            output = self.outputs.get(name)
            if output is None:
                if name not in self.canceled:
                    self.campaign.finding("wrong answer", f"no result of {name} {self.config}")
            elif output.error is not None:
                if name not in self.may_outgrow or "all pages hold" not in output.error:
                    self.campaign.finding("wrong answer", f"{name} failed: {output.error} {self.config}")
                elif output.generated_tokens != tokens[: len(output.generated_tokens)]:
                    self.campaign.finding("wrong answer", f"{name} failed after wrong tokens {self.config}")
                self.campaign.count("outgrew the pages")
            elif output.generated_tokens != tokens:
                self.campaign.finding("wrong answer", f"{name} has other tokens than alone {self.config}")
            else:
                self.campaign.count("right results")
        scheduler, pages = self.processor.scheduler, self.processor.cache
        if scheduler.has_pending_requests() or self.manager.ids_in_use:
            self.campaign.finding("wrong answer", f"requests are left: {self.manager.ids_in_use} {self.config}")
        if not all_pages_are_free(pages):
            self.campaign.finding("wrong answer", f"pages are not free after the last request {self.config}")


def all_pages_are_free(pages) -> bool:
    """True if every page is free once those that are kept for prompts that begin alike are given up."""
    if hasattr(pages, "get_num_free_blocks"):
        # transformers 5.17
        return pages.get_num_free_blocks() == pages.num_blocks
    pages.evict_cached_blocks()
    return pages.compute_free_capacity() == 1
