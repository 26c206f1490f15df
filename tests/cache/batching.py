"""What tests of continuous batching share: prompts, settings, and the tokens that each prompt gets alone."""

import contextlib
import functools
import inspect

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.support import LITE, V2, random_ids, tiny_model

VARIANTS = {"V2": V2, "Lite": LITE, "odd": V2 | {"kv_lora_rank": 41}}
NEW_TOKENS = 12
LENGTHS = (3, 17, 1, 40, 9, 64, 33)
# transformers 5.17 calls a page a block
PAGE_SIZE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"


def prompts_of(lengths=LENGTHS) -> list[list[int]]:
    return [random_ids(1, length, seed=length)[0].tolist() for length in lengths]


def generation(**options) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": 1} | options)


def batching(num_blocks=40, max_batch_tokens=48, page_size=8, **options) -> ContinuousBatchingConfig:
    options[PAGE_SIZE] = page_size
    return ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, **options)


def batched(model, prompts, config=None, **options) -> list[list[int]]:
    """New tokens of each prompt, generated together."""
    outputs = model.generate_batch(prompts, generation_config=config or generation(), **options)
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs.values()]


def alone(model, prompts, config=None) -> list[list[int]]:
    """New tokens of each prompt, generated alone and without a cache."""
    config = config or generation()
    config.use_cache = False
    rows = [model.generate(torch.tensor([prompt]), generation_config=config)[0] for prompt in prompts]
    return [row[len(prompt) :].tolist() for row, prompt in zip(rows, prompts)]


@functools.cache
def tokens_alone(variant="V2") -> list[list[int]]:
    """The tokens that the tiny model of this variant generates after `prompts_of()`."""
    return alone(tiny_model(**VARIANTS[variant]), prompts_of())


@contextlib.contextmanager
def running(model, config=None, **options):
    manager = model.init_continuous_batching(config or generation(), batching(**options))
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True, timeout=10)


def result_of(manager, request) -> list[int]:
    output = manager.get_result(request, timeout=20)
    assert output.error is None
    return output.generated_tokens


def stepping(model, config=None, **options):
    """A manager without a thread, and a function that does one step and returns False if there was nothing to do."""
    manager = model.init_continuous_batching(config or generation(), batching(**options))
    manager.batch_processor = processor = manager._create_batch_processor()

    def step() -> bool:
        with torch.no_grad():
            if not processor.prepare_next_batch():
                return False
            manager.batch_processor._generation_step(model)
            processor.update_batch()
            return True

    return manager, step
