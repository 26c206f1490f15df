"""DeepSeek-V2's window of 163,840 positions, which YaRN extends from 4,096: frequencies, angles, logits.

Rotary positions are relative, so moving all tokens by 100,000 changes only the size of the angles. If logits change,
the angles have lost precision, and they must not. Attention between distant tokens is tested with explicit positions,
and with a cache that holds the whole window.
"""

import functools
import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from deepseek_latent import DeepseekV2Config, LatentCache
from deepseek_latent.attention import attention as latent_attention
from deepseek_latent.attention.rotary import softmax_scale
from deepseek_latent.compat.cache_name import CACHE
from tests import reference
from tests.reference.attention import queries_and_latents, up_projections
from tests.reference.layers import feed_forward, in_float64, linear, rms_norm, weights_under
from tests.support import (
    assert_within_rounding,
    native_twin,
    official_state_dict,
    random_ids,
    relative_error,
    tiny_model,
)

WINDOW = 163_840
# rope_scaling of deepseek-ai/DeepSeek-V2
PUBLISHED = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
MSCALES = {"mscale": 1.0, "mscale_all_dim": 0.0}  # their defaults
# dense, since a router near a tie may choose another expert because of a tiny error of an angle
LONG = {
    "rope_scaling": PUBLISHED,
    "rope_theta": 10000.0,
    "max_position_embeddings": WINDOW,
    "qk_rope_head_dim": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
}
# several prompts, since the error of a single one varies
B, S = 8, 17
PLACES = {
    "at the start": torch.arange(S),
    "around 4,096": 4095 + torch.arange(S),
    "at 100,000": 100_000 + torch.arange(S),
    "at the end": WINDOW - S + torch.arange(S),
    "half at the start, half at 163,000": torch.cat((torch.arange(8), 163_000 + torch.arange(S - 8))),
    "all over the window": torch.linspace(0, WINDOW - 1, S).long(),
}


@functools.cache
def subject():
    """A small model in which positions matter: rotary queries and keys are three times as large as the others."""
    model = tiny_model(**LONG)
    n, r = model.config.qk_nope_head_dim, model.config.qk_rope_head_dim
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_b_proj.weight.unflatten(0, (-1, n + r))[:, n:] *= 3
            layer.self_attn.kv_a_proj_with_mqa.weight[-r:] *= 3
    return model


def with_exact_angles(twin):
    """transformers' own class with exact angles from the reference: it has only the rounding of float32."""

    def exact_rotations(x: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids[..., None] * reference.inverse_frequencies(twin.config)
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    twin.model.rotary_emb.forward = exact_rotations
    return twin


@functools.cache
def twin():
    return with_exact_angles(native_twin(subject()))


@functools.cache
def exact(place: str) -> Tensor:
    return reference.logits(
        subject().config, official_state_dict(subject()), random_ids(B, S), PLACES[place].expand(B, S)
    )


@functools.cache
def yardstick(place: str) -> Tensor:
    """A run in float32 with exact angles, whose error the others are compared to."""
    with torch.no_grad():
        return twin()(random_ids(B, S), **all_in_one_sequence(PLACES[place]), use_cache=False).logits


def all_in_one_sequence(positions: Tensor) -> dict[str, Tensor]:
    # without a mask, transformers takes a jump of positions for the start of another sequence
    return {"position_ids": positions[None], "attention_mask": torch.ones(B, S, dtype=torch.long)}


# frequencies


def test_fast_pairs_keep_their_frequency_and_slow_ones_are_40_times_slower():
    frequencies = subject().model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    # pair 10.5 of 32 makes 32 turns in 4,096 tokens, and pair 22.5 makes one; both are rounded outwards
    turning = [64 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(10000)) for turns in (32, 1)]
    low, high = math.floor(turning[0]), math.ceil(turning[1])
    assert (low, high) == (10, 23)
    for i, frequency in enumerate(frequencies.tolist()):
        unscaled = 10000.0 ** (-i / 32)
        slowed = min(max((i - low) / (high - low), 0.0), 1.0)
        expected = unscaled * (1 - slowed) + unscaled / 40 * slowed
        # rounded once
        assert abs(frequency / expected - 1) <= 2**-24, i
    torch.testing.assert_close(
        frequencies.double(), reference.inverse_frequencies(subject().config), rtol=2**-24, atol=0
    )


def test_a_ramp_that_ends_after_the_last_pair_slows_no_pair_to_the_full():
    rotary = tiny_model(**LONG | {"rope_theta": 100.0}).model.rotary_emb
    # pair 45.03 of only 32 makes one turn in 4,096 tokens; DeepSeek's code limits it to r - 1
    expected = reference.inverse_frequencies(rotary.config)
    assert expected[-1] > 1.5 * 100.0 ** (-31 / 32) / 40
    torch.testing.assert_close(rotary.inv_freq.double(), expected, rtol=2**-24, atol=0)


