"""A checkpoint to write: shard by shard in a hidden folder, which takes its name only when it is complete."""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..whole_files import (
    check_replaceable,
    disk_errors,
    publish_folder,
    remove_leftovers,
    save_tensors,
    save_text,
    whole_file,
)
from .boundaries import MARKER, check_out, copy_file, plan_of, refuse_planted, write_marker
from .checkpoint import INDEX_FILE
from .progress import track_bytes

DEFAULT_SHARD_BYTES = 15 * 10**8


class Piece(NamedTuple):
    """A tensor of the new checkpoint: its name, shape and dtype, and a function that makes it when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Target:
    """The folder `out`, written from pieces and texts.

    Everything is written into the hidden folder `partial` beside it, which is renamed at the end. So a process that
    dies leaves all or nothing under the name `out`, and a second run of the same conversion resumes the first one.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        force: bool = False,
        replace_any_folder: bool = False,
    ):
        if shard_bytes < 1:
            raise ValueError(f"a shard must have room for at least one byte, got {shard_bytes}.")
        # links and .. are resolved, because the folder they lead to would be replaced
        self.out = Path(os.path.realpath(Path(out).expanduser()))
        self.shard_bytes, self.force, self.replace_any_folder = shard_bytes, force, replace_any_folder
        self.partial = self.out.with_name(f".{self.out.name}.partial")
        self.lock = self.out.with_name(f".{self.out.name}.lock")
        if self.out.parent.is_dir():
            remove_leftovers(self.out)
        check_replaceable(self.out)
        check_out(self.out, force=force, replace_any_folder=replace_any_folder)
        refuse_planted(self.partial, stat.S_ISDIR)
        refuse_planted(self.lock, stat.S_ISREG)

    def plan(self, pieces: list[Piece]) -> dict[str, list[Piece]]:
        """Assigns pieces to files of at most `shard_bytes`. A larger tensor has a file of its own."""
        by_name = {piece.name: piece for piece in pieces}
        assert len(by_name) == len(pieces), "two pieces have the same name"
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda piece: piece.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=self.shard_bytes,
        )
        return {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}

    def check_room(self, num_bytes: int) -> None:
        """Raises OSError if the disk has no room for files of this size. Those of an interrupted run count as room.

        They are either kept, or removed before anything is written.
        """
        parent = next(parent for parent in self.out.parents if parent.exists())
        finished = sum(file.stat().st_size for file in self.partial.glob("*") if file.is_file())
        free = shutil.disk_usage(parent).free + finished
        if num_bytes > free:
            raise OSError(
                f"{num_bytes:,} bytes are to be written to {parent}, which has {free:,} left; make room or choose "
                "another folder."
            )

    def write(
        self,
        shards: dict[str, list[Piece]],
        texts: dict[str, str],
        copies: list[Path],
        origin: str,
        check: Callable[[Path], None] = lambda folder: None,
    ) -> list[str]:
        """Writes shards as planned, texts by file name, and copies of files. Returns the names of all files.

        `origin` identifies what the pieces are made from. A partial folder of another origin is not resumed. `check`
        is called with the folder when it is complete but for its name, and raises if it must not get that name.

        Raises OSError if the disk is full or fails, and then keeps finished shards for the next run. Raises ValueError
        if another process writes to the folder. Errors of pieces pass through.
        """
        texts = texts | _index(shards)
        files = [*shards, *texts, *(path.name for path in copies)]
        with disk_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            locked = _exclusive_lock(self.lock)
        with locked:
            refuse_planted(self.partial, stat.S_ISDIR)
            try:
                plan = self._prepare_partial(shards, texts, origin)
                self._write_shards(shards)
                for path in copies:
                    with disk_errors(self.partial / path.name, path.stat().st_size):
                        copy_file(path, self.partial / path.name)
                for name, text in texts.items():
                    save_text(self.partial / name, text)
                check(self.partial)
                write_marker(self.partial, plan, files)
                self._remove_all_but([*files, MARKER])
            except (ValueError, AssertionError):
                # another run would fail in the same way; one that was interrupted or found the disk full can be resumed
                shutil.rmtree(self.partial, ignore_errors=True)
                raise
            except OSError:
                self._keep_finished(shards)
                raise
            else:
                # somebody may have made a folder of that name since this conversion began
                check_out(self.out, force=self.force, replace_any_folder=self.replace_any_folder)
                publish_folder(self.partial, self.out)
            finally:
                self.lock.unlink(missing_ok=True)
        return files

    def _write_shards(self, shards: dict[str, list[Piece]]) -> None:
        """Writes the shards that are not finished."""
        missing = {file: shard for file, shard in shards.items() if not _is_finished(self.partial / file, shard)}
        total, left = (sum(piece.nbytes for shard in of.values() for piece in shard) for of in (shards, missing))
        free = shutil.disk_usage(self.partial).free
        if left > free:
            raise OSError(f"{left:,} bytes are to be written to {self.out.parent}, which has {free:,} left.")
        with track_bytes(total, f"writing {self.out.name}", done=total - left) as progress:
            for file, shard in missing.items():
                _write_shard(self.partial / file, shard, progress)

    def _prepare_partial(self, shards: dict[str, list[Piece]], texts: dict[str, str], origin: str) -> str:
        """Creates the partial folder, or keeps that of an earlier run of the same conversion. Returns its plan."""
        described = {file: [[x.name, list(x.shape), str(x.dtype)] for x in shard] for file, shard in shards.items()}
        plan = json.dumps([origin, self.shard_bytes, described, texts.get("config.json")])
        plan = hashlib.sha256(plan.encode()).hexdigest()
        if self.partial.exists() and plan_of(self.partial) != plan:
            shutil.rmtree(self.partial)
        if self.partial.exists():
            # such as what a killed run was writing
            self._remove_all_but([*shards, MARKER])
        else:
            with disk_errors(self.partial):
                self.partial.mkdir()
            write_marker(self.partial, plan)
        return plan

    def _remove_all_but(self, files: list[str]) -> None:
        for path in [*self.partial.iterdir()]:
            status = path.lstat()
            # what is written to a file with another name, by whoever put it here, would be written there as well
            is_own = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(path)
            elif path.name not in files or not is_own:
                path.unlink()

    def _keep_finished(self, shards: dict[str, list[Piece]]) -> None:
        """Removes the partial folder after an error of the disk, unless a later run can use a shard in it."""
        if not any(_is_finished(self.partial / file, shard) for file, shard in shards.items()):
            shutil.rmtree(self.partial, ignore_errors=True)


