"""LatentCache without a model: the tokens it holds, the result of each operation, and its refusals."""

import copy

import pytest
import torch
from transformers import DynamicCache

from deepseek_latent import DeepseekV2Config, LatentCache
from deepseek_latent.cache.latent_cache import LatentCacheLayer
from tests.support import V2

B, C, R = 3, 40, 8


def tokens(length: int, batch: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 1, length, C), torch.randn(batch, 1, length, R)


def filled(*lengths: int) -> tuple[LatentCacheLayer, DynamicCache]:
    """A LatentCache and a DynamicCache of transformers after the same updates."""
    layer, twin = LatentCacheLayer(), DynamicCache()
    for length in lengths:
        latent, k_rotary = tokens(length)
        layer.update(latent, k_rotary)
        twin.update(latent, k_rotary, 0)
    return layer, twin


def assert_same(layer: LatentCacheLayer, twin: DynamicCache) -> None:
    assert layer.get_seq_length() == twin.get_seq_length()
    assert torch.equal(layer.keys, twin.layers[0].keys)
    assert torch.equal(layer.values, twin.layers[0].values)


OPERATIONS = {
    "update": lambda cache, new: cache.update(*new),
    "crop": lambda cache, new: cache.crop(-4),
    "crop nothing": lambda cache, new: cache.crop(0),
    "reorder": lambda cache, new: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda cache, new: cache.batch_repeat_interleave(2),
    "select": lambda cache, new: cache.batch_select_indices(torch.tensor([2, 1])),
    "select by mask": lambda cache, new: cache.batch_select_indices(torch.tensor([True, False, True])),
    "offload": lambda cache, new: (cache.offload(), cache.prefetch()),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("lengths", [(9,), (5, 1, 1), (200, 1)], ids=str)
def test_every_operation_leaves_what_a_dynamic_cache_holds(operation, lengths):
    layer, twin = filled(*lengths)
    new = tokens(2)
    for cache in (layer, twin.layers[0]):
        OPERATIONS[operation](cache, new)
    assert_same(layer, twin)
    # the next token is stored right after them
    new = tokens(1, batch=layer.keys.shape[0])
    for cache in (layer, twin.layers[0]):
        cache.update(*new)
    assert_same(layer, twin)


@torch.no_grad()
def test_a_new_token_is_written_in_place():
    layer, _ = filled(9)
    layer.update(*tokens(1))
    before = layer._buffer.data_ptr()
    for _ in range(40):
        layer.update(*tokens(1))
    assert layer._buffer.data_ptr() == before


@torch.no_grad()
def test_growing_copies_each_token_a_bounded_number_of_times():
    layer = LatentCacheLayer()
    copied, buffer = 0, None
    for _ in range(3000):
        layer.update(*tokens(1, batch=1))
        if layer._buffer.data_ptr() != buffer:
            copied, buffer = copied + layer.get_seq_length() - 1, layer._buffer.data_ptr()
    assert copied < 12 * 3000
    assert layer.allocated_nbytes < 1.2 * layer.nbytes


def test_keys_and_values_are_views_of_one_buffer_in_transformers_layout():
    layer, _ = filled(9)
    assert layer.keys.shape == (B, 1, 9, C)
    assert layer.values.shape == (B, 1, 9, R)
    assert layer.keys.untyped_storage().data_ptr() == layer.values.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("published", "elements"),
    [({"num_hidden_layers": 60}, 34_560), ({"num_hidden_layers": 27}, 15_552)],
    ids=["V2", "V2-Lite"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_per_token_are_those_of_the_paper(published, elements, dtype):
    config = DeepseekV2Config(kv_lora_rank=512, qk_rope_head_dim=64, **published)
    cache = LatentCache(config)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.zeros(2, 1, 5, 512, dtype=dtype), torch.zeros(2, 1, 5, 64, dtype=dtype), layer)
    assert cache.nbytes == 2 * 5 * elements * dtype.itemsize
    assert config.num_hidden_layers * config.cached_width == elements


def test_repr_shows_what_is_held():
    cache = LatentCache(DeepseekV2Config(**V2))
    assert repr(cache) == "LatentCache(layers=3, empty)"
    for layer in range(3):
        cache.update(*tokens(5), layer)
    text = repr(cache)
    assert "batch=3, tokens=5, latent=40, rotary=8, float32" in text
    assert f"{3 * 3 * 5 * 48 * 4:,} bytes held" in text


def test_mask_sizes_and_iteration_are_those_of_a_dynamic_cache():
    ours, twin = LatentCache(DeepseekV2Config(**V2)), DynamicCache()
    for layer in range(3):
        new = tokens(5)
        ours.update(*new, layer)
        twin.update(*new, layer)
    assert ours.get_mask_sizes(2, 0) == twin.get_mask_sizes(2, 0) == (7, 0)
    for (keys, values, _), (twin_keys, twin_values, _) in zip(ours, twin, strict=True):
        assert torch.equal(keys, twin_keys)
        assert torch.equal(values, twin_values)
    # this is how torch gathers the outputs of replicas
    gathered = LatentCache((keys, values) for keys, values, _ in ours)
    assert torch.equal(gathered.layers[2].keys, ours.layers[2].keys)


def test_a_cache_can_be_used_again_after_reset():
    cache = LatentCache(DeepseekV2Config(**V2))
    cache.update(*tokens(5), 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    new = tokens(2, batch=1)
    keys, _ = cache.update(*new, 0)
    assert torch.equal(keys, new[0])


def test_a_copy_is_independent():
    layer, twin = filled(9)
    duplicate = copy.deepcopy(layer)
    duplicate.update(*tokens(3))
    layer.crop(-1)
    layer.update(*tokens(1))
    assert torch.equal(duplicate.keys[:, :, :9], twin.layers[0].keys)


def test_gradients_flow_through_the_cache():
    layer, twin = LatentCacheLayer(), DynamicCache()
    parts = [tuple(x.requires_grad_() for x in tokens(2)) for _ in range(3)]
    for latent, k_rotary in parts:
        layer.update(latent, k_rotary)
        twin.update(latent, k_rotary, 0)
    ours = torch.autograd.grad((layer.keys**3).sum() + (layer.values**2).sum(), [x for p in parts for x in p])
    theirs = torch.autograd.grad(
        (twin.layers[0].keys ** 3).sum() + (twin.layers[0].values ** 2).sum(), [x for p in parts for x in p]
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_a_cache_made_in_inference_mode_grows_outside_it():
    with torch.inference_mode():
        layer, twin = filled(9)
    with torch.no_grad():
        for new in (tokens(1), tokens(2)):
            layer.update(*new)
            twin.update(*new, 0)
    assert_same(layer, twin)


def test_a_step_without_gradients_does_not_overwrite_tensors_that_autograd_saved():
    layer = LatentCacheLayer()
    keys, _ = layer.update(*(x.requires_grad_() for x in tokens(4)))
    loss = (keys**2).sum()
    with torch.no_grad():
        layer.crop(-2)
        layer.update(*tokens(2))
        layer.update(*tokens(1))
    loss.backward()  # raises where a saved tensor was changed


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@torch.no_grad()
def test_wider_tokens_widen_the_cache(cache_dtype):
    layer = LatentCacheLayer(cache_dtype)
    layer.update(*(x.bfloat16() for x in tokens(5)))
    layer.batch_select_indices(torch.tensor([1]))
    layer.batch_repeat_interleave(B)
    held = layer.keys.float()
    layer.update(*tokens(1))
    assert layer.keys.dtype == torch.float32
    # codes are now decoded to float32
    torch.testing.assert_close(layer.keys[:, :, :5], held, rtol=0 if cache_dtype is None else 2**-8, atol=0)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda layer: layer.crop(-10), "cannot forget 10 tokens, the cache holds 9"),
        (lambda layer: layer.crop(5), r"got 5; to keep the first 5 of 9 tokens, crop\(-4\)"),
        (lambda layer: layer.update(*tokens(1, batch=2)), r"\(3, 40, 8\), the new tokens have \(2, 40, 8\)"),
        (
            lambda layer: layer.update(torch.zeros(B, 1, 1, 32), torch.zeros(B, 1, 1, R)),
            r"\(3, 40, 8\), the new tokens have \(3, 32, 8\)",
        ),
        (
            lambda layer: layer.update(*(x.bfloat16() for x in tokens(1))),
            "this cache holds torch.float32, the new tokens are torch.bfloat16",
        ),
        (
            lambda layer: layer.update(*(x.to("meta") for x in tokens(1))),
            "this cache is on cpu, the new tokens are on meta",
        ),
    ],
)
def test_misuse_raises_one_sentence_and_changes_nothing(operation, message):
    layer, twin = filled(9)
    with pytest.raises(ValueError, match=message):
        operation(layer)
    assert_same(layer, twin)