def test_a_ramp_of_no_length_slows_every_pair_after_its_start():
    # pair -0.16 makes one turn in 6 tokens, so the ramp starts and ends at pair 0
    rotary = tiny_model(**LONG | {"rope_scaling": PUBLISHED | {"original_max_position_embeddings": 6}}).model.rotary_emb
    expected = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    expected[1:] /= 40
    torch.testing.assert_close(rotary.inv_freq.double(), expected, rtol=2**-24, atol=0)


def test_without_an_extension_no_length_factor_is_in_the_softmax_scale():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mscale_all_dim": 0.707, "factor": 40}
    for given in (rope, {name: value for name, value in rope.items() if name != "factor"}):
        config = DeepseekV2Config(rope_parameters=given)
        assert softmax_scale(config) == (128 + 64) ** -0.5


@pytest.mark.parametrize("given", [{}, {"mscale": 0.707}, {"mscale_all_dim": 0.707}], ids=str)
def test_a_length_factor_that_is_not_in_the_softmax_scale_is_in_cos_and_sin(given):
    scaling = {name: value for name, value in PUBLISHED.items() if not name.startswith("mscale")} | given
    rotary = tiny_model(**LONG | {"rope_scaling": scaling}).model.rotary_emb
    # DeepSeek's code takes mscale as 1 and mscale_all_dim as 0 if they are left out
    factors = [0.1 * scaling.get(name, default) * math.log(40) + 1 for name, default in MSCALES.items()]
    assert math.isclose(rotary.attention_scaling, factors[0] / factors[1], rel_tol=1e-12)
    cos, sin = rotary(torch.zeros(1), torch.arange(99)[None])
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, factors[0] / factors[1]))


def test_the_length_factor_is_in_the_softmax_scale_and_not_in_cos_and_sin():
    config = subject().config
    length_factor = 0.0707 * math.log(40) + 1
    assert subject().model.rotary_emb.attention_scaling == 1.0
    assert math.isclose(softmax_scale(config), length_factor**2 / math.sqrt(16 + 64), rel_tol=1e-12)
    assert math.isclose(softmax_scale(config), reference.softmax_scale(config), rel_tol=1e-12)
    cos, sin = subject().model.rotary_emb(torch.zeros(1), torch.arange(WINDOW - 99, WINDOW)[None])
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))


@pytest.mark.parametrize("position", [1, 4095, 4096, 100_000, WINDOW - 1])
def test_angles_are_exact_however_large_they_are(position):
    cos, sin = (x[0, 0].double() for x in subject().model.rotary_emb(torch.zeros(1), torch.tensor([[position]])))
    angles = position * reference.inverse_frequencies(subject().config)
    # cos and sin are rounded once; a frequency in two float32 numbers is off by 2^-48, an angle by 2^-30 at most
    assert ((cos - angles.cos()).abs() <= 2**-24).all()
    assert ((sin - angles.sin()).abs() <= 2**-24).all()


def test_a_checkpoint_read_in_half_precision_has_frequencies_in_float32(tmp_path):
    subject().save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        model = type(subject()).from_pretrained(tmp_path, dtype=dtype)
        assert model.lm_head.weight.dtype == dtype
        assert torch.equal(model.model.rotary_emb.inv_freq, subject().model.rotary_emb.inv_freq)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_casting_a_model_does_not_round_its_frequencies(cast):
    model = getattr(tiny_model(**LONG), cast)()
    assert model.lm_head.weight.dtype == getattr(torch, cast)
    for name, buffer in subject().model.rotary_emb.named_buffers():
        assert torch.equal(model.model.rotary_emb.get_buffer(name), buffer)


# logits


def through_its_modules(ids: Tensor, positions: Tensor) -> Tensor:
    with torch.enable_grad():
        return subject()(ids, **all_in_one_sequence(positions), use_cache=False).logits.detach()


def uncached(ids: Tensor, positions: Tensor) -> Tensor:
    return subject()(ids, **all_in_one_sequence(positions), use_cache=False).logits


def in_steps_of(*lengths: int):
    def logits_in_steps(ids: Tensor, positions: Tensor) -> Tensor:
        cache, logits, last = LatentCache(subject().config), [], 0
        for length in lengths:
            first, last = last, last + length
            mask = torch.ones(B, last, dtype=torch.long)
            step = {"position_ids": positions[None, first:last], "attention_mask": mask, "cache": cache}
            logits.append(subject()(ids[:, first:last], **step).logits)
        return torch.cat(logits, dim=1)

    return logits_in_steps


