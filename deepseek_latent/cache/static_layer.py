"""The cache of one layer in a buffer of fixed size and address, which graphs that are replayed need.

Letters: b batch, s new tokens, t tokens held, c latent width, r rotary width.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

from .checks import check_capacity, check_same_length
from .layer import LatentCacheLayer
from .segments import Latents, Segment


class TokenCount:
    """Counts the tokens that the layers of a static cache hold, on the host and on the device.

    On the host, each layer has its count and slices its buffer to the tokens held. A step that is recorded, to be
    replayed at other lengths, can count only on the device, once for all layers, and reads whole buffers and that
    count. Either count may be out of date. It is brought up to date when it is needed; the host then waits for the
    device. A recorded step is counted when it ends, so one that fails in the middle is not.
    """

    def __init__(self):
        self.layers: list[StaticLatentCacheLayer] = []
        self.on_device: Tensor | None = None  # [] int64, with the step being computed
        self.before_step: Tensor | None = None  # [] int64, without the step being computed
        self.is_host_current, self.is_device_current = True, False
        self._is_recorded = False

    @property
    def is_recorded(self) -> bool:
        """True if the step being computed is recorded, to be replayed later."""
        if self._is_recorded or torch.compiler.is_compiling():
            return True
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    @contextmanager
    def recorded(self):
        """Inside, steps are treated as recorded, as compiled and captured steps always are."""
        self._is_recorded = True
        try:
            yield
        finally:
            self._is_recorded = False

    def to_device(self, device: torch.device) -> None:
        """Brings the count on the device up to date, and refuses layers that hold different numbers of tokens."""
        # a compiled step must not read the host's counts, which change with every step
        if self.is_host_current and not torch.compiler.is_compiling():
            check_same_length({layer.num_held for layer in self.layers})
        if self.on_device is None or _was_made_in_inference_mode(self.on_device):
            self.on_device, self.before_step = torch.zeros(2, dtype=torch.int64, device=device).unbind()
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.on_device)
                torch._dynamo.mark_static_address(self.before_step)
            self.is_device_current = False
        if not self.is_device_current:
            self.before_step.fill_(self.layers[0].num_held)
            self.is_device_current = True

    def to_host(self) -> None:
        """Brings the counts on the host up to date, which waits for the device if they are not."""
        if not self.is_host_current:
            num_tokens = int(self.before_step)
            check_capacity(self.layers[0].max_cache_len, num_tokens)
            self._set_host(num_tokens)

    def advance(self, num_tokens: int) -> None:
        """Makes room for the tokens of a recorded step before its first layer writes them."""
        torch.add(self.before_step, num_tokens, out=self.on_device)
        self.is_host_current = False

    def end_step(self) -> None:
        """Counts the tokens of a recorded step after its last layer."""
        self.before_step.copy_(self.on_device)

    def advance_on_host(self, num_tokens: int) -> None:
        """Counts on the host the tokens of a recorded step, which has counted them on the device."""
        self._set_host(self.layers[0].num_held + num_tokens)

    def undo(self) -> None:
        """Undoes the count of a recorded step that did not finish; the rows it wrote lie after the tokens held."""
        self.is_host_current, self.is_device_current = True, False

    def _set_host(self, num_tokens: int) -> None:
        self.is_host_current = True
        for layer in self.layers:
            layer.num_held = num_tokens


class StaticLatentCacheLayer(LatentCacheLayer):
    """A `LatentCacheLayer` of at most `max_cache_len` tokens, whose buffer [b max_cache_len width] never moves."""

    is_compileable = True
    may_widen = False

    def __init__(self, max_cache_len: int, count: TokenCount, cache_dtype: str | None = None, num_unquantized: int = 0):
        if type(max_cache_len) is not int or max_cache_len < 1:
            raise ValueError(f"max_cache_len must be a number of tokens, at least 1, got {max_cache_len!r}.")
        self.max_cache_len, self.count, self.num_held = max_cache_len, count, 0
        count.layers.append(self)
        super().__init__(cache_dtype, num_unquantized)

    @property
    def _num_buffered(self) -> int:
        self.count.to_host()
        return self.num_held

    @_num_buffered.setter
    def _num_buffered(self, num_tokens: int) -> None:
        if num_tokens < self.num_held:
            self._make_writable()
            # forgotten rows may be infinite or NaN, and a recorded step multiplies them by 0
            self._buffer[:, num_tokens : self.num_held].zero_()
        self.num_held, self.count.is_device_current = num_tokens, False

    def reset(self) -> None:
        """Forgets all tokens and keeps the buffer."""
        if getattr(self, "is_initialized", False):
            self._num_buffered = 0
        else:
            super().reset()

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_seq_length(self) -> int | Tensor:
        """The number of tokens held; in a recorded step it is a tensor [] on the device, without the step's tokens."""
        return self.count.before_step if self.count.is_recorded else self._num_buffered

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of tokens that attention reads, and the index of the first."""
        return (self.max_cache_len, 0) if self.count.is_recorded else super().get_mask_sizes(query_length)

    @property
    def latents(self) -> Latents:
        if not self.count.is_recorded:
            return super().latents
        # layers may be on several devices; the count is on that of the first layer
        return Latents(Segment(self._buffer, self._format), num_held=self.count.on_device.to(self._buffer.device))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # products read rows that are not written yet with a weight of 0, so these must be finite
        self._buffer = self._new_rows(key_states.shape[0], self.max_cache_len).zero_()
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self._buffer)

    def _append(self, rows: Tensor) -> None:
        if torch.is_grad_enabled() and rows.requires_grad:
            raise ValueError(
                "a static LatentCache carries no gradient: generate or evaluate under torch.no_grad(), or use a "
                "LatentCache without max_cache_len."
            )
        buffer, start = self._claim(rows[:, None])
        if isinstance(start, Tensor):
            buffer.index_copy_(1, start + torch.arange(rows.shape[1], device=rows.device), rows)
        else:
            buffer[:, start : start + rows.shape[1]] = rows

    def _make_writable(self) -> None:
        if _was_made_in_inference_mode(self._buffer):
            self._buffer = self._buffer.clone()

    def _claim(self, new: Tensor) -> tuple[Tensor, int | Tensor]:
        self._make_writable()
        if self.count.is_recorded:
            return self._buffer, self.count.before_step.to(self._buffer.device)
        start, end = self._num_buffered, self._num_buffered + new.shape[2]
        check_capacity(self.max_cache_len, end)
        self._num_buffered = end
        return self._buffer, start

    def _move(self, device: torch.device) -> None:
        # with the rows that are not written yet
        self._buffer = self._buffer.to(device)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, side by side, in a new buffer."""
        if self.is_initialized:
            self._buffer = self._buffer.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices` (integers, or one boolean per sequence), in that order."""
        if not self.is_initialized:
            return
        chosen = self._buffer[indices.to(self._buffer.device)]
        # beam search selects as many sequences at every step, so they are copied back into the same buffer
        self._buffer = self._buffer.copy_(chosen) if chosen.shape == self._buffer.shape else chosen


def _was_made_in_inference_mode(buffer: Tensor) -> bool:
    """True if a buffer was made in inference mode and cannot be written here, outside of it."""
    # dynamo cannot trace is_inference()
    if torch.compiler.is_compiling():
        return False
    return buffer.is_inference() and not torch.is_inference_mode_enabled()
