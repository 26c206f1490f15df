"""Every mode of generation with every cache gives the same tokens as the same model without a cache.

The rows of the table are MODES in generation_modes.py and generation_after_prefix.py, and its columns are CACHES.
"""

import contextlib
import copy
import functools

import pytest
import torch
import transformers
from packaging.version import Version
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from deepseek_latent import LatentCache
from deepseek_latent.attention.attention import DeepseekV2Attention
from deepseek_latent.cache.format import latent_format
from tests.model.generation_after_prefix import prefilled
from tests.model.generation_modes import (
    GREEDY,
    IDS,
    MODES,
    NEW,
    PROMPT,
    QUESTIONS,
    REPETITIVE,
    no_cache,
    subject,
    twin_of_transformers,
)

# the length of a static cache is fixed; it must hold the conversation
LONGEST = PROMPT + sum(6 + question.shape[1] for question in QUESTIONS) + 6


def passed_with(cache_dtype: str, **options):
    return lambda model: {"cache": LatentCache(model.config, cache_dtype=cache_dtype, **options)}


def made_with(cache_dtype: str):
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
    "int8": passed_with("int8"),
    "int6": made_with("int6"),
    "int5": passed_with("int5"),
    "int4": made_with("int4"),
    "fp8": made_with("fp8"),
    "static LatentCache": lambda model: {"cache": LatentCache(model.config, max_cache_len=LONGEST)},
    "static int8": lambda model: made_with("int8")(model) | CACHES["static"](model),
    "static int4": passed_with("int4", max_cache_len=LONGEST),
    "static fp8": passed_with("fp8", max_cache_len=LONGEST),
}
CACHE_DTYPES = {name: name for name in ("int8", "int6", "int5", "int4", "fp8")}
CACHE_DTYPES |= {f"static {name}": name for name in ("int8", "int4", "fp8")}
CANDIDATES = (
    "prompt lookup",
    "assisted",
    "assisted sampling",
    "early exit",
    "prompt lookup after a prefix",
    "prompt lookup from the new tokens after a prefix",
)
# since transformers 5.24, assisted decoding also works with a static cache
STATIC_CAN_BE_CROPPED = hasattr(StaticLayer, "crop")
# the cells that are refused, and the errors
REFUSED = {
    **{
        (way, "StaticCache"): (ValueError, "assisted generate is not supported with Static cache")
        for way in CANDIDATES
        if not STATIC_CAN_BE_CROPPED
    },
    # refused by name, before the cache is made; a static LatentCache that the user passes is not refused
    **{
        (way, cache): (ValueError, "assisted generate is not supported with Static cache")
        for way in ("prompt lookup", "assisted", "assisted sampling", "early exit")
        for cache in ("static", "static int8")
        if not STATIC_CAN_BE_CROPPED
    },
    **{
        (way, "fp8 of transformers"): (ValueError, "remove tokens from the cache, which a QuantizedCache cannot")
        for way in CANDIDATES
    },
    # methods that transformers' own caches lack or implement wrongly
    **{
        (way, "StaticCache"): (AttributeError, "'StaticLayer' object has no attribute")
        for way in ("cropping back to a prefix", "one prefix for several rows", "beams after one prefix")
        if not (STATIC_CAN_BE_CROPPED and way == "cropping back to a prefix")
    },
    ("cropping back to a prefix", "fp8 of transformers"): (IndexError, "too many indices"),
    ("one prefix for several rows", "fp8 of transformers"): (RuntimeError, "Sizes of tensors must match"),
    ("beams after one prefix", "fp8 of transformers"): (RuntimeError, "Sizes of tensors must match"),
}
# the first version of transformers that has it, or that no longer reads the prefix a second time
SINCE = {
    "fp8 of transformers": "5.21",
    "chunks after copies of a prefix": "5.21",
    "chunks longer than the prefix before them": "5.21",
    "chunks longer than the padded prefix before them": "5.21",
    "prompt lookup from the new tokens after a prefix": "5.18",
}