# each way, and the attention functions that it uses
WAYS = {
    "through the modules": (through_its_modules, set()),
    "uncached": (uncached, {"expanded"}),
    "prefill": (in_steps_of(S), {"expanded"}),
    "prefill after a prefix": (in_steps_of(3, S - 3), {"expanded"}),
    "prefill, then token by token": (in_steps_of(9, *[1] * (S - 9)), {"expanded", "absorbed"}),
    "several tokens at a time": (in_steps_of(1, *[4] * 4), {"expanded", "absorbed"}),
}


@pytest.fixture
def taken(monkeypatch) -> set[str]:
    """The names of the attention functions that were called."""
    names = set()
    for name in ("absorbed", "expanded"):
        attend = getattr(latent_attention, f"{name}_attention")

        def noted(*args, name=name, attend=attend, **kwargs):
            names.add(name)
            return attend(*args, **kwargs)

        monkeypatch.setattr(latent_attention, f"{name}_attention", noted)
    return names


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_logits_anywhere_in_the_window_are_those_of_the_paper(way, place, taken):
    logits, paths = WAYS[way]
    actual = logits(random_ids(B, S), PLACES[place])
    assert taken == paths
    assert_within_rounding(actual, exact(place), yardstick(place))


@torch.no_grad()
def test_all_ways_through_the_model_agree_at_the_end_of_the_window():
    # all ways use the same angles, so they differ as little as at the start
    one, *others = (logits(random_ids(B, S), PLACES["at the end"]) for logits, _ in WAYS.values())
    rounding = relative_error(yardstick("at the start"), exact("at the start"))
    assert max(relative_error(other, one) for other in others) < 4 * rounding


def test_logits_depend_on_the_distance_of_tokens_and_not_on_their_position():
    for place in ("around 4,096", "at 100,000", "at the end"):
        assert relative_error(exact(place), exact("at the start")) < 1e-9
    # in this model, distance does matter
    assert relative_error(exact("all over the window"), exact("at the start")) > 0.1


@pytest.mark.parametrize("cache_dtype", [None, "int6"], ids=str)
@torch.no_grad()
def test_the_last_tokens_of_a_full_window_attend_to_all_of_it(cache_dtype):
    s, past = 2, WINDOW - 2
    model = tiny_model(**LONG | {"num_hidden_layers": 1})
    config, ids = model.config, random_ids(1, s)
    cache = LatentCache(config, cache_dtype=cache_dtype)
    cache.update(torch.randn(1, 1, past, config.kv_lora_rank), torch.randn(1, 1, past, config.qk_rope_head_dim), 0)
    latent, k_rotary = (x[:, 0].double() for x in (cache.layers[0].keys, cache.layers[0].values))
    # positions that are not given continue after the cached tokens
    actual = torch.cat([model(token, cache=cache).logits for token in ids.split(1, dim=1)], dim=1)

    weights = in_float64(official_state_dict(model))
    layer = weights_under(weights, "model.layers.0.")
    attention = weights_under(layer, "self_attn.")
    hidden = weights["model.embed_tokens.weight"][ids]
    normed = rms_norm(hidden, layer["input_layernorm.weight"], config.rms_norm_eps)
    positions = past + torch.arange(s)[None]
    q_content, q_rotary, new_latent, new_k_rotary = queries_and_latents(config, attention, normed, positions)
    if cache_dtype is not None:
        # new tokens are quantized before they are read
        new_latent, new_k_rotary = (x[:, 0, -s:].double() for x in (cache.layers[0].keys, cache.layers[0].values))
    context = reference.absorbed_attention(
        q_content,
        q_rotary,
        torch.cat((latent, new_latent), dim=1),
        torch.cat((k_rotary, new_k_rotary), dim=1),
        *up_projections(config, attention),
        torch.ones(1, s, WINDOW, dtype=torch.bool).tril(past),
        reference.softmax_scale(config),
    )
    hidden = hidden + linear(attention, "o_proj", context.flatten(-2))
    normed = rms_norm(hidden, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
    hidden = hidden + feed_forward(weights_under(layer, "mlp."), normed)
    truth = linear(weights, "lm_head", rms_norm(hidden, weights["model.norm.weight"], config.rms_norm_eps))

    held = DynamicCache()
    held.update(latent[:, None].float(), k_rotary[:, None].float(), 0)
    native = with_exact_angles(native_twin(model))(ids, **{CACHE: held}).logits
    assert_within_rounding(actual, truth, yardstick=native)
    assert cache.get_seq_length() == WINDOW
