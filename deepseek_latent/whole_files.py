"""Files and folders that are written whole: a process that dies while it writes leaves what was there before.

Everything is written into a hidden folder beside its place and renamed when it is complete and on the disk. A process
that is killed leaves that hidden folder, and the next writer of the same name removes it.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_SUFFIX = ".unfinished"
# a regular expression for what follows ".name." in the hidden folder of a file or folder called "name"
END_OF_HIDDEN_NAME = rf"\w{{8}}{re.escape(_SUFFIX)}"
# a writer keeps this file of its hidden folder locked, so that others see that it is alive
_LOCK = "lock"
# how systems and disks say that they cannot exchange two names
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def whole_file(path: str | os.PathLike, *, private: bool = False) -> Iterator[Path]:
    """Yields a place to write a file to, which replaces `path` when the block ends without an error.

    A link at `path` is replaced, and not what it points to. The file keeps the permissions of the one that it replaces;
    a `private` file can be read by nobody but its owner.

    Raises:
        FileNotFoundError: if the folder of `path` does not exist.
        OSError: naming the file, if it cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"expected a place for a file, {path} is a folder or a device; choose another name.")
    with _hidden_folder(path) as folder:
        unfinished = folder / path.name
        with disk_errors(unfinished):
            yield unfinished
            if private:
                unfinished.chmod(0o600)
            elif path.is_file():
                unfinished.chmod(path.stat().st_mode & 0o777)
            flush(unfinished)
            os.replace(unfinished, path)
            flush(path.parent)


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder to write to, which replaces the folder `path` when the block ends without an error.

    Whoever calls this has decided that an existing folder may be replaced: nothing of it is kept.

    Raises:
        FileNotFoundError: if the folder that holds `path` does not exist.
        OSError: naming what could not be written, or if `path` cannot be replaced.
    """
    path = Path(path).resolve()
    check_replaceable(path)
    with _hidden_folder(path) as folder:
        unfinished = folder / path.name
        unfinished.mkdir()
        with disk_errors(unfinished):
            yield unfinished
        publish_folder(unfinished, path)


def check_replaceable(path: Path) -> None:
    """Raises OSError if `path` is something that no folder can replace; it need not exist."""
    if path.exists() and not path.is_dir():
        raise OSError(f"expected a place for a folder, {path} is a file; choose another name.")
    if os.path.ismount(path):
        raise OSError(f"{path} is where a disk is mounted, and cannot be replaced; choose a folder in it.")
    if Path.cwd().is_relative_to(path):
        raise OSError(f"{path} holds the working directory, and cannot be replaced; call this from another folder.")


def publish_folder(finished: Path, path: Path) -> None:
    """Puts the folder `finished` in the place of `path` in one step; what was there is removed afterwards.

    On a disk that cannot exchange two folders, such as NFS, the old one is renamed first. If the process is killed
    between these two renames, the next writer or `remove_leftovers` puts it back.
    """
    with disk_errors(path):
        flush_folder(finished)
        if not path.exists():
            os.rename(finished, path)
        else:
            finished.chmod(path.stat().st_mode & 0o7777)
            if _exchange(finished, path):
                shutil.rmtree(finished)
            else:
                _rename_twice(finished, path)
        flush(path.parent)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file to a place that `whole_file` or `whole_folder` gave.

    Raises:
        OSError: naming the file and the bytes that it needs, if it cannot be written.
    """
    with disk_errors(path, sum(tensor.nbytes for tensor in tensors.values())):
        # safetensors makes files that only their owner can read, so an ordinary file shows the usual permissions
        path.touch()
        mode = path.stat().st_mode & 0o777
        save_file(tensors, path, metadata)
        path.chmod(mode)


def save_text(path: Path, text: str) -> None:
    """Writes a text, as `save_tensors` writes tensors."""
    content = text.encode()
    with disk_errors(path, len(content)):
        path.write_bytes(content)


@contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Errors of the system become an OSError in one sentence, with the file or folder and the bytes that it needs."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:
            # it has its sentence already
            raise
        hidden = [parent.parent for parent in path.parents if parent.name.endswith(_SUFFIX)]
        disk, reason = hidden[0] if hidden else path.parent, getattr(error, "strerror", error)
        if needed is None:
            raise OSError(f"{path.name} could not be written to {disk}: {reason}.") from error
        free = shutil.disk_usage(disk).free
        raise OSError(
            f"{path.name} could not be written: it needs {needed:,} bytes, and the disk of {disk} has {free:,} left "
            f"({reason})."
        ) from error


def flush(path: Path) -> None:
    """Returns when the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network disks keep folders by themselves and say so
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Returns when the folder and all that it holds are on the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            flush(Path(parent, name))
        flush(Path(parent))


def remove_leftovers(path: Path) -> None:
    """Removes what killed writers of `path` left beside it, and puts back the folder that one was about to replace."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{END_OF_HIDDEN_NAME}")
    for folder in [x for x in path.parent.iterdir() if name.fullmatch(x.name) and is_own_folder(x)]:
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            # its writer died before it made this file, or another program made the folder and something is in it
            with suppress(OSError):
                folder.rmdir()
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / _old_name(path)).exists() and not path.exists():
                os.rename(folder / _old_name(path), path)
            _remove(folder)
        except OSError:
            # its writer is alive, or this disk has no locks to tell, or does not let us remove it: it stays
            pass
        finally:
            os.close(lock)


def is_own_folder(path: Path) -> bool:
    """False for what somebody else put there, such as a link to a folder that is to be emptied."""
    with suppress(FileNotFoundError):
        status = path.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return False


@contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, removed at the end. Those that killed writers left are removed first."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"expected a folder to write {path.name} into, {path.parent} is not one; create it first."
        )
    with disk_errors(path):
        remove_leftovers(path)
        folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        with suppress(OSError):
            _remove(folder)
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside `path`, and the open lock in it, which the system releases when this process ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent))
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            # another writer took the empty folder for a leftover
            continue
        except OSError:
            folder.rmdir()
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:
            # this disk has no locks, so nobody can mistake the folder for a leftover
            pass
        if (folder / _LOCK).exists():
            return folder, lock
        os.close(lock)


def _remove(folder: Path) -> None:
    """Removes a hidden folder, its lock last: without it, nobody would know whose the rest is."""
    for entry in [*os.scandir(folder)]:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            os.unlink(entry)
    os.unlink(folder / _LOCK)
    folder.rmdir()


def _rename_twice(finished: Path, path: Path) -> None:
    with _hidden_folder(path) as folder:
        old = folder / _old_name(path)
        try:
            os.rename(path, old)
            os.rename(finished, path)
        finally:
            if old.exists() and not path.exists():
                os.rename(old, path)


def _old_name(path: Path) -> str:
    return f"{path.name}.old"


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two folders in one step, and returns False if the system or its disk cannot."""
    libc, exchange, here = ctypes.CDLL(None, use_errno=True), 2, -100
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(os.fsencode(first), os.fsencode(second), exchange)
    else:
        return False
    if failed and ctypes.get_errno() not in _CANNOT_EXCHANGE:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    return not failed
