"""A file of a cache whose seal is right is still refused if it does not hold the rows of its tokens."""

import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch

from deepseek_latent import LatentCache
from deepseek_latent.cache.files import file_nbytes, read_tensors, write_tensors
from deepseek_latent.cache.storage import contents_of_file, read_description
from tests.support import random_ids, tiny_model

NUM_TOKENS = 20


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@torch.no_grad()
def saved(model, path: Path, batch: int = 1, cache_dtype: str | None = None) -> LatentCache:
    ids, cache = random_ids(batch, NUM_TOKENS), LatentCache(model.config, cache_dtype=cache_dtype)
    model(ids, cache=cache)
    cache.save(path, tokens=ids, model=model)
    return cache


def rewritten(path: Path, tensors: dict, metadata) -> None:
    """Seals a file anew with these changes; a value of None removes the entry."""
    held, stored = read_tensors(path)
    held = {name: x for name, x in (held | tensors).items() if x is not None}
    if isinstance(metadata, dict):
        metadata = {name: x for name, x in (stored | metadata).items() if x != "absent"}
    write_tensors(path, held, metadata)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ([], "its header has other fields"),
        ({"tokens": "absent"}, "its header has other fields"),
        ({"number of layers": 3.0}, "expected number of layers of type int, got 3.0"),
        ({"rotary width": "8"}, "expected rotary width of type int, got 8"),
        ({"dtype": None}, "expected dtype of type str, got None"),
        ({"fingerprint": [1]}, r"expected fingerprint of type str, got \[1\]"),
        ({"cache_dtype": "int3"}, "its cache_dtype is int3"),
        ({"cache_dtype": [None]}, r"its cache_dtype is \[None\]"),
        ({"tokens": []}, "its tokens are not ids"),
        ({"tokens": [[]]}, "its tokens are not ids"),
        ({"tokens": 10**9}, "its tokens are not ids"),
        ({"tokens": [[1, 2], [1]]}, "its tokens are not ids"),
        ({"tokens": [[1, -2]]}, "its tokens are not ids"),
        ({"tokens": [[1, 2.5]]}, "its tokens are not ids"),
        ({"tokens": [[1, 10**30]]}, "its tokens are not ids"),
        ({"tokens": [[1] * 19]}, "its tensors are not the rows of 3 layers for 1 x 19 tokens"),
        ({"tokens": [[1] * 20] * 2}, "its tensors are not the rows of 3 layers for 2 x 20 tokens"),
        ({"cache_dtype": "int8"}, "its tensors are not the rows of 3 layers for 1 x 20 tokens"),
    ],
    ids=str,
)
def test_sealed_metadata_that_no_cache_has_is_refused(metadata, reason, model, tmp_path):
    path = tmp_path / "a"
    saved(model, path)
    rewritten(path, {}, metadata)
    with pytest.raises(ValueError, match=f"{path} is not a file of a LatentCache: {reason}.*; remove it"):
        LatentCache.load(path, model=model)


