"""Modes of generation: the rows of the table in test_generation_modes.py.

A row of MODES is a function of a model and of `new_cache`, which returns the options that make `generate` use a cache.
A mode that requires a cache must give the tokens of plain steps. Modes that continue a filled cache are in
generation_after_prefix.py.
"""

import contextlib
import functools
import io
import threading
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LogitsProcessor, StoppingCriteria, TextIteratorStreamer, TextStreamer

from tests.support import native_twin, random_ids, seeded, tiny_model

PROMPT, NEW = 11, 10
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SAMPLING = GREEDY | {"do_sample": True, "temperature": 1.3, "top_k": 50, "top_p": 0.95}
IDS = random_ids(2, PROMPT)
QUESTIONS = [random_ids(2, length, seed=length) for length in (3, 6, 1)]
# `subject` continues it with tokens that occur in it, but not always with those that follow them there
REPETITIVE = random_ids(1, 4, seed=1).repeat(1, 3)
# embeddings that are not those of tokens
SOFT_PROMPT = torch.randn(2, PROMPT, 72, generator=seeded(2)) / 4


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples" / "pydoc-tiny")


@functools.cache
def subject(dtype: torch.dtype = torch.float32):
    model = tiny_model(dtype, vocab_size=2048, seed=2)
    # torch has no grouped_mm for float64
    model.set_experts_implementation("eager" if dtype == torch.float64 else "grouped_mm")
    _draft_three_tokens(model)
    return model


@functools.cache
def twin_of_transformers():
    return native_twin(subject())


