"""Modes of generation that continue a filled cache: more rows of MODES."""

import copy

import torch
from torch import Tensor

from tests.model.generation_modes import (
    GREEDY,
    IDS,
    MASK,
    PADDED,
    PROMPT,
    QUESTIONS,
    REPETITIVE,
    if_cached,
    left_padding,
    mode,
    no_cache,
)


def prefilled(model, new_cache, ids: Tensor, **options):
    """Makes the cache of the column, filled with `ids`."""
    options |= GREEDY | {"max_new_tokens": 1, "return_dict_in_generate": True}
    cache = model.generate(ids, **options, **new_cache()).cache
    assert cache.get_seq_length() == ids.shape[1]
    return cache


@mode("copies of a prefix")
def copies_of_a_prefix(model, new_cache, length: int = PROMPT, **options):
    prompts = [torch.cat((IDS, question), dim=1) for question in QUESTIONS]
    if new_cache is no_cache:
        return torch.cat([model.generate(prompt, **GREEDY, **no_cache()) for prompt in prompts], dim=1)
    prefix = prefilled(model, new_cache, IDS[:, :length])
    outputs = [model.generate(prompt, **GREEDY, **options, cache=copy.deepcopy(prefix)) for prompt in prompts]
    return torch.cat(outputs, dim=1)


@mode("chunks after copies of a prefix")
def chunks_after_copies_of_a_prefix(model, new_cache):
    return copies_of_a_prefix(model, new_cache, **if_cached(new_cache, prefill_chunk_size=2))


@mode("chunks longer than the prefix before them")
def chunks_longer_than_the_prefix_before_them(model, new_cache):
    return copies_of_a_prefix(model, new_cache, length=3, **if_cached(new_cache, prefill_chunk_size=5))


@mode("left padding after a prefix")
def left_padding_after_a_prefix(model, new_cache, length: int = 8, **options):
    if new_cache is no_cache:
        return left_padding(model, new_cache)
    cache = prefilled(model, new_cache, PADDED[:, :length], attention_mask=MASK[:, :length])
    options |= GREEDY | {"attention_mask": MASK, "cache": cache}
    return model.generate(PADDED, **options)[:, PROMPT:]


@mode("chunks longer than the padded prefix before them")
def chunks_longer_than_the_padded_prefix_before_them(model, new_cache):
    return left_padding_after_a_prefix(model, new_cache, length=3, **if_cached(new_cache, prefill_chunk_size=5))


@mode("cropping back to a prefix")
def cropping_back_to_a_prefix(model, new_cache):
    if new_cache is no_cache:
        return copies_of_a_prefix(model, new_cache)
    cache, outputs = prefilled(model, new_cache, IDS), []
    for question in QUESTIONS:
        outputs.append(model.generate(torch.cat((IDS, question), dim=1), **GREEDY, cache=cache))
        cache.crop(PROMPT - cache.get_seq_length())
    return torch.cat(outputs, dim=1)


@mode("one prefix for several rows")
def one_prefix_for_several_rows(model, new_cache):
    """Also from a part of the prefix, in which rows have no tokens of their own."""
    prompts = [torch.cat((IDS[:1, :kept].expand(2, -1), QUESTIONS[0]), dim=1) for kept in (PROMPT, PROMPT - 4)]
    if new_cache is no_cache:
        return torch.cat([model.generate(prompt, **GREEDY, **no_cache()) for prompt in prompts], dim=1)
    cache = prefilled(model, new_cache, IDS[:1])
    cache.batch_repeat_interleave(2)
    first = model.generate(prompts[0], **GREEDY, cache=cache)
    cache.crop(PROMPT - 4 - cache.get_seq_length())
    return torch.cat((first, model.generate(prompts[1], **GREEDY, cache=cache)), dim=1)


@mode("beams after one prefix")
def beams_after_one_prefix(model, new_cache):
    prompt = torch.cat((IDS[:1], QUESTIONS[0][:1]), dim=1)
    if new_cache is no_cache:
        return model.generate(prompt, **GREEDY, num_beams=3, **no_cache())
    cache = prefilled(model, new_cache, IDS[:1])
    cache.batch_repeat_interleave(3)
    return model.generate(prompt, **GREEDY, num_beams=3, cache=cache)


@mode("prompt lookup after a prefix")
def prompt_lookup_after_a_prefix(model, new_cache, given: slice = slice(None)):
    if new_cache is no_cache:
        return model.generate(REPETITIVE, **GREEDY, **no_cache())[:, given]
    cache = prefilled(model, new_cache, REPETITIVE[:, :8])
    options = {"attention_mask": torch.ones_like(REPETITIVE), "prompt_lookup_num_tokens": 3}
    return model.generate(REPETITIVE[:, given], **GREEDY, **options, cache=cache)


@mode("prompt lookup from the new tokens after a prefix")
def prompt_lookup_from_the_new_tokens_after_a_prefix(model, new_cache):
    return prompt_lookup_after_a_prefix(model, new_cache, given=slice(8, None))


@mode("conversation")
def conversation(model, new_cache, only_new_tokens: bool = False):
    tokens, options = IDS[:, :0], new_cache()
    for turn in (IDS, *QUESTIONS):
        # the last generated token is not in the cache, since no token came after it
        cached = tokens.shape[1] - 1 if only_new_tokens and tokens.shape[1] else 0
        tokens = torch.cat((tokens, turn), dim=1)
        options |= {"attention_mask": torch.ones_like(tokens), "return_dict_in_generate": True}
        output = model.generate(tokens[:, cached:], **GREEDY | {"max_new_tokens": 6}, **options)
        tokens = torch.cat((tokens[:, :cached], output.sequences), dim=1)
        options = no_cache() if new_cache is no_cache else {"cache": output.cache}
    return tokens


@mode("conversation in new tokens")
def conversation_in_new_tokens(model, new_cache):
    return conversation(model, new_cache, only_new_tokens=new_cache is not no_cache)
