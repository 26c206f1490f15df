"""A file or folder appears whole, or what was there before stays, also if the process is killed while it writes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

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


def test_what_others_write_at_the_same_time_and_what_is_called_similar_stays(tmp_path):
    foreign = tmp_path / ".file.txt.unfinished", tmp_path / ".file.txt.abcdefgh.unfinished", tmp_path / ".file.txt.tmp"
    for folder in foreign:
        folder.mkdir()
        (folder / "theirs").touch()
    with whole_file(tmp_path / "file.txt") as first, whole_file(tmp_path / "file.txt") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file.txt").read_text() == "first"
    script = KILLED_WHILE_WRITING.replace("os.kill(os.getpid(), signal.SIGKILL)", "")
    with whole_file(tmp_path / "file.txt") as place:
        place.write_text("of a living process")
        subprocess.run([sys.executable, "-c", script, tmp_path / "file.txt"], check=True)
        assert (tmp_path / "file.txt").read_text() == "half"
    assert (tmp_path / "file.txt").read_text() == "of a living process"
    assert sorted(tmp_path.iterdir()) == sorted([*foreign, tmp_path / "file.txt"])
    assert all((folder / "theirs").exists() for folder in foreign)


def test_what_a_killed_process_of_another_machine_left_goes_too(tmp_path):
    """Its process number and host name would mean nothing here."""
    left = tmp_path / ".file.txt.abcdefgh.unfinished"
    left.mkdir()
    (left / "lock").touch()
    (left / "file.txt").write_text("half")
    (tmp_path / ".file.txt.hgfedcba.unfinished").mkdir()
    with whole_file(tmp_path / "file.txt") as place:
        place.write_text("whole")
    assert [*tmp_path.iterdir()] == [tmp_path / "file.txt"]


def test_a_folder_is_restored_if_a_process_died_between_two_renames(tmp_path):
    path, left = tmp_path / "folder", tmp_path / ".folder.abcdefgh.unfinished"
    (left / "folder.old").mkdir(parents=True)
    (left / "folder.old" / "file").write_text("before")
    (left / "lock").touch()
    with pytest.raises(RuntimeError), whole_folder(path):
        raise RuntimeError
    assert (path / "file").read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_is_restored_if_the_second_of_two_renames_fails(tmp_path, monkeypatch):
    path, rename = tmp_path / "folder", os.rename
    path.mkdir()
    (path / "file").write_text("before")

    def failing(source, target):
        if target == path and source.name == path.name:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(whole_files, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match=r"folder could not be written to .*: Input/output error"), whole_folder(path):
        pass
    assert (path / "file").read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_folders_that_cannot_be_exchanged_for_another_reason_are_not_renamed_one_by_one(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        whole_files._exchange(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize("writer", [whole_file, whole_folder])
def test_what_cannot_be_replaced_is_refused_before_anything_is_written(tmp_path, monkeypatch, writer):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    (folder / "in it").mkdir(parents=True)
    monkeypatch.chdir(folder / "in it")
    others = (folder, Path("/dev/null")) if writer is whole_file else (file, Path("/proc"), folder)
    for path in others:
        with pytest.raises(OSError, match=r"a folder or a device|is a file|disk is mounted|the working directory"):
            write_half(writer(path))
    assert sorted(tmp_path.iterdir()) == [file, folder]


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


def test_a_folder_keeps_the_permissions_of_the_one_before_and_its_files_have_the_usual_ones(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    (tmp_path / "folder").mkdir(0o750)
    with whole_folder(tmp_path / "folder") as place:
        save_tensors(place / "file", {"x": torch.ones(3)}, {})
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "folder" / "file").stat().st_mode == usual.stat().st_mode


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
    message = rf"big could not be written: it needs 4,000 bytes, and the disk of {tmp_path} has .* left .*No space"
    with pytest.raises(OSError, match=message), whole_file(tmp_path / "big") as place:
        save_tensors(place, {"x": torch.zeros(1000)}, {})
    with pytest.raises(OSError, match=message), whole_folder(tmp_path / "folder") as place:
        save_tensors(place / "big", {"x": torch.zeros(1000)}, {})
    assert [*tmp_path.iterdir()] == []


def test_a_text_that_does_not_fit_is_an_error_with_the_file_and_the_bytes_that_it_needs(tmp_path):
    """No file may grow beyond a page in that process, which the system says as it says that a disk is full."""
    script = """
import resource, signal, sys
from deepseek_latent.whole_files import save_text, whole_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with whole_file(sys.argv[1]) as place:
    save_text(place, "ä" * 5000)
"""
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "big"], capture_output=True, text=True)
    message = f"OSError: big could not be written: it needs 10,000 bytes, and the disk of {tmp_path} has "
    assert ended.stderr.splitlines()[-1].startswith(message)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("writer", [whole_file, whole_folder])
def test_a_folder_that_takes_no_files_is_an_error_with_the_name(tmp_path, monkeypatch, writer):
    def read_only(**options):
        raise OSError(errno.EROFS, "Read-only file system", "somewhere")

    monkeypatch.setattr(whole_files.tempfile, "mkdtemp", read_only)
    with pytest.raises(OSError, match=rf"^new could not be written to {tmp_path}: Read-only file system\.$"):
        write_half(writer(tmp_path / "new"))


def test_a_link_in_the_place_of_a_leftover_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    (elsewhere / "kept").write_text("kept")
    (tmp_path / ".file.txt.abcdefgh.unfinished").symlink_to(elsewhere)
    with whole_file(tmp_path / "file.txt") as place:
        place.write_text("whole")
    assert (elsewhere / "kept").read_text() == "kept"
