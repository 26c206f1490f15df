"""A folder of prompts that were computed once: the prefix that a new prompt shares with one of them is loaded."""

import os
from array import array
from itertools import takewhile
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ..compat.torch import version_of
from .checks import check_ids
from .files import file_nbytes, write_tensors
from .fingerprint import fingerprint, settings_of
from .format import check_cache_dtype, refuse_unknown_options
from .latent_cache import LatentCache
from .prompt_folder import TOKENS_PER_BLOCK, Prompt, PromptFolder
from .storage import contents_of_file


class PromptCache:
    """A folder of LatentCache files, one per prompt, that several processes may use at the same time.

    Its files never take more than `max_bytes`, not even while one is written: the least recently used prompts are
    removed first. A file serves every prompt that shares its first block of 64 tokens or more, up to the first token
    that differs. Only caches that the same weights, settings and adapters computed are loaded. A damaged file is
    removed with a warning, and files with other names in the folder are never touched. To load, no permission to write
    is needed.

    Args:
        folder: created if it does not exist.
        max_bytes: all processes that share a folder should give the same; whoever stores keeps to their own.
        cache_dtype: as in LatentCache; prompts stored with another one are ignored.
    """

    def __init__(self, folder: str | os.PathLike, *, max_bytes: int, cache_dtype: str | None = None, **unknown):
        refuse_unknown_options(PromptCache, unknown)
        check_cache_dtype(cache_dtype)
        if not isinstance(max_bytes, (int, float)):
            raise TypeError(f"expected max_bytes as a number, got {max_bytes!r}.")
        if not max_bytes > 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}.")
        self.folder, self.max_bytes, self.cache_dtype = Path(folder), max_bytes, cache_dtype
        self._stored = PromptFolder(folder)
        self._fingerprints: WeakKeyDictionary[PreTrainedModel, tuple[list, str]] = WeakKeyDictionary()

    def load(self, input_ids: Tensor, model: PreTrainedModel) -> LatentCache:
        """Loads the longest stored prefix of `input_ids` [1 s], at most s - 1 tokens; the cache is empty if none fits.

        `model.generate(input_ids, cache=cache)` then computes the rest of the prompt.
        """
        key = self._key(model)
        # the last token is left to compute, since its logits are needed
        wanted = Prompt(key, _one_sequence(input_ids)[:-1])
        for num_tokens, path in self._matches(wanted):
            try:
                cache = LatentCache.load(path, model=model)
            except (FileNotFoundError, PermissionError):
                # another process has removed it since it was listed, or it is the file of another user
                continue
            except ValueError as error:
                self._fingerprints.pop(model, None)
                if self._key(model) != key:
                    # the weights changed in a way that torch's version counter misses, so search for others
                    return self.load(input_ids, model)
                self._stored.discard(path, error)
                continue
            self._stored.touch(path)
            cache.crop(num_tokens - cache.get_seq_length())
            return cache
        return LatentCache(model.config, cache_dtype=self.cache_dtype)

    def store(self, cache: LatentCache, tokens: Tensor, model: PreTrainedModel) -> None:
        """Stores `cache`, which holds the first of these ids [t] or [1 t], unless it is shorter than a block.

        It replaces stored prompts that are a prefix of it. If a stored prompt has it as a prefix, that one counts as
        used, and nothing is written. Room is made before the file is written; a process that is killed in between
        loses the removed prompts, which have to be computed again.

        Raises:
            ValueError: for several sequences, another cache_dtype, too few ids, or more bytes than `max_bytes`.
            OSError: if this process may not write to the folder, or the disk is full.
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
        new = Prompt(self._key(model), ids[:length])
        path = self.folder / new.file_name
        with self._stored.locked():
            stored = {path: prompt for path, (prompt, _) in self._stored.prompts().items()}
            covering = [path for path, prompt in stored.items() if prompt.starts_with(new)]
            if covering:
                self._stored.touch(covering[0])
                return
            contents = contents_of_file(cache.layers, tokens=tokens, model=model)
            nbytes = file_nbytes(*contents)
            self._refuse_if_too_large(nbytes)
            replaced = {path for path, prompt in stored.items() if new.starts_with(prompt)}
            self._stored.make_room(nbytes, self.max_bytes, replaced)
            write_tensors(path, *contents)
            self._stored.touch(path)
            for prefix in replaced:
                prefix.unlink(missing_ok=True)

    def __repr__(self) -> str:
        return (
            f"PromptCache({str(self.folder)!r}, cache_dtype={self.cache_dtype!r}: {len(self)} prompts, "
            f"{self.nbytes:,} of {self.max_bytes:,} bytes)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all stored prompts, those of other models and cache_dtypes included."""
        return sum(status.st_size for _, status in self._stored.files())

    def __len__(self) -> int:
        return len(list(self._stored.files()))

    def clear(self) -> None:
        """Removes every stored prompt; raises OSError if this process may not write to the folder."""
        with self._stored.locked():
            for path, _ in self._stored.files():
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

    def _matches(self, wanted: Prompt) -> list[tuple[int, Path]]:
        """The number of tokens that each file shares with `wanted`, if it is a block or more; the largest first."""
        ends = {block: TOKENS_PER_BLOCK * (i + 1) for i, block in enumerate(wanted.block_hashes())}
        found = []
        for path, (prompt, hashes) in self._stored.prompts().items():
            num_tokens = next((ends[block] for block in reversed(hashes) if block in ends), 0)
            if num_tokens:
                rest = zip(wanted.tokens[num_tokens:], prompt.tokens[num_tokens:])
                num_tokens += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], rest))
                found.append((num_tokens, path))
        return sorted(found, reverse=True)

    def _refuse_if_too_large(self, nbytes: int) -> None:
        if nbytes > self.max_bytes:
            raise ValueError(
                f"expected a prompt of at most max_bytes={self.max_bytes:,} bytes, got one of {nbytes:,}; raise "
                "max_bytes, quantize the cache by cache_dtype, or store fewer tokens."
            )


def _one_sequence(ids: Tensor) -> array:
    check_ids(ids)
    if ids.shape[:-1].numel() != 1:
        raise ValueError(f"expected the ids of one sequence, [t] or [1 t], got shape {list(ids.shape)}; take one.")
    return array("q", ids.flatten().tolist())
