"""The last channels of a latent, which a quantized cache stores in bfloat16 if the config says so.

Letters: c latent width, r rotary width, u unquantized channels.
"""

import pytest
import torch

from deepseek_latent import DeepseekV2Config, LatentCache
from deepseek_latent.cache.format import latent_format
from tests.support import V2, random_ids, seeded, tiny_model

CODED = ("int8", "int6", "int5", "int4", "fp8")
U = 6

every_code = pytest.mark.parametrize("cache_dtype", CODED)


def noise(*shape: int, seed: int = 0):
    return torch.randn(shape, generator=seeded(seed))


def filled(cache: LatentCache) -> LatentCache:
    """The cache with twelve tokens of two sequences in each of three layers, the first channels unlike the last."""
    for i in range(3):
        latent, k_rotary = noise(2, 1, 12, 40, seed=i), noise(2, 1, 12, 8, seed=i + 3)
        latent[..., -U:] *= 100
        for new in zip(latent.split((5, 6, 1), dim=2), k_rotary.split((5, 6, 1), dim=2)):
            cache.update(*new, i)
    return cache


@every_code
@pytest.mark.parametrize("c", [9, 40, 128, 129, 135, 300])
def test_the_last_channels_are_rounded_to_bfloat16_and_the_others_are_a_narrower_latent(cache_dtype, c):
    latent, k_rotary = noise(3, 5, c), noise(3, 5, 4, seed=1)
    rows_format = latent_format(cache_dtype, c, 4, torch.float32, U)
    narrower = latent_format(cache_dtype, c - U, 4, torch.float32)
    rows = rows_format.encode(latent, k_rotary)
    assert rows.shape[-1] == rows_format.row_width == narrower.row_width + 2 * U
    coded = narrower.decode(narrower.encode(latent[..., :-U], k_rotary), torch.float32)[..., :-4]
    expected = torch.cat((coded, latent[..., -U:].bfloat16().float(), k_rotary.bfloat16().float()), dim=-1)
    assert torch.equal(rows_format.decode(rows, torch.float32), expected)


@every_code
def test_an_outlier_in_an_unquantized_channel_changes_no_other(cache_dtype):
    rows_format = latent_format(cache_dtype, 40, 4, torch.float32, U)
    latent, k_rotary = noise(5, 40), noise(5, 4)
    outlier = latent.clone()
    outlier[:, -1] = 1e6
    read, expected = (rows_format.decode(rows_format.encode(x, k_rotary), torch.float32) for x in (outlier, latent))
    expected[:, 39] = torch.tensor(1e6).bfloat16()
    assert torch.equal(read, expected)


@every_code
def test_every_kind_of_cache_holds_the_same(cache_dtype, tmp_path):
    model, ids = tiny_model(num_unquantized_channels=U), random_ids(2, 12)
    growing = filled(LatentCache(model.config, cache_dtype=cache_dtype))
    static = filled(LatentCache(model.config, max_cache_len=16, cache_dtype=cache_dtype))
    growing.save(tmp_path / "cache", tokens=ids, model=model)
    loaded = LatentCache.load(tmp_path / "cache", model=model)
    for cache in (growing, static, loaded):
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
        for i in range(3):
            cache.update(noise(3, 1, 1, 40, seed=i), noise(3, 1, 1, 8, seed=i), i)
    for i in range(3):
        rows_format = latent_format(cache_dtype, 40, 8, torch.float32, U)
        expected = rows_format.decode(
            rows_format.encode(noise(2, 12, 40, seed=i), noise(2, 12, 8, seed=i + 3)), torch.float32
        )
        expected = expected[[1, 1, 0], :11]
        for cache in (growing, static, loaded):
            layer = cache.layers[i]
            assert torch.equal(layer.keys[:, 0, :11, : 40 - U], expected[..., : 40 - U])
            assert torch.equal(layer.values[:, 0, :11], expected[..., 40:])
            assert torch.equal(layer.keys, growing.layers[i].keys)


@torch.no_grad()
def test_generated_tokens_are_those_of_the_unquantized_cache():
    model, ids = tiny_model(num_unquantized_channels=U), random_ids(2, 12)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options)
    cache = LatentCache(model.config, cache_dtype="int8")
    assert torch.equal(model.generate(ids, cache=cache, **options), expected)
    assert cache.layers[0].format.num_unquantized == U


@every_code
def test_nbytes_counts_two_bytes_for_each_unquantized_channel(cache_dtype):
    model, ids = tiny_model(num_unquantized_channels=U), random_ids(2, 12)
    cache = LatentCache(model.config, cache_dtype=cache_dtype)
    with torch.no_grad():
        model(ids, cache=cache)
    narrower = latent_format(cache_dtype, 40 - U, 8, torch.float32)
    assert cache.nbytes == 3 * 2 * 12 * (narrower.row_width + 2 * U)


def test_a_file_of_a_model_with_other_unquantized_channels_is_refused(tmp_path):
    model, other = (tiny_model(num_unquantized_channels=u) for u in (U, U + 2))
    cache, ids = LatentCache(model.config, cache_dtype="int4"), random_ids(1, 9)
    with torch.no_grad():
        model(ids, cache=cache)
    cache.save(tmp_path / "cache", tokens=ids, model=model)
    with pytest.raises(ValueError, match="computed by a model with other weights, settings or adapters"):
        LatentCache.load(tmp_path / "cache", model=other)


@pytest.mark.parametrize("cache_dtype", [None, "fp8"], ids=str)
def test_records_of_flashmla_are_refused_because_they_quantize_every_channel(cache_dtype):
    config = DeepseekV2Config(
        **V2 | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_unquantized_channels": U, "num_hidden_layers": 1}
    )
    cache = LatentCache(config, cache_dtype=cache_dtype)
    cache.update(noise(1, 1, 2, 512), noise(1, 1, 2, 64), 0)
    expected = "quantize every channel of a latent, but this model has num_unquantized_channels=6"
    with pytest.raises(ValueError, match=expected):
        cache.flashmla_records()
    with pytest.raises(ValueError, match=expected):
        LatentCache.from_flashmla_records([torch.zeros(1, 2, 656, dtype=torch.uint8)], config)


def test_the_field_is_written_to_config_json_only_if_it_is_used():
    assert "num_unquantized_channels" not in DeepseekV2Config(**V2).to_dict()
    written = DeepseekV2Config(**V2 | {"num_unquantized_channels": U}).to_dict()
    assert DeepseekV2Config.from_dict(written).num_unquantized_channels == U
