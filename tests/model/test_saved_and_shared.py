"""A saved cache continues in another process, and a prefix that many sequences share is stored once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_latent import LatentCache
from tests.support import random_ids, relative_error, tiny_model

every_cache_dtype = pytest.mark.parametrize("cache_dtype", [None, "int8", "int6", "int5", "int4", "fp8"])


def prefilled(model, ids, cache_dtype=None) -> LatentCache:
    cache = LatentCache(model.config, cache_dtype=cache_dtype)
    with torch.no_grad():
        model(ids, cache=cache)
    return cache


def continued(model, ids, cache, **options):
    return model.generate(
        ids, cache=cache, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )


@every_cache_dtype
def test_a_saved_cache_continues_as_the_one_in_memory(tmp_path, cache_dtype):
    model, ids = tiny_model(), random_ids(1, 30)
    cache = prefilled(model, ids[:, :24], cache_dtype)
    cache.save(tmp_path / "prompt.safetensors", tokens=ids, model=model)
    loaded = LatentCache.load(tmp_path / "prompt.safetensors", model=model)
    assert (loaded.cache_dtype, loaded.get_seq_length(), loaded.nbytes) == (cache_dtype, 24, cache.nbytes)
    assert torch.equal(loaded.stored_tokens, ids[:, :24])
    mask = torch.ones_like(ids)
    expected = continued(model, ids, cache, attention_mask=mask)
    assert torch.equal(continued(model, ids, loaded, attention_mask=mask), expected)


def test_another_process_continues_where_this_one_stopped(tmp_path):
    model, ids = tiny_model(), random_ids(2, 20)
    model.save_pretrained(tmp_path / "model")
    prefilled(model, ids).save(tmp_path / "prompt.safetensors", tokens=ids, model=model)
    program = f"""
