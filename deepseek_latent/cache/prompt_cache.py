"""A folder of prompts that were computed once: the prefix that a new prompt shares with one of them is loaded."""

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
from .files import FORMAT_VERSION, read_metadata
from .fingerprint import fingerprint, settings_of
from .format import check_cache_dtype, refuse_unknown_options
from .latent_cache import LatentCache

TOKENS_PER_BLOCK = 64
_STORED_NAME = re.compile(rf"[0-9a-f]{{64}}\.v{FORMAT_VERSION}\.safetensors")


class _Prompt(NamedTuple):
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

    def starts_with(self, other: "_Prompt") -> bool:
        return self.key == other.key and self.tokens[: len(other.tokens)] == other.tokens


class PromptCache:
    """A folder of LatentCache files, one per prompt, that several processes may use at the same time.

    It holds at most `max_bytes`; the least recently used prompts are removed first. A file serves every prompt that
    shares its first block of 64 tokens or more, up to the first token that differs. Only caches that the same weights,
    settings and adapters computed are loaded. A damaged file is removed with a warning, and files with other names in
    the folder are never touched.

    Args:
        folder: created if it does not exist.
        cache_dtype: as in LatentCache; prompts stored with another one are ignored.
    """

    def __init__(self, folder: str | os.PathLike, *, max_bytes: int, cache_dtype: str | None = None, **unknown):
        refuse_unknown_options("PromptCache", unknown)
        check_cache_dtype(cache_dtype)
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}.")
        self.folder, self.max_bytes, self.cache_dtype = Path(folder), max_bytes, cache_dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock")
        self._prompts: dict[tuple[str, int], tuple[_Prompt, list[bytes]]] = {}
        self._fingerprints: WeakKeyDictionary[PreTrainedModel, tuple[list, str]] = WeakKeyDictionary()

    def load(self, input_ids: Tensor, model: PreTrainedModel) -> LatentCache:
        """Loads the longest stored prefix of `input_ids` [1 s], at most s - 1 tokens; the cache is empty if none fits.

        `model.generate(input_ids, cache=cache)` then computes the rest of the prompt.
        """
        key = self._key(model)
        # the last token is left to compute, since its logits are needed
        wanted = _Prompt(key, _one_sequence(input_ids)[:-1])
        for num_tokens, path in self._matches(wanted):
            try:
                cache = LatentCache.load(path, model=model)
            except FileNotFoundError:  # another process has removed it since it was listed
                continue
            except ValueError as error:
                self._fingerprints.pop(model, None)
                if self._key(model) != key:
                    # the weights changed in a way that torch's version counter misses, so search for others
                    return self.load(input_ids, model)
                _discard(path, error)
                continue
            _touch(path)
            cache.crop(num_tokens - cache.get_seq_length())
            return cache
        return LatentCache(model.config, cache_dtype=self.cache_dtype)

    def store(self, cache: LatentCache, tokens: Tensor, model: PreTrainedModel) -> None:
        """Stores `cache`, which holds the first of these ids [t] or [1 t], unless it is shorter than a block.

        It replaces stored prompts that are a prefix of it. If a stored prompt has it as a prefix, that one counts as
        used, and nothing is written.

        Raises:
            ValueError: for several sequences, another cache_dtype, too few ids, or more bytes than `max_bytes`.
        """
        if not isinstance(cache, LatentCache):
            raise TypeError(
                f"expected a LatentCache, got {type(cache).__name__}; generate with the one that `load` returns."
            )
        ids, length = _one_sequence(tokens), cache.get_seq_length()
        if cache.cache_dtype != self.cache_dtype:
            raise ValueError(
                f"this folder was opened with cache_dtype={self.cache_dtype!r} and the cache has "
                f"cache_dtype={cache.cache_dtype!r}; open it with PromptCache(folder, max_bytes=..., "
                f"cache_dtype={cache.cache_dtype!r}), or use the cache that `load` returns."
            )
        if length < TOKENS_PER_BLOCK:
            return
        batch = cache.layers[0].batch_size
        if batch != 1 or len(ids) < length:
            raise ValueError(
                f"expected a cache of one sequence and the ids of its {length} tokens, got one of {batch} and "
                f"{len(ids)} ids; store each sequence by itself, with the ids that its cache was computed from."
            )
        self._refuse_if_too_large(cache.nbytes)
        new = _Prompt(self._key(model), ids[:length])
        path = self.folder / new.file_name
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
            for prefix, prompt in stored.items():
                if new.starts_with(prompt):
                    prefix.unlink(missing_ok=True)
            self._evict(kept=path)

    def __repr__(self) -> str:
        return (
            f"PromptCache({str(self.folder)!r}, cache_dtype={self.cache_dtype!r}: {len(self)} prompts, "
            f"{self.nbytes:,} of {self.max_bytes:,} bytes)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all stored prompts, those of other models and cache_dtypes included."""
        return sum(status.st_size for _, status in self._files())

    def __len__(self) -> int:
        return len(list(self._files()))

    def clear(self) -> None:
        """Removes every stored prompt."""
        with self._lock:
            for path, _ in self._files():
                path.unlink(missing_ok=True)

    def _key(self, model: PreTrainedModel) -> str:
        """The key of prompts that `model` computes; the weights are read again only if they may have changed."""
        state = [repr(settings_of(model))]
        for name, weight in model.state_dict().items():
            if hasattr(weight, "full_tensor"):
                raise ValueError(
                    f"expected all weights in one process, {name} is sharded over several, which may not see the same "
                    "files; use LatentCache.save and load."
                )
            state.append((weight.data_ptr(), version_of(weight)))
        known_state, known = self._fingerprints.get(model, ([], ""))
        if state != known_state:
            known = fingerprint(model)
            self._fingerprints[model] = state, known
        return f"{known} {self.cache_dtype}"

    def _matches(self, wanted: _Prompt) -> list[tuple[int, Path]]:
        """The number of tokens that each file shares with `wanted`, if it is a block or more; the largest first."""
        ends = {block: TOKENS_PER_BLOCK * (i + 1) for i, block in enumerate(wanted.block_hashes())}
        found = []
        for (name, _), (prompt, hashes) in self._read_folder().items():
            num_tokens = next((ends[block] for block in reversed(hashes) if block in ends), 0)
            if num_tokens:
                rest = zip(wanted.tokens[num_tokens:], prompt.tokens[num_tokens:])
                num_tokens += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], rest))
                found.append((num_tokens, self.folder / name))
        return sorted(found, reverse=True)

    def _read_folder(self) -> dict[tuple[str, int], tuple[_Prompt, list[bytes]]]:
        """The prompts of all files and their block hashes; a file with a known name and inode is not read again."""
        prompts = {}
        for path, status in self._files():
            file = path.name, status.st_ino
            try:
                prompts[file] = self._prompts[file] if file in self._prompts else _read_prompt(path)
            except FileNotFoundError:  # another process has removed it since it was listed
                continue
            except ValueError as error:
                _discard(path, error)
        self._prompts = prompts
        return prompts

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for file in os.scandir(self.folder):
            if _STORED_NAME.fullmatch(file.name):
                with suppress(FileNotFoundError):  # another process has removed it since it was listed
                    yield Path(file.path), file.stat()

    def _refuse_if_too_large(self, nbytes: int) -> None:
        if nbytes > self.max_bytes:
            raise ValueError(
                f"expected a prompt of at most max_bytes={self.max_bytes:,} bytes, got one of {nbytes:,}; raise "
                "max_bytes, quantize the cache by cache_dtype, or store fewer tokens."
            )

    def _evict(self, kept: Path) -> None:
        """Removes the least recently used prompts, but never `kept`, until the folder is small enough."""
        total = self.nbytes
        for path, status in sorted(self._files(), key=lambda file: file[1].st_mtime_ns):
            if total > self.max_bytes and path != kept:
                path.unlink(missing_ok=True)
                total -= status.st_size

    def _remove_leftovers(self) -> None:
        # a writer holds the lock, so these are from writers that were killed
        for path in self.folder.glob(f".*.v{FORMAT_VERSION}.safetensors.*"):
            shutil.rmtree(path)


def _one_sequence(ids: Tensor) -> array:
    check_ids(ids)
    if ids.shape[:-1].numel() != 1:
        raise ValueError(f"expected the ids of one sequence, [t] or [1 t], got shape {list(ids.shape)}; take one.")
    return array("q", ids.flatten().tolist())


def _read_prompt(path: Path) -> tuple[_Prompt, list[bytes]]:
    stored = read_metadata(path)
    prompt = _Prompt(f"{stored['fingerprint']} {stored['cache_dtype']}", array("q", stored["tokens"][0]))
    return prompt, prompt.block_hashes()


def _touch(path: Path) -> None:
    # by our own clock: a file system's clock ticks in milliseconds, which would lose the order
    now = time.time_ns()
    with suppress(FileNotFoundError):
        os.utime(path, ns=(now, now))


def _discard(path: Path, error: ValueError) -> None:
    path.unlink(missing_ok=True)
    warnings.warn(f"a stored prompt was removed: {error}", stacklevel=3)
