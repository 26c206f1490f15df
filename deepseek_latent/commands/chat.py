"""A conversation over one cache: each answer reads only the tokens that the cache does not hold yet."""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..cache.latent_cache import LatentCache


def messages_from_stdin() -> Iterator[str]:
    """The lines of stdin that are not empty, with a prompt before each if a person types them."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        if line.strip():
            yield line


def converse(
    messages: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    cache: LatentCache,
    answer: Callable[[BatchEncoding], Tensor],
    *,
    max_tokens: int,
) -> None:
    """Answers the messages one after the other. `answer` continues a prompt [1 s] over `cache` and returns all tokens.

    Raises ValueError for a conversation of `max_tokens` tokens or more, before it is answered.
    """
    history, held = [], torch.empty(1, 0, dtype=torch.long)
    for message in messages:
        history.append({"role": "user", "content": message})
        inputs = encode_chat(tokenizer, history)
        prompt = inputs["input_ids"]
        if prompt.shape[1] >= max_tokens:
            raise ValueError(
                f"the conversation has {prompt.shape[1]:,} tokens, expected fewer than {max_tokens:,}; start a new one."
            )
        # an answer may be tokenized differently as a part of the next prompt; its last token was never read
        num_common = _common_prefix(held, prompt[:, :-1])
        if num_common < held.shape[1]:
            cache.crop(num_common - held.shape[1])
        tokens = answer(inputs)
        held = tokens[:, : cache.get_seq_length()].cpu()
        history.append(
            {"role": "assistant", "content": tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)}
        )


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> BatchEncoding:
    """Messages in the tokenizer's chat template, up to where the answer begins."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _common_prefix(
    one: Tensor,  # [1 s]
    other: Tensor,  # [1 t]
) -> int:
    """The number of tokens that both begin with."""
    num = min(one.shape[1], other.shape[1])
    return int((one[0, :num] == other[0, :num]).long().cumprod(dim=0).sum())