@functools.cache
def assistant():
    """One layer of other widths, trained on the first half of `subject`'s output: its drafts are right, then wrong."""
    widths = {"num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 24, "qk_rope_head_dim": 16}
    model = tiny_model(vocab_size=2048, num_hidden_layers=1, **widths)
    _draft_three_tokens(model)
    read = subject().generate(REPETITIVE, **GREEDY | {"max_new_tokens": NEW // 2}, **no_cache())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(12):
            optimizer.zero_grad()
            model(read, labels=read).loss.backward()
            optimizer.step()
    return model


def _draft_three_tokens(model) -> None:
    model.generation_config.num_assistant_tokens = 3
    model.generation_config.assistant_confidence_threshold = 0


def no_cache() -> dict:
    return {"use_cache": False}


def if_cached(new_cache, **options) -> dict:
    """Options that require a cache; without one, plain steps give the expected tokens."""
    return {} if new_cache is no_cache else options


def plain(ids: Tensor = IDS, **options):
    def generate(model, new_cache):
        torch.manual_seed(5)
        return model.generate(ids, **options, **new_cache())

    return generate


MODES = {
    "greedy": plain(**GREEDY),
    "sampling": plain(**SAMPLING),
    "beams": plain(**GREEDY, num_beams=3),
    "beams that end early": plain(
        **GREEDY | {"eos_token_id": list(range(1500, 1700))}, num_beams=4, length_penalty=0.3, early_stopping=True
    ),
    "beam sampling": plain(**SAMPLING, num_beams=3),
    "several samples": plain(**SAMPLING, num_return_sequences=3),
    "several beams": plain(**GREEDY, num_beams=4, num_return_sequences=3),
    "several sampled beams": plain(**SAMPLING, num_beams=3, num_return_sequences=2),
    "penalties": plain(REPETITIVE, **GREEDY, repetition_penalty=1.4, no_repeat_ngram_size=2, bad_words_ids=[[1484]]),
    "guidance": plain(IDS[:1], **GREEDY, guidance_scale=1.5, negative_prompt_ids=IDS[1:]),
    "rows that end at different times": plain(**GREEDY | {"eos_token_id": list(range(1900, 2000))}),
    "max_length": plain(**GREEDY | {"max_new_tokens": None, "max_length": PROMPT + 7}),
    "min_new_tokens": plain(**GREEDY | {"eos_token_id": list(range(1000, 2048))}, min_new_tokens=5),
}


def mode(name: str):
    return lambda generate: MODES.setdefault(name, generate)


@mode("scores and logits")
def scores_and_logits(model, new_cache):
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = plain(**SAMPLING, **wanted)(model, new_cache)
    return output.sequences, torch.stack(output.scores), torch.stack(output.logits)


@mode("scores of beams")
def scores_of_beams(model, new_cache):
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = plain(**GREEDY, num_beams=3, **wanted)(model, new_cache)
    return output.sequences, output.sequences_scores, output.beam_indices, torch.stack(output.scores)


class RaisesOneToken(LogitsProcessor):
    def __call__(self, ids, scores):
        token = (7 * ids[:, -1:] + ids[:, -3:-2]) % scores.shape[1]
        return scores.scatter_add(1, token, torch.full((len(ids), 1), 4.0))


class EndsAtAMultipleOfThree(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        return ids[:, -1] % 3 == 0


@mode("a logits processor of the user's")
def a_logits_processor_of_the_users(model, new_cache):
    return plain(**GREEDY, logits_processor=[RaisesOneToken()])(model, new_cache)


@mode("a stopping criterion of the user's")
def a_stopping_criterion_of_the_users(model, new_cache):
    ids = plain(**GREEDY, stopping_criteria=[EndsAtAMultipleOfThree()])(model, new_cache)
    assert ids.shape[1] < PROMPT + NEW
    return ids


@mode("stop strings")
def stop_strings(model, new_cache):
    # the string starts inside one token and ends inside the next
    middle = tokenizer().decode(plain(IDS[:1], **GREEDY)(model, new_cache)[0, PROMPT + 2 : PROMPT + 4])[1:-1]
    ids = plain(IDS[:1], **GREEDY, stop_strings=[middle], tokenizer=tokenizer())(model, new_cache)
    assert ids.shape[1] < PROMPT + NEW
    assert middle in tokenizer().decode(ids[0])
    return ids


@mode("TextStreamer")
def text_streamer(model, new_cache):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ids = plain(IDS[:1], **GREEDY, streamer=TextStreamer(tokenizer(), skip_prompt=True))(model, new_cache)
    assert printed.getvalue() == tokenizer().decode(ids[0, PROMPT:]) + "\n"
    return printed.getvalue()


@mode("TextIteratorStreamer")
def text_iterator_streamer(model, new_cache):
    streamer = TextIteratorStreamer(tokenizer(), timeout=60)
    thread = threading.Thread(target=plain(IDS[:1], **GREEDY, streamer=streamer), args=(model, new_cache))
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert len(pieces) > 2
    return "".join(pieces)


ROWS = [random_ids(1, length, seed=length) for length in (PROMPT, 4, 8)]
PADDED = torch.cat([torch.nn.functional.pad(row, (PROMPT - row.shape[1], 0)) for row in ROWS])
MASK = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (PROMPT - row.shape[1], 0)) for row in ROWS])


@mode("left padding")
def left_padding(model, new_cache, **options):
    if new_cache is no_cache:
        return torch.cat([model.generate(row, **GREEDY, **options, **no_cache())[:, -NEW:] for row in ROWS])
    return model.generate(PADDED, attention_mask=MASK, **GREEDY, **options, **new_cache())[:, PROMPT:]


@mode("left padding of beams")
def left_padding_of_beams(model, new_cache):
    return left_padding(model, new_cache, num_beams=3)


@mode("chunked prefill")
def chunked_prefill(model, new_cache):
    return model.generate(IDS, **GREEDY, **new_cache(), **if_cached(new_cache, prefill_chunk_size=4))


@mode("chunked prefill of left padding")
def chunked_prefill_of_left_padding(model, new_cache):
    return left_padding(model, new_cache, **if_cached(new_cache, prefill_chunk_size=4))


@contextlib.contextmanager
def candidates_accepted_and_rejected(model, new_cache):
    """Checks that the model computed several tokens in one step, and rejected some of them."""
    lengths, num_layers = [], model.config.num_hidden_layers

    def note(module, args, kwargs):
        # drafts by early exit pass through fewer layers
        if module.config.num_hidden_layers == num_layers:
            lengths.append(kwargs["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
    if new_cache is not no_cache:
        assert len(lengths) < NEW
        assert sum(lengths) > REPETITIVE.shape[1] + NEW - 1


@mode("prompt lookup")
def prompt_lookup(model, new_cache):
    with candidates_accepted_and_rejected(model, new_cache):
        options = if_cached(new_cache, prompt_lookup_num_tokens=3)
        return model.generate(REPETITIVE, **GREEDY, **new_cache(), **options)


@mode("assisted")
def assisted(model, new_cache, **options):
    helped = if_cached(new_cache, assistant_model=assistant())
    with candidates_accepted_and_rejected(model, new_cache):
        return model.generate(REPETITIVE, **GREEDY | options, **new_cache(), **helped)


@mode("assisted sampling")
def assisted_sampling(model, new_cache):
    # candidates use random draws too, so the same seed gives the same tokens only if there is one to draw from
    torch.manual_seed(5)
    return assisted(model, new_cache, do_sample=True, top_k=1)


@mode("early exit")
def early_exit(model, new_cache):
    with candidates_accepted_and_rejected(model, new_cache):
        return model.generate(REPETITIVE, **GREEDY, **new_cache(), **if_cached(new_cache, assistant_early_exit=2))


@mode("embeddings")
def embeddings(model, new_cache):
    embeds = SOFT_PROMPT.to(model.dtype)
    if new_cache is no_cache:
        return tokens_after(model, embeds)
    return model.generate(inputs_embeds=embeds, **GREEDY, **new_cache())


@mode("embeddings and ids")
def embeddings_and_ids(model, new_cache):
    embeds = SOFT_PROMPT.to(model.dtype)
    if new_cache is no_cache:
        return torch.cat((IDS, tokens_after(model, embeds)), dim=1)
    return model.generate(IDS, inputs_embeds=embeds, **GREEDY, **new_cache())


@torch.no_grad()
def tokens_after(model, embeds: Tensor) -> Tensor:
    """Greedy tokens [b NEW] without a cache; after embeddings, `generate` always uses one."""
    new = []
    for _ in range(NEW):
        new.append(model(inputs_embeds=embeds, use_cache=False).logits[:, -1:].argmax(-1))
        embeds = torch.cat((embeds, model.get_input_embeddings()(new[-1])), dim=1)
    return torch.cat(new, dim=1)
