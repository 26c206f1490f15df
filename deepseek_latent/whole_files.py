"""Files and folders that are written whole: a process that dies while it writes leaves what was there before.

Everything is written into a hidden folder beside its place and renamed when it is complete and on the disk. A process
that is killed leaves that hidden folder, and the next writer of the same name removes it.
"""

import ctypes
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_SUFFIX = ".unfinished"
# a regular expression for what follows ".name." in the hidden folder of a file or folder called "name"
END_OF_HIDDEN_NAME = rf"\w*-\d+-\w+{re.escape(_SUFFIX)}"
# processes of other machines may write to a shared disk, and their numbers mean nothing here
_MACHINE = re.sub(r"[^A-Za-z0-9]", "_", platform.node())[:32]
# the hidden folders that this process is writing
_in_use: set[str] = set()


@contextmanager
def whole_file(path: str | os.PathLike, *, private: bool = False) -> Iterator[Path]:
    """Yields a place to write a file to, which replaces `path` when the block ends without an error.

    A link at `path` is replaced, and not what it points to. The file keeps the permissions of the one that it replaces;
    a `private` file can be read by nobody but its owner.

    Raises:
        FileNotFoundError: if the folder of `path` does not exist.
    """
    path = Path(path)
    with _hidden_folder(path) as folder:
        unfinished = folder / path.name
        # safetensors makes files that only their owner can read, so an ordinary file shows the usual permissions
        unfinished.touch()
        mode = (path if path.is_file() else unfinished).stat().st_mode & 0o777
        yield unfinished
        unfinished.chmod(0o600 if private else mode)
        flush(unfinished)
        os.replace(unfinished, path)
        flush(path.parent)


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder to write to, which replaces the folder `path` when the block ends without an error.

    Whoever calls this has decided that an existing folder may be replaced: nothing of it is kept.

    Raises:
        FileNotFoundError: if the folder that holds `path` does not exist.
    """
    path = Path(path).resolve()
    with _hidden_folder(path) as folder:
        unfinished = folder / path.name
        unfinished.mkdir()
        yield unfinished
        publish_folder(unfinished, path)


def publish_folder(finished: Path, path: Path) -> None:
    """Puts the folder `finished` in the place of `path` in one step; what was there is removed afterwards."""
    for parent, _, files in os.walk(finished):
        for name in files:
            flush(Path(parent, name))
        flush(Path(parent))
    if not path.exists():
        os.rename(finished, path)
    elif _exchange(finished, path):
        shutil.rmtree(finished)
    else:
        # this file system cannot exchange two folders, so for a moment there is none
        old = finished.with_name(_old_name(finished.name))
        os.rename(path, old)
        os.rename(finished, path)
        shutil.rmtree(old)
    flush(path.parent)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file to a place that `whole_file` or `whole_folder` gave.

    Raises:
        OSError: naming the file and the bytes that it needs, if it cannot be written.
    """
    try:
        save_file(tensors, path, metadata)
    except (SafetensorError, OSError) as error:
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path.name} could not be written: it needs {needed:,} bytes, and the disk of {path.parent} has {free:,} "
            f"left ({error})."
        ) from error


def flush(path: Path) -> None:
    """Returns when the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, removed at the end together with those that killed processes left."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"expected a folder to write {path.name} into, {path.parent} is not one; create it first."
        )
    _remove_leftovers(path)
    prefix = f".{path.name}.{_MACHINE}-{os.getpid()}-"
    folder = tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=path.parent)
    _in_use.add(folder)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _in_use.discard(folder)


def _remove_leftovers(path: Path) -> None:
    name = re.compile(rf"\.{re.escape(path.name)}\.{_MACHINE}-(\d+)-\w+{re.escape(_SUFFIX)}")
    for entry in os.scandir(path.parent):
        match = name.fullmatch(entry.name)
        if match and entry.path not in _in_use and (int(match[1]) == os.getpid() or not _is_running(int(match[1]))):
            old = Path(entry.path, _old_name(path.name))
            if old.exists() and not path.exists():
                os.rename(old, path)
            shutil.rmtree(entry.path, ignore_errors=True)


def _old_name(name: str) -> str:
    return f"{name}.old"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two folders in one step, and returns False if the system or its disk cannot."""
    libc, exchange, here = ctypes.CDLL(None), 2, -100
    with suppress(AttributeError):
        return libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
    with suppress(AttributeError):
        return libc.renamex_np(os.fsencode(first), os.fsencode(second), exchange) == 0
    return False
