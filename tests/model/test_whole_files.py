"""A file or folder appears whole, or what was there before stays, also if the process is killed while it writes."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from deepseek_latent import whole_files
from deepseek_latent.whole_files import save_tensors, whole_file, whole_folder

KILLED_WHILE_WRITING = """
import os, signal, sys
from deepseek_latent.whole_files import whole_file
path = sys.argv[1]
with whole_file(path) as place:
    place.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write_half(writing):
    with writing as place:
        (place / "file" if place.is_dir() else place).write_text("half")
        raise KeyboardInterrupt


def test_a_file_that_could_not_be_finished_leaves_the_one_before(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_half(whole_file(path))
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_that_could_not_be_finished_leaves_the_one_before(tmp_path):
    path = tmp_path / "kept"
    path.mkdir()
    (path / "file").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_half(whole_folder(path))
    assert (path / "file").read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchanged", "renamed_twice"])
def test_a_folder_replaces_all_of_the_one_before(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(whole_files, "_exchange", lambda first, second: False)
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with whole_folder(path) as place:
        (place / "new").write_text("new")
    assert [file.name for file in path.iterdir()] == ["new"]
    assert [*tmp_path.iterdir()] == [path]


def test_folders_are_exchanged_in_one_step_on_this_system(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "file").touch()
    assert whole_files._exchange(first, second) == (sys.platform in ("linux", "darwin"))
    assert (second / "file").exists()


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "file.txt"
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, path])
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    assert len([*tmp_path.iterdir()]) == 1
    with whole_file(path) as place:
        place.write_text("whole")
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_running_process_writes_and_what_others_call_similar_stays(tmp_path):
    parent = tmp_path / f".file.txt.{whole_files._MACHINE}-{os.getppid()}-abc.unfinished"
    foreign = tmp_path / ".file.txt.unfinished"
    other = tmp_path / ".file.txt.elsewhere-999999999-abc.unfinished"
    for folder in (parent, foreign, other):
        folder.mkdir()
    with whole_file(tmp_path / "file.txt") as first, whole_file(tmp_path / "file.txt") as second:
        first.write_text("first")
        second.write_text("second")
    assert parent.exists()
    assert foreign.exists()
    assert other.exists()
    assert (tmp_path / "file.txt").read_text() == "first"


def test_a_folder_is_restored_if_a_process_died_between_two_renames(tmp_path):
    path = tmp_path / "folder"
    left = tmp_path / f".folder.{whole_files._MACHINE}-999999999-abc.unfinished"
    (left / "folder.old").mkdir(parents=True)
    (left / "folder.old" / "file").write_text("before")
    with pytest.raises(RuntimeError), whole_folder(path):
        raise RuntimeError
    assert (path / "file").read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_keeps_the_permissions_of_the_one_before_or_has_the_usual_ones(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    tensors = {"x": torch.ones(3)}
    with whole_file(tmp_path / "new") as place:
        save_tensors(place, tensors, {})
    assert (tmp_path / "new").stat().st_mode == usual.stat().st_mode
    (tmp_path / "new").chmod(0o640)
    with whole_file(tmp_path / "new") as place:
        save_tensors(place, tensors, {})
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    with whole_file(tmp_path / "new", private=True) as place:
        save_tensors(place, tensors, {})
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    assert load_file(tmp_path / "new")["x"].tolist() == [1, 1, 1]


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    (tmp_path / "original").write_text("original")
    link = tmp_path / "link"
    link.symlink_to("original")
    with whole_file(link) as place:
        place.write_text("new")
    assert (tmp_path / "original").read_text() == "original"
    assert not link.is_symlink()


def test_a_missing_folder_is_refused_with_its_name(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"missing is not one; create it first"),
        whole_file(tmp_path / "missing" / "file"),
    ):
        pass


def test_a_full_disk_is_an_error_with_the_file_and_the_bytes_that_it_needs(tmp_path, monkeypatch):
    def no_space(*args):
        raise whole_files.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(whole_files, "save_file", no_space)
    message = r"big could not be written: it needs 4,000 bytes, and .* left .*No space"
    with pytest.raises(OSError, match=message), whole_file(tmp_path / "big") as place:
        save_tensors(place, {"x": torch.zeros(1000)}, {})
    assert [*tmp_path.iterdir()] == []
