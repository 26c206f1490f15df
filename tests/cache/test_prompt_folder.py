"""Only own files of a prompt folder are touched, its bound always holds, and to read it no permission is needed."""

import contextlib
import itertools
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

from deepseek_latent import LatentCache
from deepseek_latent.cache.files import FORMAT_VERSION
from deepseek_latent.cache.prompt_cache import PromptCache
from tests.cache.prompts import ROOM, damage, kill_at, last_logits, num_tokens_found, start, store_prompt
from tests.support import random_ids, tiny_model


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "link", "broken link"])
def test_what_only_resembles_our_files_is_never_touched(kind, model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 100)
    stored_name = "0" * 64 + f".v{FORMAT_VERSION}.safetensors"
    names = [f".{stored_name}.backup", f".{stored_name}.a1b2c3", f".notes.v{FORMAT_VERSION}.safetensors.d", ".hidden"]
    # a file of this name would be a damaged prompt, and a folder of the other one a leftover
    names += [stored_name] if kind != "file" else []
    names += [f".{stored_name}.abcdefgh.unfinished"] if kind != "folder" else []
    for name in names:
        make_entry(folder / name, kind)
    store_prompt(prompts, model, ids)
    prompts.max_bytes = prompts.nbytes
    store_prompt(prompts, model, random_ids(1, 100, seed=2))
    assert num_tokens_found(prompts, model, random_ids(1, 100, seed=2)) == 99
    assert len(prompts) == 1
    prompts.clear()
    assert {path.name for path in folder.iterdir()} == {".lock", *names}


def make_entry(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("not ours")
    elif kind == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("not ours")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(Path(__file__) if kind == "link" else "missing")


@pytest.mark.parametrize("action", ["store", "clear"])
def test_leftovers_of_killed_writers_are_removed(action, model, folder):
    prompts = PromptCache(folder, max_bytes=ROOM)
    left = folder / f".{'a1' * 32}.v{FORMAT_VERSION}.safetensors.ab12cd_3.unfinished"
    left.mkdir()
    (left / "lock").touch()
    (left / "half").write_text("half a file")
    prompts.clear() if action == "clear" else store_prompt(prompts, model, random_ids(1, 100))
    assert not left.exists()


def kill_stores(folder: Path) -> int:
    """Kills a process at each change of a file in a `store` that replaces one prompt and evicts another."""
    model, ids = tiny_model(num_hidden_layers=1, n_routed_experts=None), random_ids(1, 200)
    prompts, cache = PromptCache(folder, max_bytes=ROOM), LatentCache(model.config)
    expected = last_logits(model, ids, cache)
    for point in itertools.count(-1):
        prompts.clear()
        prompts.max_bytes = ROOM
        for old in (random_ids(1, 150, seed=2), ids[:, :70]):
            store_prompt(prompts, model, old)
        prompts.max_bytes = prompts.nbytes
        if not (child := os.fork()):
            kill_at(point, str(folder))
            prompts.store(cache, ids, model)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        assert all_bytes(folder) <= prompts.max_bytes
        # another process goes on
        found = prompts.load(ids, model)
        torch.testing.assert_close(last_logits(model, ids, found), expected, rtol=1e-4, atol=1e-4)
        prompts.store(found, ids, model)
        assert all_bytes(folder) <= prompts.max_bytes
        assert num_tokens_found(prompts, model, ids) == 199
        assert [path.name for path in folder.iterdir() if path.name[0] == "."] == [".lock"]
        if status == 0:
            return point


def all_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_store_killed_at_any_point_leaves_a_usable_folder_within_its_bound(folder):
    worker = start(f"{__name__}:kill_stores", folder)
    out, errors = worker.communicate()
    assert worker.returncode == 0, errors[-3000:]
    assert int(out.split()[-1]) > 10


@pytest.fixture
def unprivileged():
    """A folder that this process can read, while it has not the rights of root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "prompts"
        folder.parent.chmod(0o755)
        yield folder
        if folder.is_dir():
            folder.chmod(0o755)


@contextlib.contextmanager
def without_privileges():
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_may_not_be_written_to_can_be_read(model, unprivileged):
    ids = random_ids(1, 150)
    store_prompt(PromptCache(unprivileged, max_bytes=ROOM), model, ids)
    for path in [*unprivileged.iterdir()]:
        path.chmod(0o444)
    unprivileged.chmod(0o555)
    before = [path.name for path in unprivileged.iterdir()]
    with without_privileges():
        prompts = PromptCache(unprivileged, max_bytes=ROOM)
        assert num_tokens_found(prompts, model, ids) == 149
        for write in (prompts.clear, lambda: store_prompt(prompts, model, random_ids(1, 100, seed=2))):
            with pytest.raises(OSError, match=r"expected a folder that this process can lock and write to, .* not one"):
                write()
    assert [path.name for path in unprivileged.iterdir()] == before


def test_a_damaged_file_that_may_not_be_removed_is_ignored_with_a_warning(model, unprivileged):
    prompts, ids = PromptCache(unprivileged, max_bytes=ROOM), random_ids(1, 150)
    store_prompt(prompts, model, ids)
    (path,) = unprivileged.glob("*.safetensors")
    damage(path, -5)
    path.chmod(0o444)
    unprivileged.chmod(0o555)
    with without_privileges(), pytest.warns(UserWarning, match=f"a stored prompt was ignored: {path} was altered"):
        assert num_tokens_found(prompts, model, ids) == 0
    assert path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_prompts_of_another_user_are_ignored(model, unprivileged):
    ids = random_ids(1, 150)
    store_prompt(PromptCache(unprivileged, max_bytes=ROOM), model, ids)
    unprivileged.chmod(0o777)
    with without_privileges(), warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts = PromptCache(unprivileged, max_bytes=ROOM)
        assert num_tokens_found(prompts, model, ids) == 0
        assert len(prompts) == 1


def test_a_place_for_no_folder_and_a_lock_that_is_none_are_refused_in_one_sentence(model, folder):
    folder.parent.joinpath("file").touch()
    for place in (folder.parent / "file", folder.parent / "file" / "below"):
        with pytest.raises(OSError, match=rf"expected a folder for prompts at {place}, there is none and it cannot be"):
            PromptCache(place, max_bytes=ROOM)
    prompts = PromptCache(folder, max_bytes=ROOM)
    (folder / ".lock").mkdir()
    with pytest.raises(OSError, match=r"expected a folder that this process can lock and write to, .* is not one"):
        store_prompt(prompts, model, random_ids(1, 100))
    assert num_tokens_found(prompts, model, random_ids(1, 100)) == 0


def test_a_folder_that_is_removed_while_it_is_used_is_made_again(model, folder):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), random_ids(1, 100)
    store_prompt(prompts, model, ids)
    shutil.rmtree(folder)
    assert num_tokens_found(prompts, model, ids) == len(prompts) == prompts.nbytes == 0
    store_prompt(prompts, model, ids)
    assert num_tokens_found(prompts, model, ids) == 99


def test_the_order_of_use_survives_a_clock_that_is_set_back(model, folder, monkeypatch):
    prompts, ids = PromptCache(folder, max_bytes=ROOM), [random_ids(1, 100, seed) for seed in range(4)]
    for seed in range(3):
        monkeypatch.setattr(time, "time_ns", lambda now=10**18 - seed * 10**15: now)
        store_prompt(prompts, model, ids[seed])
    num_tokens_found(prompts, model, ids[0])
    prompts.max_bytes = prompts.nbytes
    store_prompt(prompts, model, ids[3])
    assert [num_tokens_found(prompts, model, x) > 0 for x in ids] == [True, False, True, True]