import torch, deepseek_latent
from deepseek_latent import LatentCache
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
cache = LatentCache.load({str(tmp_path / "prompt.safetensors")!r}, model=model)
ids = torch.cat((cache.stored_tokens, torch.tensor([[5], [6]])), dim=1)
with torch.no_grad():
    torch.save(model(ids[:, 20:], cache=cache).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    expected = model(torch.cat((ids, torch.tensor([[5], [6]])), dim=1)).logits[:, 20:]
    assert relative_error(torch.load(tmp_path / "logits.pt"), expected) < 1e-5


def test_changes_to_a_loaded_cache_do_not_change_its_file(tmp_path):
    model, ids, path = tiny_model(), random_ids(3, 20), tmp_path / "prompt.safetensors"
    prefilled(model, ids).save(path, tokens=ids, model=model)
    before = path.read_bytes()
    cache = LatentCache.load(path, model=model)
    cache.crop(-6)
    with torch.no_grad():
        logits = model(random_ids(3, 6, seed=8), cache=cache).logits
    assert path.read_bytes() == before
    expected = model(torch.cat((ids[:, :14], random_ids(3, 6, seed=8)), dim=1)).logits[:, 14:]
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads from Linux where memory is mapped")
def test_the_rows_of_a_loaded_cache_are_mapped_from_its_file(tmp_path):
    model, ids, path = tiny_model(), random_ids(1, 20), tmp_path / "prompt.safetensors"
    prefilled(model, ids).save(path, tokens=ids, model=model)
    cache = LatentCache.load(path, model=model)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    mapped = [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]
    for layer in cache.layers:
        assert all(any(rows.data_ptr() in part for part in mapped) for rows in layer.tensors().values())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 2}, "computed by a model with number of layers 3, this one has 2"),
        ({"kv_lora_rank": 48}, "computed by a model with latent width 40, this one has 48"),
        ({"qk_rope_head_dim": 16}, "computed by a model with rotary width 8, this one has 16"),
        ({"dtype": torch.bfloat16}, "computed by a model with dtype torch.float32, this one has torch.bfloat16"),
        ({"seed": 1}, "computed by a model with other weights, settings or adapters"),
        ({"routed_scaling_factor": 2.0}, "computed by a model with other weights, settings or adapters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_file_of_another_model_is_refused_with_the_reason(tmp_path, other, message):
    model, ids, path = tiny_model(), random_ids(1, 8), tmp_path / "prompt.safetensors"
    prefilled(model, ids).save(path, tokens=ids, model=model)
    with pytest.raises(ValueError, match=message):
        LatentCache.load(path, model=tiny_model(**other))


@pytest.mark.parametrize("tokens", [random_ids(1, 7), random_ids(2, 8)], ids=["too few", "other batch"])
def test_tokens_of_another_shape_than_the_cache_are_refused(tmp_path, tokens):
    model, path = tiny_model(), tmp_path / "prompt.safetensors"
    with pytest.raises(ValueError, match="expected the ids of the cache's 1 sequences of 8 tokens, got"):
        prefilled(model, random_ids(1, 8)).save(path, tokens=tokens, model=model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [[[2, 3]], "text", None, torch.rand(1, 8), random_ids(2, 4)[None]], ids=str)
def test_anything_but_a_tensor_of_ids_is_not_saved_with_a_cache(tmp_path, tokens):
    model = tiny_model()
    with pytest.raises(
        (TypeError, ValueError), match=r"expected token ids (in a tensor \[b t\]|\[b t\] as integers), got"
    ):
        prefilled(model, random_ids(1, 8)).save(tmp_path / "prompt.safetensors", tokens=tokens, model=model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("outside", [-100, -1, 96, 10**6])
def test_an_id_outside_the_vocabulary_is_not_saved_with_a_cache(tmp_path, outside):
    model, ids = tiny_model(), random_ids(1, 8)
    cache, ids[0, 3] = prefilled(model, ids), outside
    with pytest.raises(ValueError, match=r"expected ids from 0 to 95, got .*; pass the ids that"):
        cache.save(tmp_path / "prompt.safetensors", tokens=ids, model=model)
    ids[0, 3:5] = torch.tensor([0, 95])
    cache.save(tmp_path / "prompt.safetensors", tokens=ids, model=model)


def test_a_cache_filled_under_autocast_is_not_saved(tmp_path):
    model, ids = tiny_model(), random_ids(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        cache = prefilled(model, ids)
    with pytest.raises(ValueError, match=r"holds torch.bfloat16 .* compute it outside of autocast"):
        cache.save(tmp_path / "prompt.safetensors", tokens=ids, model=model)


@pytest.fixture
def loaded(tmp_path):
    """A model, 24 ids, and the cache of the first 20 of them, loaded from a file."""
    model, ids = tiny_model(), random_ids(1, 24)
    prefilled(model, ids[:, :20]).save(tmp_path / "prompt.safetensors", tokens=ids, model=model)
    return model, ids, LatentCache.load(tmp_path / "prompt.safetensors", model=model)


@pytest.mark.parametrize("others", ["new ids alone", "one id differs"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_ids_that_a_loaded_cache_was_not_made_from_are_refused(loaded, others, options):
    model, ids, cache = loaded
    given = {"new ids alone": random_ids(1, 25, seed=7), "one id differs": ids.clone()}[others]
    if others == "one id differs":
        given[0, 13] = 2 + (given[0, 13] - 1) % 90
    first = int((given[0, :20] != ids[0, :20]).int().argmax())
    if options.get("num_beams"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(
        ValueError, match=f"computed from other ids, which differ from the given ones from token {first} on"
    ):
        continued(model, given, cache, **options)
    assert cache.get_seq_length() == 20


def test_a_loaded_cache_takes_other_ids_after_the_tokens_that_it_still_holds(loaded):
    model, ids, cache = loaded
    given = torch.cat((ids[:, :13], random_ids(1, 9, seed=7)), dim=1)
    cache.crop(-7)
    assert torch.equal(cache.stored_tokens, ids[:, :13])
    answer = continued(model, given, cache)
    assert torch.equal(answer, continued(model, given, LatentCache(model.config)))
    # the next turn, with more tokens than were loaded
    longer = torch.cat((answer, random_ids(1, 3, seed=8)), dim=1)
    assert torch.equal(continued(model, longer, cache), continued(model, longer, LatentCache(model.config)))
    cache.reset()
    assert cache.stored_tokens is None
    assert torch.equal(continued(model, random_ids(1, 30, seed=9), cache)[:, :30], random_ids(1, 30, seed=9))


def test_a_cache_is_not_saved_for_a_model_of_another_dtype(tmp_path):
    ids = random_ids(1, 8)
    cache = prefilled(tiny_model(), ids)
    with pytest.raises(ValueError, match=r"holds torch.float32 and the model is torch.bfloat16"):
        cache.save(tmp_path / "prompt.safetensors", tokens=ids, model=tiny_model(torch.bfloat16))


def test_an_empty_cache_is_not_saved(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="this cache is empty, there is nothing to save"):
        LatentCache(model.config).save(tmp_path / "prompt.safetensors", tokens=random_ids(1, 8), model=model)


@every_cache_dtype
def test_a_shared_prefix_is_stored_once_and_read_by_all(cache_dtype):
    """Questions of different lengths follow one long prefix, with padding between."""
    model, prefix = tiny_model(), random_ids(1, 40)
    questions, padding = random_ids(3, 6, seed=5), (0, 2, 3)
    alone = [
        continued(model, torch.cat((prefix, questions[[i], count:]), dim=1), prefilled(model, prefix, cache_dtype))
        for i, count in enumerate(padding)
    ]
    cache = prefilled(model, prefix, cache_dtype)
    once = cache.nbytes
    cache.batch_repeat_interleave(3)
    assert cache.nbytes == once
    ids = torch.cat((prefix.expand(3, -1), questions), dim=1)
    mask = torch.ones_like(ids)
    for i, count in enumerate(padding):
        mask[i, 40 : 40 + count] = 0
    output = continued(model, ids, cache, attention_mask=mask)
    for i, count in enumerate(padding):
        assert torch.equal(output[i, 46:], alone[i][0, 46 - count :])
    assert cache.nbytes == once + 3 * 15 * once // 40


@pytest.mark.parametrize("keep", [10, 40, 44], ids="keep{}".format)
def test_a_cache_cropped_inside_or_after_the_shared_prefix_continues(tmp_path, keep):
    model, prefix = tiny_model(), random_ids(1, 40)
    cache = prefilled(model, prefix)
    cache.batch_repeat_interleave(2)
    more, other = random_ids(2, 6, seed=5), random_ids(2, 7, seed=6)
    with torch.no_grad():
        model(more, cache=cache)
        cache.crop(keep - 46)
        # also from a file with shared and own rows
        held = torch.cat((prefix.expand(2, -1), more), dim=1)[:, :keep]
        cache.save(tmp_path / "shared.safetensors", tokens=held, model=model)
        for each in (cache, LatentCache.load(tmp_path / "shared.safetensors", model=model)):
            each.reorder_cache(torch.tensor([1, 0]))
            logits = model(other, cache=each).logits
            expected = model(torch.cat((held[[1, 0]], other), dim=1)).logits[:, keep:]
            assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("cache_config", "message"),
    [
        ({"backend": "latent"}, r'takes \{"backend": "latent", "cache_dtype": "int8"\}'),
        (
            {"backend": "latent", "cache_dtype": "int6", "axis": 0},
            r'takes \{"backend": "latent", "cache_dtype": "int8"\}',
        ),
        ({"backend": "latent", "nbits": 6}, r'takes cache_dtype in place of nbits, as in \{"backend": "latent", "ca'),
        ({"backend": "latent", "cache_dtype": "int3"}, "'int5', 'int4' or 'fp8', got 'int3'"),
        ({"cache_dtype": "int6"}, 'needs a backend, such as cache_config={"backend": "latent", "cache_dtype": "int8"}'),
        (None, 'needs a backend, such as cache_config={"backend": "latent", "cache_dtype": "int8"}'),
    ],
)
def test_a_cache_config_with_other_options_is_refused(cache_config, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(random_ids(1, 4), cache_implementation="quantized", cache_config=cache_config)


def test_a_cache_dtype_without_a_format_is_refused():
    with pytest.raises(ValueError, match="'int5', 'int4' or 'fp8', got 'int7'"):
        LatentCache(tiny_model().config, cache_dtype="int7")
