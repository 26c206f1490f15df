"""The cache of one layer: c + r elements per token, however many heads there are.

Letters: b batch, s new tokens, t all tokens held, p tokens of the shared prefix, c latent width, r rotary width.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .checks import check_continues
from .format import LatentFormat, latent_format
from .segments import Latents, Segment


class LatentCacheLayer(DynamicLayer):
    """What one MLA layer remembers: per token one row, made of one latent and one shared rotary key.

    latent    [b 1 t c]   KV latent after its RMSNorm, also as `keys`
    k_rotary  [b 1 t r]   already rotated to its absolute position, also as `values`

    `cache_dtype` and `num_unquantized` select the format of a row (format.py). A prefix that all sequences share may be
    stored once, in rows [1 p width] that are never written. The tokens after it are in one buffer [b capacity width]
    that grows geometrically and is written in place, so a new token copies no other. The axis of size 1 is where
    DynamicLayer has its heads, so generic code finds the layout it expects.

    Source: paper 2.1.3, (d_c + d_h^R) l elements.
    """

    # True if later tokens may have a wider dtype
    may_widen = True

    def __init__(self, cache_dtype: str | None = None, num_unquantized: int = 0):
        # not super().__init__, which would assign `keys` and `values`: they are properties here
        self.cache_dtype, self.num_unquantized = cache_dtype, num_unquantized
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens and frees their memory."""
        self.is_initialized = False
        self._format: LatentFormat | None = None
        self._prefix: Tensor | None = None
        self._buffer: Tensor | None = None
        self._num_buffered = 0
        self._autograd_may_hold_buffer = False

    @property
    def latents(self) -> Latents:
        """All tokens held, as they are stored."""
        buffered = Segment(self._buffer[:, : self._num_buffered], self._format)
        if not self._num_prefix:
            return Latents(buffered)
        prefix = Segment(self._prefix, self._format)
        return Latents(prefix, buffered) if self._num_buffered else Latents(prefix)

    @property
    def keys(self) -> Tensor | None:
        return self.latents.dense(self.batch_size)[0][:, None] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        return self.latents.dense(self.batch_size)[1][:, None] if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held; a shared prefix counts once."""
        return sum(segment.rows.nbytes for segment in self.latents.segments) if self.is_initialized else 0

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the prefix and the buffer, with the buffer's unused capacity."""
        if not self.is_initialized:
            return 0
        return self._buffer.nbytes + (self._prefix.nbytes if self._num_prefix else 0)

    @property
    def batch_size(self) -> int:
        return self._buffer.shape[0]

    @property
    def format(self) -> LatentFormat:
        return self._format

    @property
    def _num_prefix(self) -> int:
        return 0 if self._prefix is None else self._prefix.shape[1]

    def rows(self) -> Tensor:
        """All rows in one tensor [b t width], which is a view if they are in one segment."""
        parts = [segment.rows.expand(self.batch_size, -1, -1) for segment in self.latents.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._format = self._format_for(key_states, value_states)
        self._buffer = self._new_rows(key_states.shape[0], 0)
        self.is_initialized = True

    def _new_rows(self, batch: int, tokens: int) -> Tensor:
        shape = (batch, tokens, self._format.row_width)
        return torch.empty(shape, dtype=self._format.storage_dtype, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args, as_stored: bool = False, **kwargs):
        """Appends latents [b 1 s c] and rotary keys [b 1 s r]; returns all of them, [b 1 t c] and [b 1 t r].

        With `as_stored`, returns (`latents`, None), which attention reads without decoding or concatenating first.
        """
        # `_format_for` may refuse the tokens, so it comes before anything changes
        wanted = self._format_for(key_states, value_states)
        rows = wanted.encode(key_states[:, 0], value_states[:, 0])
        self._make_ready(wanted, key_states, value_states)
        self._append(rows)
        return (self.latents, None) if as_stored else (self.keys, self.values)

    def claim(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, int | Tensor]:
        """Reserves room for tokens like these, [b 1 s c] and [b 1 s r], which the caller has to write next.

        Returns the buffer [b capacity width] and the index of the first reserved row. The rows count as held at once.
        """
        self._make_ready(self._format_for(key_states, value_states), key_states, value_states)
        return self._claim(key_states)

    def _make_ready(self, wanted: LatentFormat, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif wanted.dtype != self.dtype:
            self._change_dtype(wanted.dtype)

    def _claim(self, new: Tensor) -> tuple[Tensor, int]:
        start, end = self._num_buffered, self._num_buffered + new.shape[2]
        if end > self._buffer.shape[1] or self._must_copy_to_append(new):
            self._grow(end)
        self._num_buffered = end
        return self._buffer, start

    def _append(self, rows: Tensor) -> None:
        start, end = self._num_buffered, self._num_buffered + rows.shape[1]
        if self._must_copy_to_append(rows):
            self._buffer = torch.cat((self._buffer[:, :start], rows), dim=1)
        else:
            if end > self._buffer.shape[1]:
                self._grow(end)
            self._buffer[:, start:end] = rows
        self._num_buffered = end
        self._autograd_may_hold_buffer = torch.is_grad_enabled()

    def _format_for(self, key_states: Tensor, value_states: Tensor) -> LatentFormat:
        heads = (key_states.shape[1], value_states.shape[1])
        if heads != (1, 1):
            raise ValueError(
                "expected one latent and one rotary key per token, [b 1 s width] each, got keys and values of "
                f"{heads[0]} and {heads[1]} heads; use a cache of transformers for them."
            )
        widths, dtype = (key_states.shape[-1], value_states.shape[-1]), key_states.dtype
        if not self.is_initialized:
            return latent_format(self.cache_dtype, *widths, dtype, self.num_unquantized)
        held = (self.batch_size, self._format.latent_width, self._format.rotary_width, self.dtype, self.device)
        new = (key_states.shape[0], *widths, dtype, key_states.device)
        check_continues(held, new, may_widen=self.may_widen)
        return self._format if dtype == self.dtype else replace(self._format, dtype=dtype)

    def _change_dtype(self, dtype: torch.dtype) -> None:
        self.dtype, self._format = dtype, replace(self._format, dtype=dtype)
        self._buffer = self._buffer.to(self._format.storage_dtype)
        self._prefix = None if self._prefix is None else self._prefix.to(self._format.storage_dtype)

    def _must_copy_to_append(self, new: Tensor) -> bool:
        """True if the buffer must not be written in place.

        Autograd may have saved it, or it is an inference tensor and we are outside inference mode.
        """
        if torch.is_grad_enabled() or self._autograd_may_hold_buffer:
            return True
        # dynamo cannot trace is_inference(), and one traced graph never mixes both modes
        return not torch.compiler.is_compiling() and self._buffer.is_inference() and not new.is_inference()

    def _grow(self, num_tokens: int) -> None:
        # an eighth more than needed: each token is copied a bounded number of times, and little capacity is unused
        rows = self._new_rows(self.batch_size, num_tokens + max(num_tokens // 8, 64))
        rows[:, : self._num_buffered] = self._buffer[:, : self._num_buffered]
        self._buffer = rows

    def get_seq_length(self) -> int:
        return self._num_prefix + self._num_buffered

    @property
    def has_graph(self) -> bool:
        """Whether the rows held belong to a graph of autograd."""
        return self._buffer.requires_grad

    def take_back(self, num_tokens: int, dtype: torch.dtype | None, has_graph: bool) -> None:
        """Returns to what was held before a step that failed; `dtype` is None if nothing was held yet."""
        if not self.is_initialized:
            return
        if dtype is None:
            self._num_buffered = 0
            LatentCacheLayer.reset(self)
            return
        if self.get_seq_length() > num_tokens:
            self._num_buffered = num_tokens - self._num_prefix
        if self.dtype != dtype:
            # exact, since the tokens held were only widened
            self._change_dtype(dtype)
        if self.has_graph and not has_graph:
            self._buffer = self._buffer.detach()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens; 0 forgets none. The buffer keeps its capacity."""
        # transformers 5.17 passes a tensor
        tokens_to_remove, length = int(tokens_to_remove), self.get_seq_length()
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to forget, got {tokens_to_remove}; to keep the first "
                f"{tokens_to_remove} of {length} tokens, crop({min(tokens_to_remove - length, 0)})."
            )
        if -tokens_to_remove > length:
            raise ValueError(f"cannot forget {-tokens_to_remove} tokens, the cache holds {length}.")
        kept = length + tokens_to_remove
        if kept < self._num_prefix:
            self._prefix = self._prefix[:, :kept]
        self._num_buffered = kept - self._num_prefix

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, side by side; a single one becomes the prefix that all share."""
        if not self.is_initialized:
            return
        if self.batch_size == 1:
            self._prefix, self._buffer, self._num_buffered = self.rows(), self._new_rows(repeats, 0), 0
        else:
            self._buffer = self._buffer[:, : self._num_buffered].repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices` (integers, or one boolean per sequence), in that order."""
        if self.is_initialized:
            self._buffer = self._buffer[:, : self._num_buffered][indices.to(self._buffer.device)]

    def offload(self) -> None:
        """Moves the tokens held to the CPU."""
        if self.is_initialized:
            self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Brings offloaded tokens back to the device they came from."""
        if self.is_initialized and self._buffer.device != self.device:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self._buffer = self._buffer[:, : self._num_buffered].to(device, non_blocking=True)
        self._prefix = None if self._prefix is None else self._prefix.to(device, non_blocking=True)

    def tensors(self) -> dict[str, Tensor]:
        """Rows by name, as files hold them: "prefix" [1 p width] if p > 0, and "rows" [b t-p width] if b > 1."""
        if self.batch_size == 1:
            return {"prefix": self.rows()}
        buffered = {"rows": self._buffer[:, : self._num_buffered]}
        return buffered | {"prefix": self._prefix} if self._num_prefix else buffered

    def restore(self, rows_format: LatentFormat, prefix: Tensor | None, rows: Tensor | None) -> None:
        """Takes these rows as the tokens held, and never writes to `prefix`."""
        self._format, self._prefix, self.is_initialized = rows_format, prefix, True
        self.dtype, self.device = rows_format.dtype, (rows if prefix is None else prefix).device
        self._buffer = self._new_rows(1, 0) if rows is None else rows
        self._num_buffered = self._buffer.shape[1]
