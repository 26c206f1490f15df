"""Prompts that were read once, kept in a folder: what a new prompt has in common with one is loaded, not computed."""

import hashlib
import os
import re
import shutil
import time
import warnings
from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from filelock import FileLock
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ..compat.torch import version_of
from .checks import check_ids
from .files import FORMAT, read_metadata
from .fingerprint import fingerprint, settings_of
from .format import check_cache_dtype, refuse_bits
from .latent_cache import LatentCache

BLOCK = 64  # tokens
_ENTRY = re.compile(rf"[0-9a-f]{{64}}\.v{FORMAT}\.safetensors")


class _Prompt(NamedTuple):
    """What a file holds: tokens of one sequence, for the model and the bits that `key` says."""

    key: str
    tokens: array

    @property
    def name(self) -> str:
        return f"{hashlib.sha256(self.key.encode() + self.tokens.tobytes()).hexdigest()}.v{FORMAT}.safetensors"

    def chain(self) -> list[bytes]:
        """One hash per whole block, each over the one before: equal at i where everything up to block i is equal."""
        data, width = self.tokens.tobytes(), BLOCK * self.tokens.itemsize
        hashes, last = [], self.key.encode()
        for end in range(width, len(data) + 1, width):
            last = hashlib.blake2b(last + data[end - width : end], digest_size=16).digest()
            hashes.append(last)
        return hashes

    def starts_with(self, other: "_Prompt") -> bool:
        return self.key == other.key and self.tokens[: len(other.tokens)] == other.tokens


