"""The library of operators is built once; a kept one is loaded only if it is whole and nobody else can have made it."""

import hashlib
import os
import shutil
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepseek_latent.kernels.cpu import build
from tests.support import needs_compiler

CODE = b"operators"
# notes each call beside itself, and writes what stands for a library
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo stub; exit; fi
echo "$@" >> "$0.log"
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then printf operators > "$2"; fi
  shift
done
"""


class Machine:
    """A compiler and a system that loads libraries, both without C++: what was loaded, and how often was built."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.compiler, self.home, self.loaded = folder / "bin" / "g++", folder / "home", []
        self.compiler.parent.mkdir()
        self.compile_with(COMPILER)
        monkeypatch.setattr(shutil, "which", lambda name: str(self.compiler) if name == "g++" else None)
        monkeypatch.setattr(build, "constants", SimpleNamespace(HF_HOME=str(self.home)))
        monkeypatch.setattr(torch.ops, "load_library", self.load)

    def compile_with(self, script: str) -> None:
        self.compiler.write_text(script)
        self.compiler.chmod(0o755)

    def load(self, path: Path) -> None:
        content = Path(path).read_bytes()
        if not content.startswith((CODE, b"planted")):
            raise OSError(f"Could not load this library: {path}")
        self.loaded.append(content)

    def times_linked(self) -> int:
        log = Path(f"{self.compiler}.log")
        return log.read_text().count("-shared") if log.exists() else 0

    @property
    def kept(self) -> Path:
        (path,) = (self.home / "deepseek_latent").iterdir()
        return path


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def planted() -> bytes:
    return b"planted" + hashlib.sha256(b"planted").hexdigest().encode()


def test_a_library_is_built_once_and_loaded_by_every_process_after(machine):
    with warnings.catch_warnings(action="error"):
        for _ in range(3):
            build.load_library()
    assert machine.times_linked() == 1
    assert [content[: len(CODE)] for content in machine.loaded] == [CODE] * 3
    assert machine.kept.stat().st_mode & 0o777 == 0o644


def test_building_is_announced_in_one_line_and_loading_is_not(machine, capsys):
    build.load_library()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiling the operators of deepseek_latent for this CPU, about a minute, once")
    assert str(machine.kept.parent) in line
    build.load_library()
    assert capsys.readouterr().err == ""


def test_operators_that_are_not_kept_are_announced_as_such(machine, capsys):
    machine.home.write_bytes(b"a file where a folder should be")
    with pytest.warns(UserWarning, match="for this process alone"):
        build.load_library()
    assert "about a minute, for this process alone ..." in capsys.readouterr().err


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "altered": lambda path: path.write_bytes(b"o" + path.read_bytes()),
    "of another program": lambda path: path.write_bytes(b"planted" * 30),
    "a link": lambda path: (path.rename(path.parent.parent / "elsewhere"), path.symlink_to("../elsewhere")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "writable by all": lambda path: path.chmod(0o666),
    "writable by the group": lambda path: path.chmod(0o664),
    "not a library": lambda path: path.write_bytes(b"x" + hashlib.sha256(b"x").hexdigest().encode()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_that_cannot_be_trusted_is_built_again_and_replaced(damage, machine):
    build.load_library()
    DAMAGES[damage](machine.kept)
    with pytest.warns(UserWarning, match="built again, because those kept cannot be used: .*kernels-"):
        build.load_library()
    assert machine.times_linked() == 2
    with warnings.catch_warnings(action="error"):
        build.load_library()
    assert machine.times_linked() == 2
    assert all(content.startswith(CODE) for content in machine.loaded)


def test_a_library_in_a_folder_that_all_can_write_to_is_not_loaded(machine):
    build.load_library()
    machine.kept.write_bytes(planted())
    machine.home.chmod(0o777)
    with pytest.warns(UserWarning, match=f"others can write to {machine.home}; to keep them, set HF_HOME to a folder"):
        build.load_library()
    assert machine.loaded[-1].startswith(CODE)
    assert machine.kept.read_bytes() == planted()


def test_a_library_of_another_user_is_not_loaded(machine, monkeypatch):
    build.load_library()
    machine.kept.write_bytes(planted())
    if os.geteuid() == 0:
        os.chown(machine.kept, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.warns(UserWarning, match="belongs to another user"):
        build.load_library()
    assert machine.loaded[-1].startswith(CODE)


def test_a_folder_that_cannot_be_written_to_costs_a_warning(machine):
    machine.home.write_bytes(b"a file where a folder should be")
    with pytest.warns(UserWarning, match=r"cannot be written to \(.*set HF_HOME to a folder that only you"):
        build.load_library()
    assert machine.loaded[-1].startswith(CODE)


def test_a_whole_library_is_loaded_from_a_folder_that_is_read_only(machine):
    build.load_library()
    machine.kept.parent.chmod(0o555)
    try:
        build.load_library()
    finally:
        machine.kept.parent.chmod(0o755)
    assert machine.times_linked() == 1


def test_two_builds_at_once_both_end_well(machine):
    threads = [threading.Thread(target=build.load_library) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [content[: len(CODE)] for content in machine.loaded] == [CODE] * 2
    assert build.why_not_whole(machine.kept) is None


FAILURES = {
    "fails": ("case $1 in -*version) exit;; esac; echo 'error: no luck' >&2; exit 1", "could not build .*no luck"),
    "hangs": ("case $1 in -*version) exit;; esac; exec sleep 60", "did not build the kernels in 0.2 s"),
    "makes nothing": ("exit 0", "built kernels that cannot be loaded"),
    "tells no version": ("exit 3", "does not tell its version"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_compiler_that_fails_is_named_and_leaves_nothing(failure, machine, monkeypatch):
    script, message = FAILURES[failure]
    machine.compile_with(f"#!/bin/sh\n{script}\n")
    monkeypatch.setattr(build, "MOST_SECONDS", 0.2 if failure == "hangs" else 60)
    with pytest.raises(RuntimeError, match=f"g\\+\\+ .*{message}"):
        build.load_library()
    assert machine.loaded == []
    assert not machine.home.exists() or not list((machine.home / "deepseek_latent").iterdir())


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"found neither g\+\+ nor clang\+\+; install one"):
        build.load_library()


@needs_compiler
def test_a_failed_build_gives_its_reason_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "constants", SimpleNamespace(HF_HOME=tmp_path))
    monkeypatch.setattr(build, "HERE", tmp_path)
    for name in build.SOURCES:
        (tmp_path / name).write_text("#error no luck today\n")
    with pytest.raises(RuntimeError, match=r"could not build the kernels: .*no luck today"):
        build.load_library()
    assert not list((tmp_path / "deepseek_latent").iterdir())
