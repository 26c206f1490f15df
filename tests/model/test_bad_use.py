"""Wrong use of a cache is refused by one sentence with both sides, before anything is written to the cache."""

import contextlib
import copy

import pytest
import torch
from transformers import CompileConfig, DeepseekV3Config, DynamicCache, LlamaConfig, StaticCache

from deepseek_latent import DeepseekV2Config, LatentCache
from tests.support import V2, random_ids, tiny_model

HELD = 9
IDS = random_ids(2, HELD)
LONGER = torch.cat((IDS, random_ids(2, 3, seed=5)), dim=1)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CACHES = {
    "LatentCache": lambda config: LatentCache(config),
    "int8": lambda config: LatentCache(config, cache_dtype="int8"),
    "DynamicCache": lambda config: DynamicCache(config=config),
    "StaticCache": lambda config: StaticCache(config, max_cache_len=30),
}
EVERY_CACHE = pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
OURS = pytest.mark.parametrize("make", [CACHES["LatentCache"], CACHES["int8"]], ids=["LatentCache", "int8"])
GROWING = [name for name in CACHES if name != "StaticCache"]  # a StaticCache also counts its tokens in a tensor


@torch.no_grad()
def filled(make, model, ids=IDS):
    cache = make(model.config)
    model(ids, cache=cache)
    return cache


@torch.no_grad()
def step(model, cache, batch: int = 2, tokens: int = 1, **options):
    return model(random_ids(batch, tokens).to(model.device), cache=cache, **options)


def answer(model, cache, ids=LONGER, **options):
    return model.generate(ids, **GREEDY, **options, cache=cache)


def lengths(cache) -> list[int]:
    return [int(layer.get_seq_length()) for layer in cache.layers]


@contextlib.contextmanager
def refused(sentence: str, cache=None, error=ValueError):
    """Expects an error with one sentence, and no change to `cache`."""
    before = None if cache is None else lengths(cache)
    with pytest.raises(error, match=sentence) as caught:
        yield
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text
    assert cache is None or lengths(cache) == before


@EVERY_CACHE
@pytest.mark.parametrize("use", [step, answer])
def test_a_cache_of_other_widths_is_refused(use, make):
    cache = filled(make, tiny_model(kv_lora_rank=24, qk_rope_head_dim=16))
    with refused(r"\(2, 24, 16\).*\(2, 40, 8\)", cache):
        use(tiny_model(), cache)


@EVERY_CACHE
@pytest.mark.parametrize("num_layers", [2, 5])
@pytest.mark.parametrize("use", [step, answer])
def test_a_cache_of_another_number_of_layers_is_refused(use, num_layers, make):
    cache = filled(make, tiny_model(num_hidden_layers=num_layers))
    with refused(f"this cache has {num_layers} layers and the model has 3", cache):
        use(tiny_model(), cache)


@OURS
@pytest.mark.parametrize("num_layers", [2, 5])
def test_an_empty_cache_of_another_number_of_layers_is_refused(num_layers, make):
    cache = make(tiny_model(num_hidden_layers=num_layers).config)
    with refused(f"this cache has {num_layers} layers and the model has 3", cache):
        step(tiny_model(), cache)


@EVERY_CACHE
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_another_batch_than_the_cache_holds_is_refused(batch, tokens, make):
    model = tiny_model()
    cache = filled(make, model)
    with refused(rf"\(2, 40, 8\).*\({batch}, 40, 8\)", cache):
        step(model, cache, batch, tokens)


@EVERY_CACHE
def test_beams_with_a_cache_of_single_sequences_are_refused(make):
    model = tiny_model()
    cache = filled(make, model)
    with refused(r"\(2, 40, 8\).*\(6, 40, 8\).*batch_repeat_interleave", cache):
        answer(model, cache, num_beams=3)


@OURS
def test_cropping_more_tokens_than_are_held_is_refused(make):
    cache = filled(make, tiny_model())
    with refused("cannot forget 10 tokens, the cache holds 9", cache):
        cache.crop(-10)


@OURS
def test_cropping_to_a_length_is_refused_with_the_right_call(make):
    cache = filled(make, tiny_model())
    with refused(r"crop takes minus .* to keep the first 4 of 9 tokens, crop\(-5\)", cache):
        cache.crop(4)


def compiled() -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"prefill_chunk_size": 3}, {"compile_config": compiled()}],
    ids=["greedy", "beams", "chunks", "compiled"],
)
@pytest.mark.parametrize("room", [7, 15], ids=["prompt", "answer"])
def test_a_static_cache_without_room_for_the_answer_is_refused_before_the_first_step(room, options):
    model = tiny_model()
    cache = StaticCache(model.config, max_cache_len=room)
    with refused(f"static cache has room for {room} tokens and would have to hold 16.*max_cache_len", cache):
        answer(model, cache, **options)


