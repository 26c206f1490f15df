"""A checkpoint is written completely or not at all, and an interrupted run is resumed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaConfig

from deepseek_latent import whole_files
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion import target
from deepseek_latent.conversion.target import Piece, Target
from tests.conversion.sources import save_source


def write(target: Target, pieces: list[Piece], *rest) -> list[str]:
    return target.write(target.plan(pieces), *rest)


def pieces_of(count: int, made: list[str] | None = None) -> list[Piece]:
    def make(i: int) -> torch.Tensor:
        if made is not None:
            made.append(f"t{i}")
        return torch.full((10,), float(i))

    return [Piece(f"t{i}", (10,), torch.float32, lambda i=i: make(i)) for i in range(count)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(26))
def test_a_run_that_ends_anywhere_leaves_all_or_nothing_under_the_name_and_is_resumed(tmp_path, monkeypatch, at):
    """The run ends at the nth call that renames or flushes a file."""
    calls, made = iter(range(10**6)), []

    def dying(function):
        def called(*arguments, **options):
            if next(calls) == at:
                raise Killed
            return function(*arguments, **options)

        return called

    texts = {"config.json": "{}"}
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying(os.replace))
        patched.setattr(os, "rename", dying(os.rename))
        patched.setattr(whole_files, "flush", dying(whole_files.flush))
        with suppress(Killed):
            write(Target(tmp_path / "out", shard_bytes=80), pieces_of(4, made), texts, [], "one")
    if not (tmp_path / "out").exists():
        write(Target(tmp_path / "out", shard_bytes=80), pieces_of(4, made), texts, [], "one")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == "config.json"
    stored = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
    assert {name: x[0].item() for name, x in stored.items()} == {f"t{i}": float(i) for i in range(4)}
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    # at most the two tensors of one shard are made again
    assert len(made) <= 4 + 2


def test_shards_that_an_interrupted_run_completed_are_not_made_again(tmp_path, monkeypatch):
    def interrupt(finished, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(target, "publish_folder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    made = []
    write(Target(tmp_path / "out"), pieces_of(2, made), {}, [], "one")
    assert made == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_what_was_planned_is_published(tmp_path, monkeypatch):
    """Each kill while safetensors writes a shard leaves a file of its own, as large as that shard."""

    def leave_files(self, shards):
        for name in (".tmpABCDEF", "model.safetensors.index.json", "model-00007-of-00009.safetensors"):
            (self.partial / name).write_text("left")
        (self.partial / ".model.safetensors.abcdefgh.unfinished" / "inside").mkdir(parents=True)
        (self.partial / "link").symlink_to(tmp_path)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Target, "_write_shards", leave_files)
        with pytest.raises(Killed):
            write(Target(tmp_path / "out"), pieces_of(2), {"config.json": "{}"}, [], "one")
    assert (tmp_path / ".out.partial" / ".tmpABCDEF").exists()
    licence = tmp_path / "LICENSE"
    licence.touch()
    files = write(Target(tmp_path / "out"), pieces_of(2), {"config.json": "{}"}, [licence], "one")
    assert sorted(files) == ["LICENSE", "config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*files, "conversion.json"])
    assert sorted(tmp_path.iterdir()) == [licence, tmp_path / "out"]


def test_the_index_is_among_the_files_that_were_written(tmp_path):
    files = write(Target(tmp_path / "out", shard_bytes=40), pieces_of(2), {"config.json": "{}"}, [], "one")
    assert "model.safetensors.index.json" in files
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*files, "conversion.json"])


def fail_to_save(error: BaseException, at: str, monkeypatch) -> None:
    """The disk fails when the shard with the tensor `at` is written."""
    save_file = whole_files.save_file

    def failing(tensors, path, metadata):
        if at in tensors:
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr(whole_files, "save_file", failing)


@pytest.mark.parametrize(
    "error", [SafetensorError("File too large (os error 27)"), OSError(28, "File too large")], ids=["theirs", "system"]
)
def test_a_disk_that_fails_is_an_error_with_the_file_and_its_bytes_and_keeps_finished_shards(
    tmp_path, monkeypatch, error
):
    made = []
    with monkeypatch.context() as patched:
        fail_to_save(error, "t2", patched)
        message = r"model-00003-of-00004\.safetensors could not be written: it needs 40 bytes, .* left \(File too large"
        with pytest.raises(OSError, match=message):
            write(Target(tmp_path / "out", shard_bytes=40), pieces_of(4, made), {}, [], "one")
    assert made == ["t0", "t1", "t2"]
    assert not (tmp_path / "out").exists()
    write(Target(tmp_path / "out", shard_bytes=40), pieces_of(4, made), {}, [], "one")
    assert made == ["t0", "t1", "t2", "t2", "t3"]
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_a_disk_that_is_found_full_before_the_rest_is_written_keeps_finished_shards(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        fail_to_save(KeyboardInterrupt(), "t2", patched)
        with pytest.raises(KeyboardInterrupt):
            write(Target(tmp_path / "out", shard_bytes=40), pieces_of(4), {}, [], "one")
    with monkeypatch.context() as patched:
        patched.setattr(target.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 79})())
        with pytest.raises(OSError, match=r"80 bytes are to be written .* 79 left"):
            write(Target(tmp_path / "out", shard_bytes=40), pieces_of(4), {}, [], "one")
    made = []
    write(Target(tmp_path / "out", shard_bytes=40), pieces_of(4, made), {}, [], "one")
    assert made == ["t2", "t3"]


def test_a_piece_that_is_wrong_leaves_nothing(tmp_path):
    """Another run would fail in the same way."""
    wrong = Piece("t9", (10,), torch.float32, lambda: torch.full((10,), torch.nan))
    with pytest.raises(ValueError, match="t9 became NaN"):
        write(Target(tmp_path / "out", shard_bytes=40), [*pieces_of(2), wrong], {}, [], "one")
    assert not [*tmp_path.iterdir()]


def test_another_conversion_does_not_resume_the_first_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(target, "publish_folder", lambda *folders: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    made = []
    write(Target(tmp_path / "out"), pieces_of(2, made), {}, [], "two")
    assert made == ["t0", "t1"]


def test_a_replaced_checkpoint_leaves_nothing_beside_the_new_one(tmp_path):
    for count in (2, 3):
        write(Target(tmp_path / "out", force=True), pieces_of(count), {"config.json": "{}"}, [], "one")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert len(load_file(tmp_path / "out" / "model.safetensors")) == count


def test_a_full_disk_is_reported_before_and_during_writing(tmp_path, monkeypatch):
    """No shard was finished, so nothing stays."""
    with monkeypatch.context() as patched:
        patched.setattr(target.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 79})())
        with pytest.raises(OSError, match=r"80 bytes are to be written .* 79 left"):
            write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    fail_to_save(OSError(28, "No space left"), "t0", monkeypatch)
    with pytest.raises(OSError, match="No space"):
        write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    assert not list(tmp_path.iterdir())


def test_a_replaced_folder_that_a_killed_run_had_set_aside_is_put_back(tmp_path):
    """Where folders cannot be exchanged, a run may die between two renames. Without --force, it stays."""
    left = tmp_path / ".out.abcdefgh.unfinished"
    (left / "out.old").mkdir(parents=True)
    (left / "out.old" / "config.json").write_text("{}")
    (left / "lock").touch()
    with pytest.raises(ValueError, match="--force to replace it"):
        Target(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_under_the_name_and_the_next_one_finishes(tmp_path):
    save_source(tmp_path / "source", LlamaConfig, num_hidden_layers=40)
    options = ["--max-shard-size", "20KB", str(tmp_path / "source"), str(tmp_path / "out")]
    command = [sys.executable, "-m", "deepseek_latent.commands", "convert", "gqa-to-mla", *options]
    process, partial = subprocess.Popen(command, stderr=subprocess.DEVNULL), tmp_path / ".out.partial"
    while process.poll() is None and len(list(partial.glob("*.safetensors"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(kept) >= 5
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "source")]) == 0


def test_a_folder_that_could_not_be_published_is_continued(tmp_path, monkeypatch):
    def no_space(*folders):
        raise OSError("No space left on device")

    made = []
    with monkeypatch.context() as patched:
        patched.setattr(target, "publish_folder", no_space)
        with pytest.raises(OSError, match="No space"):
            write(Target(tmp_path / "out", shard_bytes=100), pieces_of(3, made), {"config.json": "{}"}, [], "one")
    assert len(made) == 3
    write(Target(tmp_path / "out", shard_bytes=100), pieces_of(3, made), {"config.json": "{}"}, [], "one")
    assert len(made) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_out_that_appears_during_the_work_is_kept_and_so_is_the_work(tmp_path):
    made = []

    def appear(folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").touch()

    with pytest.raises(ValueError, match="exists"):
        write(Target(tmp_path / "out"), pieces_of(2, made), {"config.json": "{}"}, [], "one", appear)
    (tmp_path / "out" / "notes").unlink()
    write(Target(tmp_path / "out"), pieces_of(2, made), {"config.json": "{}"}, [], "one")
    assert len(made) == 2
