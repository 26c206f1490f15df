"""The folder of a PromptCache: which files in it are prompts, who may write, and what is removed to make room."""

import errno
import hashlib
import os
import re
import shutil
import time
import warnings
from array import array
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from ..whole_files import END_OF_HIDDEN_NAME, is_own_folder
from .files import FORMAT_VERSION
from .storage import read_description

TOKENS_PER_BLOCK = 64
_STORED_NAME = rf"[0-9a-f]{{64}}\.v{FORMAT_VERSION}\.safetensors"
_UNFINISHED_NAME = rf"\.{_STORED_NAME}\.{END_OF_HIDDEN_NAME}"
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}


class Prompt(NamedTuple):
    """The tokens of one sequence in a file; `key` is the fingerprint of the model and the cache_dtype."""

    key: str
    tokens: array

    @property
    def file_name(self) -> str:
        return f"{hashlib.sha256(self.key.encode() + self.tokens.tobytes()).hexdigest()}.v{FORMAT_VERSION}.safetensors"

    def block_hashes(self) -> list[bytes]:
        """One hash per whole block, over the block and the hash before it: it is that of all tokens up to there."""
        data, width = self.tokens.tobytes(), TOKENS_PER_BLOCK * self.tokens.itemsize
        hashes, previous = [], self.key.encode()
        for end in range(width, len(data) + 1, width):
            previous = hashlib.blake2b(previous + data[end - width : end], digest_size=16).digest()
            hashes.append(previous)
        return hashes

    def starts_with(self, other: "Prompt") -> bool:
        return self.key == other.key and self.tokens[: len(other.tokens)] == other.tokens


class PromptFolder:
    """The files of prompts in a folder that other processes use at the same time.

    A prompt is a regular file with a name that `Prompt.file_name` gives. Nothing else in the folder is read, counted or
    removed, except for what killed writers left of such files. To read, no permission to write is needed: where files
    cannot be changed, their order of use stays as it is, and damaged ones are ignored.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._make()
        self._prompts: dict[tuple[str, int], tuple[Prompt, list[bytes]]] = {}

    def files(self) -> Iterator[tuple[Path, os.stat_result]]:
        return self._entries(_STORED_NAME, os.DirEntry.is_file)

    def prompts(self) -> dict[Path, tuple[Prompt, list[bytes]]]:
        """The prompts of all files and their block hashes; a file with a known name and inode is not read again."""
        known, self._prompts, found = self._prompts, {}, {}
        for path, status in self.files():
            file = path.name, status.st_ino
            try:
                found[path] = self._prompts[file] = known[file] if file in known else _read_prompt(path)
            except (FileNotFoundError, PermissionError):
                # another process has removed it since it was listed, or it is the file of another user
                continue
            except ValueError as error:
                self.discard(path, error)
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing to the folder, and removes what killed ones left.

        Raises:
            OSError: if this process may not write there, or there are no locks.
        """
        self._make()
        # made here, because a forked process may not use a lock that was made before
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            raise self._not_writable(error) from error
        try:
            # whoever writes holds the lock, so these are from writers that were killed
            for path, _ in self._entries(_UNFINISHED_NAME, os.DirEntry.is_dir):
                if is_own_folder(path):
                    shutil.rmtree(path)
            yield
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
            raise self._not_writable(error) from error
        finally:
            lock.release()

    def make_room(self, nbytes: int, max_bytes: int, replaced: Container[Path]) -> None:
        """Removes files until `nbytes` more are at most `max_bytes`: `replaced` first, then the least recently used."""
        files = sorted(self.files(), key=lambda file: (file[0] not in replaced, file[1].st_mtime_ns))
        total = nbytes + sum(status.st_size for _, status in files)
        for path, status in files:
            if total > max_bytes:
                path.unlink(missing_ok=True)
                total -= status.st_size

    def touch(self, path: Path) -> None:
        """Makes a file the most recently used one."""
        # by our own clock: a file system's clock ticks in milliseconds, which would lose the order; and any clock may
        # have been set back
        newest = max((status.st_mtime_ns for _, status in self.files()), default=0)
        now = max(time.time_ns(), newest + 1)
        with suppress(FileNotFoundError), _allowed_to_fail():
            os.utime(path, ns=(now, now))

    def discard(self, path: Path, error: ValueError) -> None:
        """Removes a damaged file, and warns."""
        with _allowed_to_fail():
            path.unlink(missing_ok=True)
        action = "ignored" if path.exists() else "removed"
        warnings.warn(f"a stored prompt was {action}: {error}", stacklevel=3)

    def _entries(self, name: str, is_kind) -> Iterator[tuple[Path, os.stat_result]]:
        pattern = re.compile(name)
        with suppress(FileNotFoundError):  # somebody has removed the folder
            for entry in os.scandir(self.path):
                with suppress(FileNotFoundError):  # another process has removed it since it was listed
                    if pattern.fullmatch(entry.name) and is_kind(entry, follow_symlinks=False):
                        yield Path(entry.path), entry.stat(follow_symlinks=False)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"expected a folder for prompts at {self.path}, there is none and it cannot be made ({error}); name "
                "another one."
            ) from error

    def _not_writable(self, error: Exception) -> OSError:
        return OSError(
            f"expected a folder that this process can lock and write to, {self.path} is not one ({error}); prompts in "
            "it can only be loaded, so store into another folder."
        )


@contextmanager
def _allowed_to_fail() -> Iterator[None]:
    """Ignores that a file may not be changed here, and nothing else."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise


def _read_prompt(path: Path) -> tuple[Prompt, list[bytes]]:
    stored = read_description(path)
    if len(stored["tokens"]) != 1:
        raise ValueError(f"{path} holds {len(stored['tokens'])} sequences, expected one; remove it.")
    prompt = Prompt(f"{stored['fingerprint']} {stored['cache_dtype']}", array("q", stored["tokens"][0]))
    return prompt, prompt.block_hashes()
