"""A stored prompt is found by every prompt that shares a prefix with it, and never changes the output."""

import os
import random
import warnings

import pytest
import torch
from transformers import DynamicCache

from deepseek_latent import LatentCache
from deepseek_latent.cache.prompt_cache import PromptCache
from tests.cache.prompts import ROOM, last_logits, num_tokens_found, store_prompt, with_prefix
from tests.support import needs_its_peft, random_ids, tiny_model

# prompts that are found


def test_repr_and_len_show_how_full_the_folder_is(model, folder):
    prompts = PromptCache(folder, max_bytes=ROOM, cache_dtype="int6")
    store_prompt(prompts, model, random_ids(1, 100))
    assert repr(prompts) == (
        f"PromptCache({str(folder)!r}, cache_dtype='int6': 1 prompts, {prompts.nbytes:,} of 1,000,000,000 bytes)"
    )


@pytest.mark.parametrize("common", [64, 65, 100, 127, 128, 150])
def test_a_prompt_finds_every_token_that_it_shares_with_a_stored_one(common, model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 151)
    store_prompt(prompts, model, ids[:, :150])
    wanted = with_prefix(ids, common, seed=3)
    cache = prompts.load(wanted, model)
    assert cache.get_seq_length() == common
    assert torch.equal(cache.stored_tokens, wanted[:, :common])


@pytest.mark.parametrize("cache_dtype", [None, "int8", "fp8"])
def test_a_loaded_prefix_gives_the_logits_of_the_whole_prompt(cache_dtype, model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM, cache_dtype=cache_dtype), random_ids(1, 150)
    store_prompt(prompts, model, ids)
    wanted = with_prefix(ids, 111, seed=3)
    cache = prompts.load(wanted, model)
    assert cache.get_seq_length() == 111
    expected = last_logits(model, wanted, LatentCache(model.config, cache_dtype=cache_dtype))
    torch.testing.assert_close(last_logits(model, wanted, cache), expected, rtol=1e-4, atol=1e-4)


def test_generate_continues_a_loaded_prompt_as_a_computed_one(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 150)
    store_prompt(prompts, model, ids)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    for _ in range(2):
        cache = prompts.load(ids, model)
        assert cache.get_seq_length() == 149
        actual = model.generate(ids, cache=cache, **options)
        assert torch.equal(actual, expected)
        # the answer is stored too, and the next question may follow it
        prompts.store(cache, actual, model)
    assert len(prompts) == 1
    assert num_tokens_found(prompts, model, torch.cat((actual, ids), dim=1)) == actual.shape[1] - 1


def test_one_token_is_always_left_to_compute(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 150)
    store_prompt(prompts, model, ids)
    assert num_tokens_found(prompts, model, ids[:, :100]) == 99
    assert num_tokens_found(prompts, model, ids[:, :65]) == 64


def test_less_than_a_block_is_neither_found_nor_stored(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 150)
    store_prompt(prompts, model, ids[:, :63])
    assert len(prompts) == 0
    store_prompt(prompts, model, ids)
    assert num_tokens_found(prompts, model, with_prefix(ids, 63, seed=3)) == 0
    assert num_tokens_found(prompts, model, ids[:, :64]) == 0


def test_load_returns_an_empty_cache_of_the_folders_cache_dtype_if_nothing_is_stored(model, folder):
    cache = PromptCache(folder, max_bytes=ROOM, cache_dtype="int6").load(random_ids(1, 90), model)
    assert cache.get_seq_length() == 0
    assert cache.cache_dtype == "int6"


def test_the_longest_of_several_prefixes_is_found(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 220)
    for length in (70, 190, 130):
        store_prompt(prompts, model, with_prefix(ids, length, seed=length))
    store_prompt(prompts, model, random_ids(1, 220, seed=9))
    assert num_tokens_found(prompts, model, ids) == 190
    assert num_tokens_found(prompts, model, with_prefix(ids, 140, seed=3)) == 140


def test_several_objects_share_a_folder_and_find_what_others_store(model, folder):
    ids = random_ids(1, 150)
    mine, other = (PromptCache(folder, max_bytes=ROOM) for _ in range(2))
    assert num_tokens_found(mine, model, ids) == 0
    store_prompt(other, model, ids)
    assert num_tokens_found(mine, model, ids) == 149
    other.clear()
    assert num_tokens_found(mine, model, ids) == 0
    assert len(mine) == mine.nbytes == 0


def test_known_files_are_not_read_again_to_look_up_another_prompt(model, folder, monkeypatch):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 150)
    store_prompt(prompts, model, ids)
    num_tokens_found(prompts, model, ids)
    monkeypatch.setattr("deepseek_latent.cache.prompt_folder.read_description", None)
    assert num_tokens_found(prompts, model, ids) == 149