class PromptCache:
    """A folder of LatentCache files, each of one prompt, that several processes may use at once.

    It holds at most `max_bytes`; what was used longest ago goes first. A file serves every prompt that begins as it
    does, up to the first token that differs, if they share a whole block of 64 tokens. Only what the same weights,
    settings and adapters computed is loaded, and nothing that was damaged: such a file is removed with a warning.
    Files of other names in the folder are left alone.

    Args:
        folder: made if it is not there.
        bits: as in LatentCache; prompts stored in other bits are left alone.
    """

    def __init__(self, folder: str | os.PathLike, *, max_bytes: int, cache_dtype: str | None = None, **unknown):
        refuse_bits("PromptCache", unknown)
        check_cache_dtype(cache_dtype)
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}.")
        self.folder, self.max_bytes, self.cache_dtype = Path(folder), max_bytes, cache_dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock")
        self._prompts: dict[tuple[str, int], tuple[_Prompt, list[bytes]]] = {}
        self._fingerprints: WeakKeyDictionary[PreTrainedModel, tuple[list, str]] = WeakKeyDictionary()

    def load(self, input_ids: Tensor, model: PreTrainedModel) -> LatentCache:
        """A cache of the longest stored beginning of `input_ids` [1 s], at most s - 1 tokens; empty if there is none.

        Feed it with `model.generate(input_ids, cache=cache)`, which reads the rest of the prompt.
        """
        key = self._key(model)
        # the last token is left to feed, since its logits are what is wanted
        wanted = _Prompt(key, _one_sequence(input_ids)[:-1])
        for num_tokens, path in self._matches(wanted):
            try:
                cache = LatentCache.load(path, model=model)
            except FileNotFoundError:  # removed by another process since it was listed
                continue
            except ValueError as error:
                self._fingerprints.pop(model, None)
                if self._key(model) != key:
                    # the weights were changed where torch does not count it, so other files are meant
                    return self.load(input_ids, model)
                _discard(path, error)
                continue
            _touch(path)
            cache.crop(num_tokens - cache.get_seq_length())
            return cache
        return LatentCache(model.config, cache_dtype=self.cache_dtype)

    def store(self, cache: LatentCache, tokens: Tensor, model: PreTrainedModel) -> None:
        """Keeps what `cache` holds, the first of these ids [t] or [1 t], unless that is less than a block.

        Replaces what was stored of their beginnings; where more than these is stored, that counts as used instead.

        Raises:
            ValueError: for several sequences, other bits than this folder's, too few ids, or more than `max_bytes`.
        """
        if not isinstance(cache, LatentCache):
            raise TypeError(
                f"expected a LatentCache, got {type(cache).__name__}; generate with the one `load` returns."
            )
        ids, length = _one_sequence(tokens), cache.get_seq_length()
        if cache.cache_dtype != self.cache_dtype:
            raise ValueError(
                f"this folder was opened with cache_dtype={self.cache_dtype!r} and the cache has "
                f"cache_dtype={cache.cache_dtype!r}; open it with PromptCache(folder, max_bytes=..., "
                f"cache_dtype={cache.cache_dtype!r}), or use the cache that `load` returns."
            )
        if length < BLOCK:
            return
        batch = cache.layers[0].batch_size
        if batch != 1 or len(ids) < length:
            raise ValueError(
                f"expected a cache of one sequence and the ids of its {length} tokens, got one of {batch} and "
                f"{len(ids)} ids; store each sequence by itself, with the ids its cache was filled from."
            )
        self._refuse_if_too_large(cache.nbytes)
        new = _Prompt(self._key(model), ids[:length])
        path = self.folder / new.name
        with self._lock:
            self._remove_leftovers()
            stored = {self.folder / name: prompt for (name, _), (prompt, _) in self._read_folder().items()}
            covering = [path for path, prompt in stored.items() if prompt.starts_with(new)]
            if covering:
                _touch(covering[0])
                return
            cache.save(path, tokens=tokens, model=model)
            _touch(path)
            size = path.stat().st_size
            if size > self.max_bytes:
                path.unlink()
            self._refuse_if_too_large(size)
            for beginning, prompt in stored.items():
                if new.starts_with(prompt):
                    beginning.unlink(missing_ok=True)
            self._evict(kept=path)

    def __repr__(self) -> str:
        return (
            f"PromptCache({str(self.folder)!r}, cache_dtype={self.cache_dtype!r}: {len(self)} prompts, "
            f"{self.nbytes:,} of {self.max_bytes:,} bytes)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all stored prompts, also of other models and bits."""
        return sum(status.st_size for _, status in self._files())

    def __len__(self) -> int:
        return len(list(self._files()))

    def clear(self) -> None:
        """Removes every stored prompt."""
        with self._lock:
            for path, _ in self._files():
                path.unlink(missing_ok=True)

    def _key(self, model: PreTrainedModel) -> str:
        """What a file must have been stored for; the weights are read again only where they may have changed."""
        state = [repr(settings_of(model))]
        for name, weight in model.state_dict().items():
            if hasattr(weight, "full_tensor"):
                raise ValueError(
                    f"expected all weights in one process, {name} is spread over several, which need not see the same "
                    "files; use LatentCache.save and load."
                )
            state.append((weight.data_ptr(), version_of(weight)))
        known_state, known = self._fingerprints.get(model, ([], ""))
        if state != known_state:
            known = fingerprint(model)
            self._fingerprints[model] = state, known
        return f"{known} {self.cache_dtype}"

    def _matches(self, wanted: _Prompt) -> list[tuple[int, Path]]:
        """How many tokens each file has in common with `wanted`, where it is a block or more; the most first."""
        ends = {block: BLOCK * (i + 1) for i, block in enumerate(wanted.chain())}
        found = []
        for (name, _), (prompt, chain) in self._read_folder().items():
            num_tokens = next((ends[block] for block in reversed(chain) if block in ends), 0)
            if num_tokens:
                rest = zip(wanted.tokens[num_tokens:], prompt.tokens[num_tokens:])
                num_tokens += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], rest))
                found.append((num_tokens, self.folder / name))
        return sorted(found, reverse=True)

    def _read_folder(self) -> dict[tuple[str, int], tuple[_Prompt, list[bytes]]]:
        """The prompts of all files and their hashes; of files seen before, by name and inode, nothing is read again."""
        prompts = {}
        for path, status in self._files():
            seen = path.name, status.st_ino
            try:
                prompts[seen] = self._prompts[seen] if seen in self._prompts else _read_prompt(path)
            except FileNotFoundError:  # removed by another process since it was listed
                continue
            except ValueError as error:
                _discard(path, error)
        self._prompts = prompts
        return prompts

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for file in os.scandir(self.folder):
            if _ENTRY.fullmatch(file.name):
                with suppress(FileNotFoundError):  # removed by another process since it was listed
                    yield Path(file.path), file.stat()

    def _refuse_if_too_large(self, nbytes: int) -> None:
        if nbytes > self.max_bytes:
            raise ValueError(
                f"expected a prompt of at most max_bytes={self.max_bytes:,} bytes, got one of {nbytes:,}; raise "
                "max_bytes, quantize the cache by cache_dtype, or store fewer tokens."
            )

    def _evict(self, kept: Path) -> None:
        """Removes what was used longest ago until the folder is small enough, but not `kept`."""
        total = self.nbytes
        for path, status in sorted(self._files(), key=lambda file: file[1].st_mtime_ns):
            if total > self.max_bytes and path != kept:
                path.unlink(missing_ok=True)
                total -= status.st_size

    def _remove_leftovers(self) -> None:
        # whoever writes here holds the lock, so these are of writers that were killed
        for path in self.folder.glob(f".*.v{FORMAT}.safetensors.*"):
            shutil.rmtree(path)


def _one_sequence(ids: Tensor) -> array:
    check_ids(ids)
    if ids.shape[:-1].numel() != 1:
        raise ValueError(f"expected the ids of one sequence, [t] or [1 t], got shape {list(ids.shape)}; take one.")
    return array("q", ids.flatten().tolist())


def _read_prompt(path: Path) -> tuple[_Prompt, list[bytes]]:
    stored = read_metadata(path)
    prompt = _Prompt(f"{stored['fingerprint']} {stored['cache_dtype']}", array("q", stored["tokens"][0]))
    return prompt, prompt.chain()


def _touch(path: Path) -> None:
    # by our own clock: that of file systems ticks in milliseconds, and the order must hold
    now = time.time_ns()
    with suppress(FileNotFoundError):
        os.utime(path, ns=(now, now))


def _discard(path: Path, error: ValueError) -> None:
    path.unlink(missing_ok=True)
    warnings.warn(f"a stored prompt was removed: {error}", stacklevel=3)
