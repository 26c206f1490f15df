"""What a request of continuous batching must be, and the manager that refuses others before they join."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..compat.continuous_batching import CheckedManager
from ..compat.pages import config_for_pages
from .paged import page_row_width

# logits are divided by it in float32; below, a quotient may be infinite, and sampling would fail for all requests
MIN_TEMPERATURE = 1e-30


class LatentBatchingManager(CheckedManager):
    """transformers' ContinuousBatchingManager, with pages that store each latent and rotary key once.

    Token ids, lengths and options of a request are checked when it is added. One that outgrows the pages later ends
    alone, with an error and the tokens that it has so far.
    """

    def config_of_pages(self, config):
        # one head of width p has 2 p = c + r elements per token and layer
        return config_for_pages(config, 1, page_row_width(config.cached_width))

    def check_request(self, input_ids, max_new_tokens, eos_token_id, options):
        tokens = as_token_ids(input_ids)
        if not tokens:
            raise ValueError("a prompt must have at least one token, got none.")
        vocab_size = self.model.config.vocab_size
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            index = next(i for i, token in enumerate(tokens) if not 0 <= token < vocab_size)
            raise ValueError(
                f"token ids must be between 0 and {vocab_size - 1}, as the model has a vocabulary of {vocab_size}; got "
                f"{tokens[index]} at index {index} of the prompt."
            )
        if self.capacity is not None and len(tokens) > self.capacity:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and all pages together hold {self.capacity}; shorten it or raise "
                "num_blocks in the ContinuousBatchingConfig."
            )
        if max_new_tokens is not None and not (is_integer(max_new_tokens) and max_new_tokens >= 1):
            raise ValueError(f"max_new_tokens must be an integer of at least 1, or None, got {max_new_tokens!r}.")
        ends = [eos_token_id] if eos_token_id is None or is_integer(eos_token_id) else eos_token_id
        if eos_token_id is not None and not (isinstance(ends, list | tuple | set) and all(map(is_integer, ends))):
            raise TypeError(f"eos_token_id must be an integer or a list of integers, got {eos_token_id!r}.")
        _check_sampling(**options)
        return tokens


def as_token_ids(prompt: Any) -> list[int]:
    """A prompt as a list of integers; it may also be another sequence, or an array or a tensor [t] or [1 t]."""
    try:
        if isinstance(prompt, str | bytes):
            raise TypeError
        prompt = _without_batch_axis(prompt)
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        return [operator.index(token) for token in prompt]
    except TypeError:
        shown = repr(prompt)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        raise TypeError(f"a prompt must be a list of token ids, which are integers, got {shown}") from None


def _without_batch_axis(prompt: Any) -> Any:
    """A tensor or array [1 t] as [t], and anything else as it is."""
    return prompt[0] if getattr(prompt, "ndim", 0) == 2 and prompt.shape[0] == 1 else prompt


def is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_sampling(temperature: float = 1.0, top_k: int = 1, top_p: float = 1.0, **others: Any) -> None:
    """Checks options that a request may have if `per_request_processors` is set; their types are right already."""
    if not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature must be finite and at least {MIN_TEMPERATURE:g}, got {temperature}; do_sample=False in the "
            "GenerationConfig takes the most likely tokens."
        )
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must be between 0 and 1, got {top_p}.")


def as_prompts(inputs: Any) -> list[Any]:
    """The prompts of a batch, all with a length; refuses what is not a list of them or another sequence.

    Each prompt is checked when it is added.
    """
    is_sequence = isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes)
    if not is_sequence or any(is_integer(x) or getattr(x, "ndim", 1) == 0 for x in inputs):
        what = "a list in which not every element is a list" if is_sequence else type(inputs).__name__
        raise TypeError(f"inputs must be a list of prompts, each of which is a list of token ids, got {what}.")
    # transformers asks each prompt for its length; a list of what is no sequence is refused when it is added
    return [_without_batch_axis(x) if isinstance(x, Sequence) or hasattr(x, "ndim") else [x] for x in inputs]


def check_outputs(outputs: dict[str, Any], num_prompts: int, num_sequences: int) -> None:
    """Raises an error if results are missing: transformers logs why, and the others would go to wrong prompts.

    transformers 5.17 returns one of several sequences that are sampled from a prompt.
    """
    if len(outputs) not in (num_prompts, num_prompts * num_sequences):
        raise RuntimeError(
            f"continuous batching ended with {len(outputs)} results for {num_prompts} prompts with {num_sequences} "
            "sequences each; the log says why."
        )


def check_batching_config(given: Any) -> None:
    """Refuses settings that latents do not support; `given` is a ContinuousBatchingConfig or None."""
    if given is not None and (any(given.cuda_graph_booleans) or given.max_blocks_per_request):
        raise ValueError(
            "continuous batching of latents groups requests by their lengths at every step, so it has no CUDA graphs "
            "and no block tables; leave use_cuda_graph and max_blocks_per_request unset."
        )


def with_latent_pages(manager: Any) -> LatentBatchingManager:
    """Makes `manager`, a ContinuousBatchingManager, one for latents, and returns it."""
    manager.continuous_batching_config.use_cuda_graph = (False, False)
    manager.continuous_batching_config.max_blocks_per_request = 0
    return LatentBatchingManager.adopt(manager)