def _index(shards: dict[str, list[Piece]]) -> dict[str, str]:
    """The index of the shards by its file name, if there are several and each tensor is in one of them."""
    pieces = [piece for shard in shards.values() for piece in shard]
    placed = {piece.name: file for file, shard in shards.items() for piece in shard}
    if len(shards) == 1 or len(placed) < len(pieces):
        return {}
    total = sum(piece.nbytes for piece in pieces)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    return {INDEX_FILE: json.dumps(index, indent=2) + "\n"}


def _write_shard(path: Path, pieces: list[Piece], progress: tqdm) -> None:
    tensors = {}
    for piece in pieces:
        tensor = piece.make().contiguous()
        if not tensor.isfinite().all():
            raise ValueError(f"{piece.name} became NaN or infinity; its source is beyond the range of {piece.dtype}.")
        assert (tensor.shape, tensor.dtype) == (piece.shape, piece.dtype), f"{piece.name} is not as planned"
        # a view would keep its whole storage in memory
        tensors[piece.name] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        progress.update(tensor.nbytes)
    # the bar stands still while the disk works
    progress.set_postfix_str(f"saving {path.name}")
    with whole_file(path) as place:
        save_tensors(place, tensors, {"format": "pt"})
    progress.set_postfix_str("")


def _is_finished(path: Path, pieces: list[Piece]) -> bool:
    """True if an earlier run wrote this shard. A shard is renamed when all of it is on the disk."""
    try:
        with safe_open(path, framework="pt") as stored:
            return set(stored.keys()) == {piece.name for piece in pieces}
    except (OSError, SafetensorError):
        return False


def _exclusive_lock(path: Path):
    """A lock for one writing process. The system releases it when the process ends."""
    # older releases of filelock empty a file that a link leads to
    refuse_planted(path, stat.S_ISREG)
    try:
        return FileLock(path).acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"another process writes to this folder ({path}); wait for it.") from error