# prompts that must not be found


def double(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def double_behind_torchs_back(model):
    model.lm_head.weight.data.mul_(2)


def other_rope(model):
    model.config.rope_parameters["factor"] = 8.0


def adapter(model):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_b_proj"], init_lora_weights=False)
    model.add_adapter(config)


@pytest.mark.parametrize(
    "change",
    [double, double_behind_torchs_back, other_rope, pytest.param(adapter, marks=needs_its_peft)],
)
def test_a_changed_model_does_not_find_what_it_stored_before(change, folder):
    model, ids = tiny_model(), random_ids(1, 150)
    prompts = PromptCache(folder, max_bytes=ROOM)
    store_prompt(prompts, model, ids)
    assert num_tokens_found(prompts, model, ids) == 149
    change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert num_tokens_found(prompts, model, ids) == 0
    store_prompt(prompts, model, ids)
    assert num_tokens_found(prompts, model, ids) == 149
    assert len(prompts) == 2


def test_each_adapter_finds_what_it_stored(folder):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_b_proj", "kv_a_proj_with_mqa"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config).eval()
    model.add_adapter("second", config)
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 150)
    store_prompt(prompts, model, ids)
    model.set_adapter("second")
    assert num_tokens_found(prompts, model, ids) == 0
    store_prompt(prompts, model, ids[:, :120])
    for name, length in (("default", 149), ("second", 120)):
        model.set_adapter(name)
        cache = prompts.load(ids, model)
        assert cache.get_seq_length() == length
        expected = last_logits(model, ids, LatentCache(model.config))
        torch.testing.assert_close(last_logits(model, ids, cache), expected, rtol=1e-4, atol=1e-4)


def test_another_cache_dtype_finds_nothing_but_still_evicts_the_oldest(model, folder):
    ids = random_ids(1, 150)
    store_prompt(PromptCache(folder, max_bytes=ROOM), model, ids)
    coded = PromptCache(folder, max_bytes=ROOM, cache_dtype="int8")
    assert num_tokens_found(coded, model, ids) == 0
    store_prompt(coded, model, ids)
    assert len(coded) == 2
    small = PromptCache(folder, max_bytes=coded.nbytes - 1, cache_dtype="int8")
    store_prompt(small, model, random_ids(1, 150, seed=5))
    assert num_tokens_found(PromptCache(folder, max_bytes=ROOM), model, ids) == 0
    assert num_tokens_found(small, model, ids) == 149


# prompts that are kept


def test_a_prompt_replaces_its_own_prefixes(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 200)
    for length in (70, 128, 200):
        store_prompt(prompts, model, ids[:, :length])
    store_prompt(prompts, model, with_prefix(ids, 100, seed=3))
    assert len(prompts) == 2
    assert num_tokens_found(prompts, model, ids) == 199


def test_a_prefix_of_a_stored_prompt_is_not_stored_again_but_counts_as_used(model, folder):
    prompts, ids, other = PromptCache(folder, max_bytes=ROOM), random_ids(1, 200), random_ids(1, 200, seed=2)
    store_prompt(prompts, model, ids)
    store_prompt(prompts, model, other)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    store_prompt(prompts, model, ids[:, :150])
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    prompts.max_bytes = prompts.nbytes
    store_prompt(prompts, model, random_ids(1, 200, seed=3))
    assert num_tokens_found(prompts, model, ids) == 199
    assert num_tokens_found(prompts, model, other) == 0


def test_the_least_recently_used_prompt_is_evicted_first(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), [random_ids(1, 100, seed) for seed in range(6)]
    for i in range(4):
        store_prompt(prompts, model, ids[i])
    prompts.max_bytes = prompts.nbytes
    num_tokens_found(prompts, model, ids[0])
    num_tokens_found(prompts, model, ids[2])
    store_prompt(prompts, model, ids[4])
    assert [num_tokens_found(prompts, model, ids[i]) > 0 for i in range(5)] == [True, False, True, True, True]
    store_prompt(prompts, model, ids[5])
    assert [num_tokens_found(prompts, model, x) > 0 for x in ids] == [False, False, True, True, True, True]
    assert prompts.nbytes <= prompts.max_bytes