# columns that take the same code path as another, run by `make test-slow`
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
    skip = pytest.mark.skipif(is_missing, reason=f"transformers does it correctly since {since}")
    marks = [skip, pytest.mark.slow] if cache in LIKE_ANOTHER else [skip]
    return pytest.param(way, cache, marks=marks, id=f"{way}-{cache}")


# the unconditional side of guidance has a cache of its own, which is not quantized
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
    """float64 for a quantized cache, where the order of a sum hardly ever decides between two codes."""
    return torch.float32 if cache_dtype is None else torch.float64


@functools.cache
def output_without_cache(way: str, cache_dtype: str | None = None):
    with latents_rounded_to(cache_dtype):
        return MODES[way](subject(dtype_for(cache_dtype)), no_cache)


def expected(way: str, cache: str):
    if cache == "fp8 of transformers":
        # its scale comes from the first tokens, which a model without a cache cannot reproduce; the native class can
        model = copy.deepcopy(twin_of_transformers())
        return MODES[way](model, lambda: CACHES[cache](model))
    return output_without_cache(way, CACHE_DTYPES.get(cache))


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
def test_a_cache_changes_no_output(way, cache):
    # after a refused early exit, transformers leaves the model with the layers of the draft
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
def test_the_output_varies(way):
    output = output_without_cache(way)
    output = output[0] if isinstance(output, tuple) else output
    assert len(set(output if isinstance(output, str) else output[:, -5:].flatten().tolist())) > 3


@pytest.mark.parametrize("new_tokens", range(1, 12))
def test_prompt_lookup_fills_a_static_cache_to_its_end(new_tokens):
    """Drafts reach beyond the last token to generate, and a cache that `generate` makes has room for them."""
    model, options = subject(), GREEDY | {"max_new_tokens": new_tokens}
    expected = model.generate(REPETITIVE, **options)
    if STATIC_CAN_BE_CROPPED:
        by_name = {"prompt_lookup_num_tokens": 4, "cache_implementation": "static"}
        assert torch.equal(model.generate(REPETITIVE, **options, **by_name), expected)
    length = REPETITIVE.shape[1] + new_tokens - 1
    options |= {"prompt_lookup_num_tokens": 4}
    roomy, narrow = (LatentCache(model.config, max_cache_len=length + more) for more in (4, 3))
    assert torch.equal(model.generate(REPETITIVE, **options, cache=roomy), expected)
    with pytest.raises(ValueError, match=f"room for {length + 3} tokens and would have to hold {length + 4}"):
        model.generate(REPETITIVE, **options, cache=narrow)


@pytest.mark.parametrize("cache_dtype", ["int8", "int6", "int5", "int4", "fp8"])
def test_both_ways_to_request_a_cache_dtype_make_the_same_cache(cache_dtype):
    model = subject()
    made = prefilled(model, lambda: made_with(cache_dtype)(model), IDS)
    passed = prefilled(model, lambda: passed_with(cache_dtype)(model), IDS)
    assert type(made) is type(passed) is LatentCache
    assert made.cache_dtype == passed.cache_dtype == cache_dtype
    for one, other in zip(made.layers, passed.layers, strict=True):
        assert torch.equal(one.rows(), other.rows())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is refused without CUDA only")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_without_cuda_is_refused(implementation):
    with pytest.raises(ValueError, match=r"offloaded .*CUDA"):
        subject().generate(IDS, **GREEDY, cache_implementation=implementation)


COMPILED = {
    "greedy": [NEW - 1],
    "left padding": [NEW - 1],
    "sampling": [NEW - 1],
    # there is a graph for the empty cache, one for the filled one, and one for the shorter last chunk
    "chunked prefill": [1, 1, 1, NEW - 1],
}


inductor_views_bytes = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"),
    reason="inductor of torch 2.10 cannot view the single scale of a row as bytes if a latent has one plane",
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
    output = MODES[way](model, lambda: CACHES[cache](model) | {"compile_config": compile_config})
    assert_same(output, output_without_cache(way, CACHE_DTYPES.get(cache)))
    assert runs == COMPILED[way]
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
