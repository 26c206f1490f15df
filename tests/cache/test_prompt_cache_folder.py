"""A folder of prompts withstands damaged files, foreign files and other processes that use it at the same time."""

import itertools
import random
import time
import warnings
from pathlib import Path

import pytest
import torch

from deepseek_latent import LatentCache
from deepseek_latent.cache.files import FORMAT_VERSION
from deepseek_latent.cache.prompt_cache import PromptCache
from tests.cache.prompts import ROOM, damage, last_logits, num_tokens_found, start, store_prompt, with_prefix
from tests.support import random_ids, tiny_model


@pytest.mark.parametrize("fresh", [False, True], ids=["seen before", "not seen before"])
@pytest.mark.parametrize("place", [3, 200, -5], ids=["length", "header", "rows"])
def test_a_damaged_file_is_removed_with_a_warning_and_the_next_best_is_loaded(place, fresh, model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 200)
    store_prompt(prompts, model, with_prefix(ids, 100, seed=3))
    (second,) = folder.glob("*.safetensors")
    store_prompt(prompts, model, ids)
    (damaged,) = set(folder.glob("*.safetensors")) - {second}
    num_tokens_found(prompts, model, ids)
    damage(damaged, place)
    prompts = PromptCache(folder, max_bytes=ROOM) if fresh else prompts
    with pytest.warns(UserWarning, match=rf"a stored prompt was removed: {damaged} (is cut off|was altered)"):
        cache = prompts.load(ids, model)
    assert cache.get_seq_length() == 100
    assert list(folder.glob("*.safetensors")) == [second]


def test_foreign_files_are_never_touched(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=1), random_ids(1, 100)
    names = ["notes.txt", "model.safetensors", "0" * 64 + f".v{FORMAT_VERSION + 1}.safetensors"]
    for name in names:
        (folder / name).write_text("not a prompt of ours")
    with pytest.raises(ValueError, match="raise max_bytes"):
        store_prompt(prompts, model, ids)
    assert len(prompts) == prompts.nbytes == 0
    prompts.clear()
    assert num_tokens_found(prompts, model, ids) == 0
    assert {*names} <= {path.name for path in folder.iterdir()}


def test_a_file_that_is_removed_between_lookup_and_reading_is_skipped(model, folder, monkeypatch):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 200)
    store_prompt(prompts, model, with_prefix(ids, 100, seed=3))
    store_prompt(prompts, model, ids)
    load, removed = LatentCache.load, []

    def after_another_process(path, model):
        if not removed:
            removed.append(path)
            path.unlink()
        return load(path, model=model)

    monkeypatch.setattr(LatentCache, "load", after_another_process)
    assert num_tokens_found(prompts, model, ids) == 100


def test_a_loaded_cache_remains_valid_after_its_file_is_removed(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 200)
    store_prompt(prompts, model, ids)
    cache = prompts.load(ids, model)
    prompts.clear()
    store_prompt(prompts, model, random_ids(1, 200, seed=2))
    expected = last_logits(model, ids, LatentCache(model.config))
    torch.testing.assert_close(last_logits(model, ids, cache), expected, rtol=1e-4, atol=1e-4)


def use(folder: Path, max_bytes: int, seed: int, stop=lambda turns: turns >= 40) -> int:
    """Loads, continues and stores random prompts, and sometimes clears; returns how many loads found something."""
    # a file that another process writes must never look damaged
    warnings.simplefilter("error", UserWarning)
    model, chance, hits = tiny_model(), random.Random(seed), 0
    wanted = torch.load(folder / "wanted.pt")
    prompts = PromptCache(folder, max_bytes=max_bytes)
    for turn in itertools.count():
        if stop(turn):
            return hits
        ids, expected = chance.choice(wanted)
        cache = prompts.load(ids, model)
        hits += cache.get_seq_length() > 0
        torch.testing.assert_close(last_logits(model, ids, cache), expected, rtol=1e-4, atol=1e-4)
        prompts.store(cache, ids, model)
        # while the files are listed, another process may replace one that was counted by one that still will be
        assert prompts.nbytes <= 2 * max_bytes
        if chance.random() < 0.05:
            prompts.clear()


def test_processes_that_share_a_small_folder_all_get_correct_caches(model, folder):
    folder.mkdir()
    trunk = [random_ids(1, 220, seed) for seed in (1, 2)]
    wanted = [with_prefix(ids, length, seed=length) for ids in trunk for length in (80, 128, 180)] + trunk
    torch.save([(ids, last_logits(model, ids, LatentCache(model.config))) for ids in wanted], folder / "wanted.pt")
    max_bytes = 400_000  # room for three of eight
    workers = [start(f"{__name__}:use", folder, max_bytes, seed) for seed in (1, 2)]
    while all(worker.poll() is None for worker in workers) and len(list(folder.iterdir())) == 1:
        time.sleep(0.05)
    with warnings.catch_warnings():
        # as many turns as the others, however slow this process is, and as long as one of them is at work
        hits = use(
            folder, max_bytes, 3, lambda turns: turns >= 40 and all(worker.poll() is not None for worker in workers)
        )
    for worker in workers:
        out, errors = worker.communicate()
        assert worker.returncode == 0, errors[-3000:]
        assert int(out.split()[-1]) > 5
    assert hits > 5
    prompts = PromptCache(folder, max_bytes=max_bytes)
    assert prompts.nbytes <= max_bytes
    assert {path.name for path in folder.iterdir() if path.suffix != ".safetensors"} == {".lock", "wanted.pt"}