def test_a_prompt_that_was_just_stored_stays_even_if_other_files_are_dated_later(model, folder):
    prompts = PromptCache(folder, max_bytes=ROOM)
    for seed in range(2):
        store_prompt(prompts, model, random_ids(1, 100, seed))
    for path in folder.glob("*.safetensors"):
        os.utime(path, (2**32, 2**32))
    prompts.max_bytes = prompts.nbytes
    store_prompt(prompts, model, random_ids(1, 100, seed=5))
    assert num_tokens_found(prompts, model, random_ids(1, 100, seed=5)) == 99
    assert len(prompts) == 2


def test_rows_too_large_for_the_folder_are_not_even_written(model, folder, monkeypatch):
    monkeypatch.setattr("deepseek_latent.cache.prompt_cache.write_tensors", None)
    with pytest.raises(ValueError, match="at most max_bytes=100 bytes"):
        store_prompt(PromptCache(folder, max_bytes=100), model, random_ids(1, 100))


def test_a_prompt_too_large_for_the_folder_is_refused_and_nothing_evicted(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 200)
    store_prompt(prompts, model, ids[:, :100])
    size = prompts.nbytes
    cache = LatentCache(model.config)
    last_logits(model, ids, cache)
    # the second size is less than the file with its header, but not less than the rows
    for prompts.max_bytes in (size, cache.nbytes):
        with pytest.raises(ValueError, match=rf"at most max_bytes={prompts.max_bytes:,} bytes, got one of .*; raise"):
            prompts.store(cache, ids, model)
        assert prompts.nbytes == size


def test_caches_that_cannot_be_stored_are_refused_in_one_sentence(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(2, 100)
    cache = LatentCache(model.config)
    last_logits(model, ids, cache)
    with pytest.raises(ValueError, match=r"the ids of one sequence, \[t\] or \[1 t\], got shape \[2, 100\]"):
        prompts.store(cache, ids, model)
    with pytest.raises(ValueError, match=r"a cache of one sequence and the ids of its 100 tokens, got one of 2 "):
        prompts.store(cache, ids[0], model)
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"got one of 1 and 99 ids"):
        prompts.store(cache, ids[1, :99], model)
    with pytest.raises(ValueError, match=r"opened with cache_dtype='int8' and the cache has cache_dtype=None; open"):
        PromptCache(folder, max_bytes=ROOM, cache_dtype="int8").store(cache, ids[1], model)
    assert len(prompts) == 0
    prompts.store(cache, ids[1], model)
    assert num_tokens_found(prompts, model, ids[1:]) == 99
    for use in (lambda: prompts.store(cache, ids[1].tolist(), model), lambda: prompts.load([[2, 3]], model)):
        with pytest.raises(TypeError, match=r"expected token ids in a tensor \[b t\], got list; use torch.tensor"):
            use()
    with pytest.raises(TypeError, match="expected a LatentCache, got DynamicCache; generate with the one that"):
        prompts.store(DynamicCache(), ids[1], model)
    with pytest.raises(ValueError, match="cache_dtype must be"):
        PromptCache(folder, max_bytes=ROOM, cache_dtype="int7")
    with pytest.raises(TypeError, match=r"PromptCache takes cache_dtype, such as .*, in place of bits=8"):
        PromptCache(folder, max_bytes=ROOM, bits=8)
    with pytest.raises(ValueError, match="max_bytes must be positive, got 0"):
        PromptCache(folder, max_bytes=0)


def test_sharded_weights_are_refused(folder):
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    model = tiny_model()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(model.lm_head.weight.data, DeviceMesh("cpu", [0]), [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(weight)
        with pytest.raises(ValueError, match=r"lm_head\.weight is sharded over several.*; use LatentCache.save"):
            PromptCache(folder, max_bytes=ROOM).load(random_ids(1, 100), model)
    finally:
        torch.distributed.destroy_process_group()


def test_random_use_always_finds_the_longest_prefix(folder):
    model, chance = tiny_model(num_hidden_layers=1, n_routed_experts=None), random.Random(3)
    prompts, kept = PromptCache(folder, max_bytes=ROOM), []
    # few different tokens, so that prompts often share a long prefix by chance
    blocks = [random_ids(1, length, length) for length in (31, 64, 33, 96)]
    for _ in range(40):
        ids = torch.cat(chance.choices(blocks, k=chance.randrange(1, 5)), dim=1)
        common = [next((i for i in range(min(a.shape[1], ids.shape[1])) if a[0, i] != ids[0, i]), None) for a in kept]
        lengths = [min(a.shape[1], ids.shape[1]) if n is None else n for a, n in zip(kept, common)]
        longest = min(max(lengths, default=0), ids.shape[1] - 1)
        assert num_tokens_found(prompts, model, ids) == (longest if longest >= 64 else 0)
        if ids.shape[1] >= 64:
            store_prompt(prompts, model, ids)
            kept.append(ids)
