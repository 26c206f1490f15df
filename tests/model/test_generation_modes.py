"""Every way to generate, from every cache: token for token what the same model says without any cache.

A row of the table (MODES) is a function of a model and of `new_cache`, which makes the options by which `generate`
comes to the cache of the column (CACHES). A way that cannot do without a cache has to say what plain steps say.
"""

import contextlib
import copy
import functools
import io
import threading
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from transformers import (
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.cache_utils import StaticLayer

from deepseek_latent import LatentCache
from deepseek_latent.attention.attention import DeepseekV2Attention
from deepseek_latent.cache.format import latent_format
from tests.support import native_twin, random_ids, seeded, tiny_model

PROMPT, NEW = 11, 10
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SAMPLING = GREEDY | {"do_sample": True, "temperature": 1.3, "top_k": 50, "top_p": 0.95}
IDS = random_ids(2, PROMPT)
QUESTIONS = [random_ids(2, length, seed=length) for length in (3, 6, 1)]
# `subject` continues it with tokens that stand in it, but not always with those that follow there
REPETITIVE = random_ids(1, 4, seed=1).repeat(1, 3)
# embeddings that belong to no token
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
    """One layer of other widths that has read the first half of what `subject` says: it guesses right, then wrong."""
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
    """What needs a cache; without one, plain steps say which tokens are right."""
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


class RaisesATokenOfItsOwn(LogitsProcessor):
    def __call__(self, ids, scores):
        token = (7 * ids[:, -1:] + ids[:, -3:-2]) % scores.shape[1]
        return scores.scatter_add(1, token, torch.full((len(ids), 1), 4.0))


class EndsAtAMultipleOfThree(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        return ids[:, -1] % 3 == 0


@mode("a logits processor of the user's")
def a_logits_processor_of_the_users(model, new_cache):
    return plain(**GREEDY, logits_processor=[RaisesATokenOfItsOwn()])(model, new_cache)


@mode("a stopping criterion of the user's")
def a_stopping_criterion_of_the_users(model, new_cache):
    ids = plain(**GREEDY, stopping_criteria=[EndsAtAMultipleOfThree()])(model, new_cache)
    assert ids.shape[1] < PROMPT + NEW
    return ids


@mode("stop strings")
def stop_strings(model, new_cache):
    # begins inside a token and ends inside the next
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
    """Counts the tokens that pass through the model: several in one step, and some of which nothing remains."""
    lengths, num_layers = [], model.config.num_hidden_layers

    def note(module, args, kwargs):
        # a draft by early exit passes fewer layers
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
    # draws are spent on candidates too, so only among one token does the same seed draw the same
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
        return said_after(model, embeds)
    return model.generate(inputs_embeds=embeds, **GREEDY, **new_cache())


@mode("embeddings and ids")
def embeddings_and_ids(model, new_cache):
    embeds = SOFT_PROMPT.to(model.dtype)
    if new_cache is no_cache:
        return torch.cat((IDS, said_after(model, embeds)), dim=1)
    return model.generate(IDS, inputs_embeds=embeds, **GREEDY, **new_cache())


@torch.no_grad()
def said_after(model, embeds: Tensor) -> Tensor:
    """Greedy tokens [b NEW]; `generate` always caches behind embeddings."""
    new = []
    for _ in range(NEW):
        new.append(model(inputs_embeds=embeds, use_cache=False).logits[:, -1:].argmax(-1))
        embeds = torch.cat((embeds, model.get_input_embeddings()(new[-1])), dim=1)
    return torch.cat(new, dim=1)


def prefilled(model, new_cache, ids: Tensor, **options):
    """The cache of the column, holding `ids`."""
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
    said = [model.generate(prompt, **GREEDY, **options, cache=copy.deepcopy(prefix)) for prompt in prompts]
    return torch.cat(said, dim=1)


@mode("chunks behind copies of a prefix")
def chunks_behind_copies_of_a_prefix(model, new_cache):
    return copies_of_a_prefix(model, new_cache, **if_cached(new_cache, prefill_chunk_size=2))


@mode("chunks longer than the prefix before them")
def chunks_longer_than_the_prefix_before_them(model, new_cache):
    return copies_of_a_prefix(model, new_cache, length=3, **if_cached(new_cache, prefill_chunk_size=5))


@mode("left padding behind a prefix")
def left_padding_behind_a_prefix(model, new_cache, length: int = 8, **options):
    if new_cache is no_cache:
        return left_padding(model, new_cache)
    cache = prefilled(model, new_cache, PADDED[:, :length], attention_mask=MASK[:, :length])
    options |= GREEDY | {"attention_mask": MASK, "cache": cache}
    return model.generate(PADDED, **options)[:, PROMPT:]


@mode("chunks longer than the padded prefix before them")
def chunks_longer_than_the_padded_prefix_before_them(model, new_cache):
    return left_padding_behind_a_prefix(model, new_cache, length=3, **if_cached(new_cache, prefill_chunk_size=5))


@mode("cropping back to a prefix")
def cropping_back_to_a_prefix(model, new_cache):
    if new_cache is no_cache:
        return copies_of_a_prefix(model, new_cache)
    cache, said = prefilled(model, new_cache, IDS), []
    for question in QUESTIONS:
        said.append(model.generate(torch.cat((IDS, question), dim=1), **GREEDY, cache=cache))
        cache.crop(PROMPT - cache.get_seq_length())
    return torch.cat(said, dim=1)


@mode("one prefix for several rows")
def one_prefix_for_several_rows(model, new_cache):
    """And again from a part of it, in which the rows have nothing of their own."""
    prompts = [torch.cat((IDS[:1, :kept].expand(2, -1), QUESTIONS[0]), dim=1) for kept in (PROMPT, PROMPT - 4)]
    if new_cache is no_cache:
        return torch.cat([model.generate(prompt, **GREEDY, **no_cache()) for prompt in prompts], dim=1)
    cache = prefilled(model, new_cache, IDS[:1])
    cache.batch_repeat_interleave(2)
    first = model.generate(prompts[0], **GREEDY, cache=cache)
    cache.crop(PROMPT - 4 - cache.get_seq_length())
    return torch.cat((first, model.generate(prompts[1], **GREEDY, cache=cache)), dim=1)


@mode("beams behind one prefix")
def beams_behind_one_prefix(model, new_cache):
    prompt = torch.cat((IDS[:1], QUESTIONS[0][:1]), dim=1)
    if new_cache is no_cache:
        return model.generate(prompt, **GREEDY, num_beams=3, **no_cache())
    cache = prefilled(model, new_cache, IDS[:1])
    cache.batch_repeat_interleave(3)
    return model.generate(prompt, **GREEDY, num_beams=3, cache=cache)


@mode("prompt lookup behind a prefix")
def prompt_lookup_behind_a_prefix(model, new_cache, given: slice = slice(None)):
    if new_cache is no_cache:
        return model.generate(REPETITIVE, **GREEDY, **no_cache())[:, given]
    cache = prefilled(model, new_cache, REPETITIVE[:, :8])
    options = {"attention_mask": torch.ones_like(REPETITIVE), "prompt_lookup_num_tokens": 3}
    return model.generate(REPETITIVE[:, given], **GREEDY, **options, cache=cache)


@mode("prompt lookup from the new tokens behind a prefix")
def prompt_lookup_from_the_new_tokens_behind_a_prefix(model, new_cache):
    return prompt_lookup_behind_a_prefix(model, new_cache, given=slice(8, None))


@mode("conversation")
def conversation(model, new_cache, only_what_is_new: bool = False):
    said, options = IDS[:, :0], new_cache()
    for turn in (IDS, *QUESTIONS):
        # the last token said is not in the cache, since nothing came after it
        cached = said.shape[1] - 1 if only_what_is_new and said.shape[1] else 0
        said = torch.cat((said, turn), dim=1)
        options |= {"attention_mask": torch.ones_like(said), "return_dict_in_generate": True}
        output = model.generate(said[:, cached:], **GREEDY | {"max_new_tokens": 6}, **options)
        said = torch.cat((said[:, :cached], output.sequences), dim=1)
        options = no_cache() if new_cache is no_cache else {"cache": output.cache}
    return said


@mode("conversation in new tokens")
def conversation_in_new_tokens(model, new_cache):
    return conversation(model, new_cache, only_what_is_new=new_cache is not no_cache)


# a static cache is of one length for good: here the conversation's
LONGEST = PROMPT + sum(6 + question.shape[1] for question in QUESTIONS) + 6


def rounding_passed(cache_dtype: str, **options):
    return lambda model: {"cache": LatentCache(model.config, cache_dtype=cache_dtype, **options)}


def rounding_made(cache_dtype: str):
    return lambda model: {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "latent", "cache_dtype": cache_dtype},
    }


CACHES = {
    "the default": lambda model: {},
    "dynamic": lambda model: {"cache_implementation": "dynamic"},
    "static": lambda model: {"cache_implementation": "static", "max_cache_len": LONGEST},
    "LatentCache": lambda model: {"cache": LatentCache(model.config)},
    "DynamicCache": lambda model: {"cache": DynamicCache()},
    "StaticCache": lambda model: {"cache": StaticCache(model.config, max_cache_len=LONGEST)},
    "fp8 of transformers": lambda model: {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "int8": rounding_passed("int8"),
    "int6": rounding_made("int6"),
    "int5": rounding_passed("int5"),
    "int4": rounding_made("int4"),
    "fp8": rounding_made("fp8"),
    "static LatentCache": lambda model: {"cache": LatentCache(model.config, max_cache_len=LONGEST)},
    "static int8": lambda model: rounding_made("int8")(model) | CACHES["static"](model),
    "static int4": rounding_passed("int4", max_cache_len=LONGEST),
    "static fp8": rounding_passed("fp8", max_cache_len=LONGEST),
}
CACHE_DTYPES = {name: name for name in ("int8", "int6", "int5", "int4", "fp8")}
CACHE_DTYPES |= {f"static {name}": name for name in ("int8", "int4", "fp8")}

CANDIDATES = (
    "prompt lookup",
    "assisted",
    "assisted sampling",
    "early exit",
    "prompt lookup behind a prefix",
    "prompt lookup from the new tokens behind a prefix",
)
# since transformers 5.24, which also drafts and takes back behind a static cache
STATIC_CAN_BE_CROPPED = hasattr(StaticLayer, "crop")
# what is refused instead, in which words
REFUSED = {
    **{
        (way, "StaticCache"): (ValueError, "assisted generate is not supported with Static cache")
        for way in CANDIDATES
        if not STATIC_CAN_BE_CROPPED
    },
    # by its name, before it is made; not a static LatentCache that is given
    **{
        (way, cache): (ValueError, "assisted generate is not supported with Static cache")
        for way in ("prompt lookup", "assisted", "assisted sampling", "early exit")
        for cache in ("static", "static int8")
        if not STATIC_CAN_BE_CROPPED
    },
    **{
        (way, "fp8 of transformers"): (ValueError, "take tokens back, which a QuantizedCache cannot")
        for way in CANDIDATES
    },
    # methods that the user calls and transformers' own caches do not have, or do not have right
    **{
        (way, "StaticCache"): (AttributeError, "'StaticLayer' object has no attribute")
        for way in ("cropping back to a prefix", "one prefix for several rows", "beams behind one prefix")
        if not (STATIC_CAN_BE_CROPPED and way == "cropping back to a prefix")
    },
    ("cropping back to a prefix", "fp8 of transformers"): (IndexError, "too many indices"),
    ("one prefix for several rows", "fp8 of transformers"): (RuntimeError, "Sizes of tensors must match"),
    ("beams behind one prefix", "fp8 of transformers"): (RuntimeError, "Sizes of tensors must match"),
}
# the transformers that first has it, or no longer reads the beginning of the prompt a second time
SINCE = {
    "fp8 of transformers": "5.21",
    "chunks behind copies of a prefix": "5.21",
    "chunks longer than the prefix before them": "5.21",
    "chunks longer than the padded prefix before them": "5.21",
    "prompt lookup from the new tokens behind a prefix": "5.18",
}


# columns that take the same path as one beside them, run by `make test-slow`
LIKE_ANOTHER = (
    "DynamicCache",
    "StaticCache",
    "int5",
    "fp8 of transformers",
    "static LatentCache",
    "static int4",
    "static fp8",
)


def cell(way: str, cache: str):
    since = max((SINCE.get(name, "0") for name in (way, cache)), key=Version)
    is_missing = Version(transformers.__version__) < Version(since)
    skip = pytest.mark.skipif(is_missing, reason=f"transformers does it right since {since}")
    marks = [skip, pytest.mark.slow] if cache in LIKE_ANOTHER else [skip]
    return pytest.param(way, cache, marks=marks, id=f"{way}-{cache}")


# the side of guidance that sees no prompt has a cache of its own, which rounds nothing
CELLS = [cell(way, cache) for way in MODES for cache in CACHES if way != "guidance" or cache not in CACHE_DTYPES]


@contextlib.contextmanager
def latents_rounded_to(cache_dtype: str | None):
    """Attention reads latents and rotary keys rounded as `cache_dtype` rounds them, although nothing is cached."""
    compute = DeepseekV2Attention.project

    def compute_and_round(self, *args):
        *queries, latent, k_rotary = compute(self, *args)
        widths = latent.shape[-1], k_rotary.shape[-1]
        rounding = latent_format(cache_dtype, *widths, latent.dtype)
        return *queries, *rounding.decode(rounding.encode(latent, k_rotary), latent.dtype).split(widths, dim=-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepseekV2Attention, "project", compute_and_round)
        yield


def dtype_for(cache_dtype: str | None) -> torch.dtype:
    """The dtype to compute in: in float64, the order of a sum hardly ever decides between two codes."""
    return torch.float32 if cache_dtype is None else torch.float64


@functools.cache
def said_without_cache(way: str, cache_dtype: str | None = None):
    with latents_rounded_to(cache_dtype):
        return MODES[way](subject(dtype_for(cache_dtype)), no_cache)


def expected(way: str, cache: str):
    if cache == "fp8 of transformers":
        # its scale is that of the first tokens, which no model without a cache has: transformers' own has it too
        model = copy.deepcopy(twin_of_transformers())
        return MODES[way](model, lambda: CACHES[cache](model))
    return said_without_cache(way, CACHE_DTYPES.get(cache))


def assert_same(actual, expected) -> None:
    if isinstance(expected, tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, str):
        assert actual == expected
    elif expected.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    else:
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize(("way", "cache"), CELLS)
def test_a_cache_changes_nothing_that_is_said(way, cache):
    # transformers leaves a model that it could not generate from with the layers of its draft
    model = copy.deepcopy(subject(dtype_for(CACHE_DTYPES.get(cache))))

    def new_cache():
        return CACHES[cache](model)

    if (way, cache) in REFUSED:
        error, sentence = REFUSED[way, cache]
        with pytest.raises(error, match=sentence):
            MODES[way](model, new_cache)
    else:
        assert_same(MODES[way](model, new_cache), expected(way, cache))


@pytest.mark.parametrize("way", MODES)
def test_what_is_said_varies(way):
    said = said_without_cache(way)
    said = said[0] if isinstance(said, tuple) else said
    assert len(set(said if isinstance(said, str) else said[:, -5:].flatten().tolist())) > 3


@pytest.mark.parametrize("new_tokens", range(1, 12))
def test_prompt_lookup_goes_to_the_end_of_a_static_cache(new_tokens):
    """Drafts reach beyond the last token that is to be said, and what `generate` makes has room for them."""
    model, options = subject(), GREEDY | {"max_new_tokens": new_tokens}
    said = model.generate(REPETITIVE, **options)
    if STATIC_CAN_BE_CROPPED:
        by_name = {"prompt_lookup_num_tokens": 4, "cache_implementation": "static"}
        assert torch.equal(model.generate(REPETITIVE, **options, **by_name), said)
    length = REPETITIVE.shape[1] + new_tokens - 1
    options |= {"prompt_lookup_num_tokens": 4}
    roomy, narrow = (LatentCache(model.config, max_cache_len=length + more) for more in (4, 3))
    assert torch.equal(model.generate(REPETITIVE, **options, cache=roomy), said)
    with pytest.raises(ValueError, match=f"room for {length + 3} tokens and would have to hold {length + 4}"):
        model.generate(REPETITIVE, **options, cache=narrow)


@pytest.mark.parametrize("cache_dtype", ["int8", "int6", "int5", "int4", "fp8"])
def test_both_ways_to_ask_for_a_cache_dtype_make_the_same_cache(cache_dtype):
    model = subject()
    made = prefilled(model, lambda: rounding_made(cache_dtype)(model), IDS)
    passed = prefilled(model, lambda: rounding_passed(cache_dtype)(model), IDS)
    assert type(made) is type(passed) is LatentCache
    assert made.cache_dtype == passed.cache_dtype == cache_dtype
    for one, other in zip(made.layers, passed.layers, strict=True):
        assert torch.equal(one.rows(), other.rows())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA it is not refused")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_without_cuda_is_refused(implementation):
    with pytest.raises(ValueError, match=r"offloaded .*CUDA"):
        subject().generate(IDS, **GREEDY, cache_implementation=implementation)


COMPILED = {
    "greedy": [NEW - 1],
    "left padding": [NEW - 1],
    "sampling": [NEW - 1],
    # the first chunk finds an empty cache, the second a filled one, and the last is shorter
    "chunked prefill": [1, 1, 1, NEW - 1],
}


inductor_views_bytes = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"),
    reason="inductor of torch 2.10 refuses to view one scale of a row as bytes, where a latent has one plane",
)


def as_recorded(graph, inputs):
    return graph


@pytest.mark.parametrize(
    ("way", "cache", "compile_graph"),
    [
        *((way, "static", as_recorded) for way in COMPILED),
        *((way, cache, as_recorded) for way in ("greedy", "left padding") for cache in ("static int8", "StaticCache")),
        ("greedy", "static", compile_fx),
        pytest.param("greedy", "static int8", compile_fx, marks=inductor_views_bytes),
    ],
)
def test_a_static_cache_decodes_in_one_compiled_graph(way, cache, compile_graph):
    torch.compiler.reset()
    counters.clear()
    runs = []

    def compile_and_count(graph, inputs):
        number, compiled = len(runs), compile_graph(graph, inputs)
        runs.append(0)

        def run(*args):
            runs[number] += 1
            return compiled(*args)

        return run

    compile_config = CompileConfig(fullgraph=True, backend=compile_and_count, mode=None)
    compile_config._compile_all_devices = True
    model = copy.deepcopy(subject())
    if cache in CACHE_DTYPES:
        model = model.double()
    said = MODES[way](model, lambda: CACHES[cache](model) | {"compile_config": compile_config})
    assert_same(said, said_without_cache(way, CACHE_DTYPES.get(cache)))
    assert runs == COMPILED[way]
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
