"""A quantized cache says so if its codes cannot hold a model's latents."""

import pytest
import torch

from deepseek_latent import LatentCache
from deepseek_latent.cache import quantization_error
from tests.support import random_ids, seeded, tiny_model


@pytest.fixture
def warned(monkeypatch):
    messages = []
    monkeypatch.setattr(quantization_error.logger, "warning", messages.append)
    monkeypatch.setattr(quantization_error, "_warned", set())
    return messages


def read(model, cache, ids):
    with torch.no_grad():
        model(ids, cache=cache)


def test_codes_that_hold_nothing_of_most_channels_are_reported_once_with_the_error(warned):
    latent = torch.randn(1, 1, 20, 40, generator=seeded(0)) * 0.01
    latent[..., 0] = 50  # a constant in the same plane
    model = tiny_model()
    cache = LatentCache(model.config, cache_dtype="int4")
    for i in range(3):
        cache.append(latent, torch.zeros(1, 1, 20, 8), i)
        cache.append(latent, torch.zeros(1, 1, 20, 8), i)
    assert len(warned) == 1
    assert warned[0].startswith("cache_dtype='int4' holds the latents of this model badly: the error of a token is ")
    assert "use more bits per channel or cache_dtype=None" in warned[0]


def test_each_model_and_format_is_reported_once_whatever_number_of_caches(warned):
    config = tiny_model().config
    other = tiny_model().config
    other.name_or_path = "another/model"
    for i in range(6):
        latent = torch.randn(1, 1, 20, 40, generator=seeded(i)) * 0.01 * (i + 1)
        latent[..., 0] = 50
        for each in (config, other):
            for cache_dtype in ("int4", "int5"):
                LatentCache(each, cache_dtype=cache_dtype).append(latent, torch.zeros(1, 1, 20, 8), 0)
    assert len(warned) == 4
    assert [sum(f"cache_dtype='{name}'" in message for message in warned) for name in ("int4", "int5")] == [2, 2]


@pytest.mark.parametrize("cache_dtype", [None, "int8", "int6", "int5", "int4", "fp8"], ids=str)
def test_latents_that_codes_hold_are_not_reported(cache_dtype, warned):
    model = tiny_model()
    cache = LatentCache(model.config, cache_dtype=cache_dtype)
    read(model, cache, random_ids(2, 24))
    read(model, cache, random_ids(2, 1))
    assert warned == []


def test_the_same_token_many_times_is_not_reported(warned):
    model = tiny_model()
    read(model, LatentCache(model.config, cache_dtype="int4"), torch.full((1, 24), 7))
    assert warned == []


def test_channels_in_bfloat16_are_not_reported(warned):
    latent = torch.randn(1, 1, 20, 40, generator=seeded(0)) * 0.01
    latent[..., -1] = 50
    for num_unquantized in (0, 2):
        config = tiny_model(num_unquantized_channels=num_unquantized).config
        LatentCache(config, cache_dtype="int4").append(latent, torch.zeros(1, 1, 20, 8), 0)
        assert len(warned) == 1