@pytest.mark.parametrize("number", [10**9, -1])
def test_a_number_of_layers_that_the_model_does_not_have_is_refused(number, model, tmp_path):
    saved(model, tmp_path / "a")
    rewritten(tmp_path / "a", {}, {"number of layers": number})
    with pytest.raises(ValueError, match=f"computed by a model with number of layers {number}, this one has 3"):
        LatentCache.load(tmp_path / "a", model=model)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "tensors",
    [
        {"layers.1": None},
        {"layers.1": torch.zeros(1, NUM_TOKENS, 47)},
        {"layers.1": torch.zeros(NUM_TOKENS, 48)},
        {"layers.1": torch.zeros(3, NUM_TOKENS, 48)},
        {"layers.1": torch.zeros(())},
        {"layers.3": torch.zeros(1, NUM_TOKENS, 48)},
        {"layers.0": None, "layers.1": None, "layers.2": None},
    ],
    ids=["absent", "narrow", "no batch", "other batch", "scalar", "one more", "no tensor"],
)
def test_sealed_tensors_that_are_not_the_rows_are_refused(tensors, batch, model, tmp_path):
    saved(model, tmp_path / "a", batch)
    end = "prefix" if batch == 1 else "rows"
    rewritten(tmp_path / "a", {f"{name}.{end}": x for name, x in tensors.items()}, {})
    with pytest.raises(ValueError, match=r"a is not a file of a LatentCache: its tensors are not the rows of 3 layers"):
        LatentCache.load(tmp_path / "a", model=model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_sealed_rows_of_another_dtype_are_refused(dtype, model, tmp_path):
    saved(model, tmp_path / "a")
    rewritten(tmp_path / "a", {"layers.2.prefix": torch.zeros(1, NUM_TOKENS, 48, dtype=dtype)}, {})
    with pytest.raises(ValueError, match=f"its rows are {dtype} and not torch.float32; remove it"):
        LatentCache.load(tmp_path / "a", model=model)


@pytest.mark.parametrize("cache_dtype", [None, "int8", "int6", "int5", "int4", "fp8"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_the_size_of_a_file_is_known_before_it_is_written(shared, cache_dtype, model, tmp_path):
    cache = saved(model, tmp_path / "a", 1, cache_dtype)
    ids = random_ids(1, NUM_TOKENS)
    if shared:
        cache.batch_repeat_interleave(2)
        ids = torch.cat((ids.expand(2, -1), random_ids(2, 3, seed=4)), dim=1)
        with torch.no_grad():
            model(ids[:, NUM_TOKENS:], cache=cache)
    nbytes = file_nbytes(*contents_of_file(cache.layers, tokens=ids, model=model))
    cache.save(tmp_path / "a", tokens=ids, model=model)
    assert os.path.getsize(tmp_path / "a") == nbytes
    assert len(read_description(tmp_path / "a")["tokens"]) == 1 + shared


def test_a_cache_without_sequences_or_with_unequal_layers_is_not_saved(model, tmp_path):
    cache, ids = saved(model, tmp_path / "a"), random_ids(1, NUM_TOKENS)
    cache.layers[1].crop(-2)
    with pytest.raises(ValueError, match="holds 20 tokens in one layer and 18 in another"):
        cache.save(tmp_path / "b", tokens=ids, model=model)
    cache = LatentCache.load(tmp_path / "a", model=model)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="holds no sequences, there is nothing to save"):
        cache.save(tmp_path / "b", tokens=ids[:0], model=model)
    assert not (tmp_path / "b").exists()


def test_saving_over_a_file_does_not_change_the_caches_loaded_from_it(model, tmp_path):
    saved(model, tmp_path / "a")
    cache, other = LatentCache.load(tmp_path / "a", model=model), LatentCache(model.config)
    more = random_ids(1, 3, seed=4)
    with torch.no_grad():
        expected = model(torch.cat((random_ids(1, NUM_TOKENS), more), dim=1)).logits[:, -3:]
        model(random_ids(1, 7, seed=9), cache=other)
        other.save(tmp_path / "a", tokens=random_ids(1, 7, seed=9), model=model)
        torch.testing.assert_close(model(more, cache=cache).logits, expected, rtol=1e-4, atol=1e-4)
    assert LatentCache.load(tmp_path / "a", model=model).get_seq_length() == 7


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads from Linux where memory is mapped")
def test_a_deep_copy_of_a_loaded_cache_does_not_need_the_file(model, tmp_path):
    path, more = tmp_path / "a", random_ids(1, 3, seed=4)
    saved(model, path)
    cache = copy.deepcopy(LatentCache.load(path, model=model))
    # what is still mapped would end this process below
    assert str(path) not in Path("/proc/self/maps").read_text()
    os.truncate(path, 0)
    with torch.no_grad():
        expected = model(torch.cat((random_ids(1, NUM_TOKENS), more), dim=1)).logits[:, -3:]
        torch.testing.assert_close(model(more, cache=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_a_killed_save_left_goes_with_the_next_one(model, tmp_path):
    left = tmp_path / ".a.abcdefgh.unfinished"
    left.mkdir()
    (left / "lock").touch()
    (left / "a").write_text("half a file")
    saved(model, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_a_file_that_this_user_may_not_read_is_refused_as_such(model):
    with tempfile.TemporaryDirectory() as folder:
        saved(model, Path(folder, "a"))
        os.chmod(folder, 0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=r"Permission denied: .*a"):
                LatentCache.load(Path(folder, "a"), model=model)
        finally:
            os.seteuid(0)
