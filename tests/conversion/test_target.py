"""A checkpoint is written completely or not at all, and an interrupted run is resumed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaConfig

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


@pytest.mark.parametrize("at", range(8))
def test_a_run_that_ends_anywhere_leaves_nothing_under_the_name_and_is_resumed(tmp_path, monkeypatch, at):
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
        patched.setattr(target.os, "replace", dying(os.replace))
        patched.setattr(target.os, "rename", dying(os.rename))
        patched.setattr(target, "_flush", dying(target._flush))
        try:
            write(Target(tmp_path / "out", shard_bytes=80), pieces_of(4, made), texts, [], "one")
        except Killed:
            assert not (tmp_path / "out").exists() or at > 5
    before = list(made)
    if not (tmp_path / "out").exists():
        write(Target(tmp_path / "out", shard_bytes=80), pieces_of(4, made), texts, [], "one")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == "config.json"
    stored = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
    assert {name: x[0].item() for name, x in stored.items()} == {f"t{i}": float(i) for i in range(4)}
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    # shards that were complete are not made again
    assert len(made) < 2 * len(before) + 4


def test_shards_that_an_interrupted_run_completed_are_not_made_again(tmp_path, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Target, "_publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    made = []
    write(Target(tmp_path / "out"), pieces_of(2, made), {}, [], "one")
    assert made == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_is_reported_in_one_sentence(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise SafetensorError("File too large (os error 27)")

    monkeypatch.setattr(target, "save_file", fail)
    with pytest.raises(ValueError, match=r"model\.safetensors could not be written: File too large"):
        write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    assert not (tmp_path / "out").exists()


def test_another_conversion_does_not_resume_the_first_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Target, "_publish", lambda self: (_ for _ in ()).throw(Killed))
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
    with monkeypatch.context() as patched:
        patched.setattr(target.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 79})())
        with pytest.raises(ValueError, match=r"80 bytes are to be written .* 79 left"):
            write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    monkeypatch.setattr(target, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    assert not list(tmp_path.iterdir())


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