def test_a_static_cache_without_room_for_the_next_turn_is_refused_before_the_first_step():
    model = tiny_model()
    cache = filled(CACHES["StaticCache"], model)
    with refused("static cache has room for 30 tokens and would have to hold 31", cache):
        answer(model, cache, torch.cat((LONGER, LONGER, LONGER[:, :3]), dim=1))


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_static_cache_that_is_full_is_not_continued(tokens):
    model = tiny_model()
    cache = StaticCache(model.config, max_cache_len=HELD)
    step(model, cache, tokens=HELD)
    with refused(f"static cache has room for 9 tokens and would have to hold {9 + tokens}", cache):
        step(model, cache, tokens=tokens)


def test_a_static_cache_of_exactly_the_length_is_not_refused():
    model = tiny_model()
    cache = StaticCache(model.config, max_cache_len=LONGER.shape[1] + 4)
    assert answer(model, cache).shape[1] == LONGER.shape[1] + 5


@pytest.mark.parametrize("make", [CACHES[name] for name in GROWING], ids=GROWING)
def test_a_cache_on_another_device_is_refused(make):
    model = tiny_model()
    cache = filled(make, model)
    with refused("this cache is on cpu, the new tokens are on meta", cache):
        step(copy.deepcopy(model).to("meta"), cache)


@EVERY_CACHE
def test_a_cache_of_a_wider_dtype_is_refused(make):
    cache = filled(make, tiny_model())
    with refused("this cache holds torch.float32, the new tokens are torch.bfloat16", cache):
        step(tiny_model(torch.bfloat16), cache)


@torch.no_grad()
def test_a_static_cache_filled_under_autocast_continues_there_and_is_refused_outside():
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        cache = filled(CACHES["StaticCache"], model)
        step(model, cache)
    with pytest.raises(ValueError, match=r"holds torch\.bfloat16, the new tokens are torch\.float32"):
        step(model, cache)
    assert cache.get_seq_length() == HELD + 1


def test_a_static_cache_of_a_narrower_dtype_is_refused():
    cache = filled(CACHES["StaticCache"], tiny_model(torch.bfloat16))
    with refused("this cache holds torch.bfloat16, the new tokens are torch.float32", cache):
        step(tiny_model(), cache)


@pytest.mark.parametrize(
    "not_a_cache", [((IDS, IDS),), [(IDS, IDS)], "static", LatentCache], ids=["tuple", "list", "name", "class"]
)
@pytest.mark.parametrize("use", [step, answer])
def test_what_is_not_a_cache_is_refused(use, not_a_cache):
    with pytest.raises((TypeError, ValueError), match=r"expected a Cache as cache"):
        use(tiny_model(), not_a_cache)


@EVERY_CACHE
def test_a_cache_together_with_cache_implementation_is_refused(make):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"both `cache_implementation` .* and `(cache|past_key_values)`"):
        answer(model, filled(make, model), cache_implementation="dynamic")


@EVERY_CACHE
@pytest.mark.parametrize("given", [IDS, IDS[:, :5], LONGER[:, HELD:]], ids=["all held", "less", "new without mask"])
def test_a_prompt_without_new_tokens_is_refused(given, make):
    model = tiny_model()
    cache = filled(make, model)
    with refused(rf"this cache holds 9 tokens and the prompt has {given.shape[1]}\b.*attention_mask", cache):
        answer(model, cache, given)


@EVERY_CACHE
def test_a_mask_shorter_than_the_cache_is_named_when_it_is_refused(make):
    model = tiny_model()
    cache = filled(make, model)
    with refused(r"this cache holds 9 tokens and the prompt has 7 by its attention_mask", cache):
        answer(model, cache, attention_mask=torch.ones(2, 7, dtype=torch.long))


@EVERY_CACHE
def test_a_cache_with_use_cache_false_is_refused(make):
    model = tiny_model()
    cache = filled(make, model)
    with refused("use_cache=False, got one that holds 9 tokens", cache):
        answer(model, cache, use_cache=False)


@pytest.mark.parametrize("make", [CACHES[name] for name in GROWING], ids=GROWING)
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_cache_with_unequal_layers_is_refused(tokens, make):
    model = tiny_model()
    cache = filled(make, model)
    for i in range(2):
        cache.update(torch.zeros(2, 1, 1, 40), torch.zeros(2, 1, 1, 8), i)
    assert lengths(cache) == [10, 10, 9]
    with refused(r"this cache holds 10 tokens in one layer and 9 in another", cache):
        step(model, cache, tokens=tokens)


