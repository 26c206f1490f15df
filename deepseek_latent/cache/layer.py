"""What one layer remembers of the past: c + r elements per token, whatever the number of heads.

Letters: b batch, s new tokens, t all tokens held, c latent width, r rotary width.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .checks import check_continues
from .format import LatentFormat, Latents, Stretch, latent_format


class LatentCacheLayer(DynamicLayer):
    """What one MLA layer remembers: per token one row, made of one latent and one shared rotary key.

    latent    [b 1 t c]   KV latent after its RMSNorm, also as `keys`
    k_rotary  [b 1 t r]   already rotated to its absolute position, also as `values`

    How a row looks, `bits` says (latent_format.py). Tokens that all sequences have in common may stand first, once, in
    rows [1 p width] that are never written; the others lie in one buffer [b capacity width] that grows geometrically
    and is written in place, so a new token copies nothing. The axis of size 1 stands where DynamicLayer expects heads,
    so generic code finds its layout. Source: paper 2.1.3, (d_c + d_h^R) l elements.
    """

    # whether tokens of a wider dtype may follow
    may_widen = True

    def __init__(self, bits: int | str | None = None):
        # not super().__init__: it would assign `keys` and `values`, which are computed here
        self.bits = bits
        self.reset()

    def reset(self) -> None:
        """Forgets everything, the memory included."""
        self.is_initialized = False
        self._format: LatentFormat | None = None
        self._shared: Tensor | None = None
        self._own: Tensor | None = None
        self._num_own = 0
        self._autograd_may_hold_it = False

    @property
    def latents(self) -> Latents:
        """Everything held, as it is stored."""
        own = Stretch(self._own[:, : self._num_own], self._format)
        if not self._num_shared:
            return Latents(own)
        shared = Stretch(self._shared, self._format)
        return Latents(shared, own) if self._num_own else Latents(shared)

    @property
    def keys(self) -> Tensor | None:
        return self.latents.dense(self.batch_size)[0][:, None] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        return self.latents.dense(self.batch_size)[1][:, None] if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held, those in common counted once."""
        return sum(stretch.rows.nbytes for stretch in self.latents.stretches) if self.is_initialized else 0

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the buffers, room to grow included."""
        return self._own.nbytes + (self._shared.nbytes if self._num_shared else 0) if self.is_initialized else 0

    @property
    def batch_size(self) -> int:
        return self._own.shape[0]

    @property
    def format(self) -> LatentFormat:
        return self._format

    @property
    def _num_shared(self) -> int:
        return 0 if self._shared is None else self._shared.shape[1]

    def rows(self) -> Tensor:
        """The rows [b t width] in one piece; a view where they lie so."""
        parts = [stretch.rows.expand(self.batch_size, -1, -1) for stretch in self.latents.stretches]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._format = latent_format(self.bits, key_states.shape[-1], value_states.shape[-1], self.dtype)
        self._own = self._new_rows(key_states.shape[0], 0)
        self.is_initialized = True

    def _new_rows(self, batch: int, tokens: int) -> Tensor:
        shape = (batch, tokens, self._format.row_width)
        return torch.empty(shape, dtype=self._format.storage_dtype, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args, as_stored: bool = False, **kwargs):
        """Appends latents [b 1 s c] and rotary keys [b 1 s r]; returns all of them, [b 1 t c] and [b 1 t r].

        With `as_stored`, returns (`latents`, None): what attention reads without making the pair.
        """
        # refused before anything changes
        wanted = self._format_for(key_states, value_states)
        rows = wanted.encode(key_states[:, 0], value_states[:, 0])
        self._make_ready(wanted, key_states, value_states)
        self._append(rows)
        return (self.latents, None) if as_stored else (self.keys, self.values)

    def claim(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, int | Tensor]:
        """Room for tokens like these, [b 1 s c] and [b 1 s r], which the caller writes there at once.

        Returns the buffer [b capacity width] and the place of the first of them; they are held from now on.
        """
        self._make_ready(self._format_for(key_states, value_states), key_states, value_states)
        return self._claim(key_states)

    def _make_ready(self, wanted: LatentFormat, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif wanted.dtype != self.dtype:
            self._widen(wanted.dtype)

    def _claim(self, new: Tensor) -> tuple[Tensor, int]:
        start, end = self._num_own, self._num_own + new.shape[2]
        if end > self._own.shape[1] or self._in_place_is_wrong(new):
            self._grow(end)
        self._num_own = end
        return self._own, start

    def _append(self, rows: Tensor) -> None:
        start, end = self._num_own, self._num_own + rows.shape[1]
        if self._in_place_is_wrong(rows):
            self._own = torch.cat((self._own[:, :start], rows), dim=1)
        else:
            if end > self._own.shape[1]:
                self._grow(end)
            self._own[:, start:end] = rows
        self._num_own = end
        self._autograd_may_hold_it = torch.is_grad_enabled()

    def _format_for(self, key_states: Tensor, value_states: Tensor) -> LatentFormat:
        widths, dtype = (key_states.shape[-1], value_states.shape[-1]), key_states.dtype
        if not self.is_initialized:
            return latent_format(self.bits, *widths, dtype)
        held = (self.batch_size, self._format.latent_width, self._format.rotary_width, self.dtype, self.device)
        new = (key_states.shape[0], *widths, dtype, key_states.device)
        check_continues(held, new, may_widen=self.may_widen)
        return self._format if dtype == self.dtype else replace(self._format, dtype=dtype)

    def _widen(self, dtype: torch.dtype) -> None:
        self.dtype, self._format = dtype, replace(self._format, dtype=dtype)
        self._own = self._own.to(self._format.storage_dtype)
        self._shared = None if self._shared is None else self._shared.to(self._format.storage_dtype)

    def _in_place_is_wrong(self, new: Tensor) -> bool:
        """What autograd may have saved must not change under it, nor may what inference mode made outside of it."""
        if torch.is_grad_enabled() or self._autograd_may_hold_it:
            return True
        # dynamo cannot ask, and traces neither mode into the other
        return not torch.compiler.is_compiling() and self._own.is_inference() and not new.is_inference()

    def _grow(self, num_tokens: int) -> None:
        # an eighth more than needed: every token is copied a bounded number of times, and little lies idle
        rows = self._new_rows(self.batch_size, num_tokens + max(num_tokens // 8, 64))
        rows[:, : self._num_own] = self._own[:, : self._num_own]
        self._own = rows

    def get_seq_length(self) -> int:
        return self._num_shared + self._num_own

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens; 0 forgets none. The memory stays for the tokens to come."""
        # transformers 5.17 counts in a tensor
        tokens_to_remove, length = int(tokens_to_remove), self.get_seq_length()
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to forget, got {tokens_to_remove}; to keep the first "
                f"{tokens_to_remove} of {length} tokens, crop({min(tokens_to_remove - length, 0)})."
            )
        if -tokens_to_remove > length:
            raise ValueError(f"cannot forget {-tokens_to_remove} tokens, the cache holds {length}.")
        kept = length + tokens_to_remove
        if kept < self._num_shared:
            self._shared = self._shared[:, :kept]
        self._num_own = kept - self._num_shared

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, side by side; a single one is from then on stored once for all."""
        if not self.is_initialized:
            return
        if self.batch_size == 1:
            self._shared, self._own, self._num_own = self.rows(), self._new_rows(repeats, 0), 0
        else:
            self._own = self._own[:, : self._num_own].repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices` (integers, or one boolean per sequence), in that order."""
        if self.is_initialized:
            self._own = self._own[:, : self._num_own][indices.to(self._own.device)]

    def offload(self) -> None:
        """Moves the tokens held to the CPU."""
        if self.is_initialized:
            self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Brings offloaded tokens back to the device they came from."""
        if self.is_initialized and self._own.device != self.device:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self._own = self._own[:, : self._num_own].to(device, non_blocking=True)
        self._shared = None if self._shared is None else self._shared.to(device, non_blocking=True)

    def tensors(self) -> dict[str, Tensor]:
        """Rows by name, as files hold them: `shared` [1 p width] where there are such, `own` [b t-p width]."""
        if self.batch_size == 1:
            return {"shared": self.rows()}
        own = {"own": self._own[:, : self._num_own]}
        return own | {"shared": self._shared} if self._num_shared else own

    def restore(self, rows_format: LatentFormat, shared: Tensor | None, own: Tensor | None) -> None:
        """Holds these rows from now on, and does not write to `shared`."""
        self._format, self._shared, self.is_initialized = rows_format, shared, True
        self.dtype, self.device = rows_format.dtype, (own if shared is None else shared).device
        self._own = self._new_rows(1, 0) if own is None else own
        self._num_own = self._own.shape[1]
