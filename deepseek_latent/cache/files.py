"""Sealed files of tensors: a file is read as it was written, or refused because something in it has changed."""

import json
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..whole_files import save_tensors, whole_file
from .checksum import hash_json, hash_tensors

FORMAT_VERSION = 2
HEADER_KEY = "deepseek_latent"  # the name of our entry in the file's header


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a whole safetensors file, or nothing; `metadata` may hold what JSON can.

    Contiguous tensors on the CPU are written without a copy. Only the user who wrote the file may read it. An existing
    file is replaced and not changed, so tensors that are mapped from it stay as they are.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: if the file cannot be written.
    """
    entries = _header_entries(metadata, hash_tensors(tensors))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path, private=True) as unfinished:
        save_tensors(unfinished, tensors, entries)


def file_nbytes(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> int:
    """The size of the file that `write_tensors` would make of these; no element is read."""
    # a file of empty tensors has a header of the same length but for shapes and offsets; all hashes are equally long
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    header = json.loads(save(empty, _header_entries(metadata, hash_tensors({})))[8:])
    end = 0
    for name, entry in header.items():
        if name in tensors:
            start, end = end, end + tensors[name].nbytes
            entry |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def read_tensors(path: str | os.PathLike, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the metadata that `write_tensors` was given, and refuses a file that differs from them.

    The tensors are views of a private mapping of the file: pages are read when used, and copied when written to. So
    nothing may change the file in place while they are used.

    `verify=False` trusts the contents of the tensors, and reads none of them before they are used.

    Raises:
        FileNotFoundError: if there is no such file.
        PermissionError: if this user may not read it.
        ValueError: if it is cut off, altered, of another format or not written by `write_tensors`.
    """
    with _opened(path) as file:
        record = _record(path, file.metadata())
        names = file.keys()
        try:
            tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            # there are dtypes that torch does not have
            raise _unreadable(path, error) from error
    if verify and hash_tensors(tensors) != record["contents"]:
        raise _altered(path, "its tensors differ")
    return tensors, record["metadata"]


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the metadata alone, checked against its seal; raises as `read_tensors` does."""
    with _opened(path) as file:
        return _record(path, file.metadata())["metadata"]


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[safe_open]:
    """Opens a file, and ensures that header and tensors come from the same one: safetensors opens the path twice."""
    while True:
        before = _identity(path)
        try:
            opened = safe_open(path, framework="pt")
        except (SafetensorError, RuntimeError) as error:
            if _identity(path) == before:
                raise _unreadable(path, error) from error
            continue
        with opened as file:
            # another process may have replaced the file in between
            if _identity(path) == before:
                yield file
                return


def _identity(path: str | os.PathLike) -> tuple[int, int, int]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a file of cached tensors at {path}, there is none.")
    # opened, because of a file that this user may not read safetensors says that there is none
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
    return status.st_ino, status.st_mtime_ns, status.st_size


def _header_entries(metadata: dict[str, Any], contents: str) -> dict[str, str]:
    # metadata goes through JSON and back, so that the seal covers what a reader will see
    record = {"format": FORMAT_VERSION, "metadata": json.loads(json.dumps(metadata)), "contents": contents}
    record["seal"] = hash_json(record)
    return {HEADER_KEY: json.dumps(record)}


def _record(path: str | os.PathLike, entries: dict[str, str] | None) -> dict[str, Any]:
    if not entries or HEADER_KEY not in entries:
        raise ValueError(
            f"{path} was written by another program: expected {HEADER_KEY!r} in its header, got no such entry."
        )
    try:
        record = json.loads(entries[HEADER_KEY])
        is_older, is_newer = record["format"] < FORMAT_VERSION, record["format"] > FORMAT_VERSION
        is_whole = is_older or is_newer or record.pop("seal") == hash_json(record)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _altered(path, "its header differs") from error
    if is_older or is_newer:
        remedy = "update deepseek-latent" if is_newer else "write it again"
        found = reprlib.repr(record["format"])
        raise ValueError(f"expected format {FORMAT_VERSION}, got {found} in {path}; {remedy}.")
    if not is_whole or not {"metadata", "contents"} <= record.keys():
        raise _altered(path, "its header differs")
    return record


def _unreadable(path: str | os.PathLike, error: Exception) -> ValueError:
    # the error may repeat what stands in the file
    reason = shorten(str(error), 200, placeholder=" ...")
    return ValueError(f"{path} is cut off, altered or not a safetensors file ({reason}); write it again.")


def _altered(path: str | os.PathLike, what_differs: str) -> ValueError:
    return ValueError(f"{path} was altered: {what_differs} from what was written; remove it.")