@pytest.mark.parametrize("cache_dtype", [8, 16, "8", True, 8.0, "int7", torch.int8], ids=repr)
def test_an_unknown_cache_dtype_is_refused(cache_dtype):
    with refused(f"cache_dtype must be None .*, 'int8', 'int6', 'int5', 'int4' or 'fp8', got {cache_dtype!r}"):
        LatentCache(tiny_model().config, cache_dtype=cache_dtype)


@pytest.mark.parametrize("name", ["bits", "nbits"])
def test_a_number_of_bits_is_refused_with_the_name_of_the_argument_to_use(name):
    with refused(f"LatentCache takes cache_dtype, such as 'int8' or 'fp8', in place of {name}=8", error=TypeError):
        LatentCache(tiny_model().config, **{name: 8})


def test_an_unknown_argument_is_refused_by_its_name():
    with refused("LatentCache got an unexpected keyword argument 'length'; it takes config", error=TypeError):
        LatentCache(tiny_model().config, length=8)
    with refused("argument 'cachedtype'; the nearest that it takes is 'cache_dtype'", error=TypeError):
        LatentCache(tiny_model().config, cachedtype="int8")


@pytest.mark.parametrize(
    ("cache_config", "sentence"),
    [
        ({"backend": "latent"}, "the latent backend takes .*cache_dtype.*, got"),
        ({"backend": "latent", "cache_dtype": None}, "the latent backend takes .*cache_dtype.*, got"),
        ({"backend": "latent", "nbits": 8}, "the latent backend takes cache_dtype in place of nbits, as in .*, got"),
        ({"backend": "latent", "bits": 8}, "the latent backend takes cache_dtype in place of bits, as in .*, got"),
        (
            {"backend": "latent", "cache_dtype": "int8", "residual_length": 128},
            "the latent backend takes .*, got .*residual_length",
        ),
        ({"backend": "latent", "cache_dtype": 8}, "cache_dtype must be .* got 8"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_a_wrong_cache_config_is_refused(cache_config, sentence):
    with refused(sentence):
        tiny_model().generate(IDS, **GREEDY, cache_implementation="quantized", cache_config=cache_config)


def test_a_cache_dtype_without_a_quantized_cache_is_refused():
    with refused('the latent backend needs cache_implementation="quantized" or "static", got None'):
        tiny_model().generate(IDS, **GREEDY, cache_config={"backend": "latent", "cache_dtype": "int8"})


@pytest.mark.parametrize("cache_implementation", [None, "static"])
@pytest.mark.parametrize("cache_config", [{"cache_dtype": "int8"}, {"nbits": 4}], ids=str)
def test_a_cache_config_that_nothing_would_read_is_refused(cache_implementation, cache_config):
    with refused("cache_config needs a backend, such as .*latent"):
        tiny_model().generate(IDS, **GREEDY, cache_implementation=cache_implementation, cache_config=cache_config)


@pytest.mark.parametrize("config", [3, {"num_hidden_layers": 3}, tiny_model()], ids=["number", "dict", "model"])
def test_a_cache_that_is_not_made_from_a_config_is_refused(config):
    with refused(
        "expected a model's config to make a LatentCache from, got (int|dict|DeepseekV2ForCausalLM)", error=TypeError
    ):
        LatentCache(config)


@pytest.mark.parametrize("config_class", [LlamaConfig, DeepseekV3Config], ids=lambda x: x.__name__)
def test_a_cache_for_another_model_is_refused(config_class):
    with refused(f"expected the config of a DeepSeek-V2.*got model_type '{config_class.model_type}'"):
        LatentCache(config_class())


def test_keys_and_values_of_several_heads_are_refused():
    cache = LatentCache(DeepseekV2Config(**V2))
    with refused("expected one latent and one rotary key per token.*of 2 and 2 heads", cache):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)


def test_a_gradient_through_a_quantized_cache_is_refused():
    model = tiny_model()
    cache = filled(CACHES["int8"], model)
    with refused("quantized to int8 carry no gradient.*no_grad", cache):
        model(IDS, cache=cache)


def test_a_refusal_leaves_an_empty_cache_empty_and_keeps_the_dtype_of_a_filled_one():
    model = tiny_model()
    cache = LatentCache(model.config, cache_dtype="int8")
    with refused("quantized to int8 carry no gradient", cache):
        model(IDS, cache=cache)
    assert repr(cache) == "LatentCache(layers=3, empty)"
    # so the cache can be filled by another batch
    filled(lambda config: cache, model, random_ids(1, 4))
    narrow = filled(CACHES["int8"], tiny_model(torch.bfloat16))
    with refused("quantized to int8 carry no gradient", narrow):
        model(random_ids(2, 1), cache=narrow)
    assert {layer.dtype for layer in narrow.layers} == {torch.bfloat16}
