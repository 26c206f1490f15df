"""What one layer remembers in a buffer of fixed size and address, as graphs that are replayed need it.

Letters: b batch, s new tokens, t tokens held, c latent width, r rotary width.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

from .checks import check_capacity, check_same_length
from .layer import LatentCacheLayer
from .segments import Latents, Segment


class TokenCount:
    """How many tokens the layers of a static cache hold: on the host, and on the device.

    The host counts every layer, and slices its buffer to the tokens held. A step that is recorded to be replayed at
    other lengths can only count on the device, once for all layers; it reads whole buffers beside that number. Either
    number may be out of date, and is brought up to date when it is asked for; the host's by waiting for the device.
    """

    def __init__(self):
        self.layers: list[StaticLatentCacheLayer] = []
        self.on_device: Tensor | None = None  # [] int64
        self.before_step: Tensor | None = None  # [] int64, where a recorded step writes its first token
        self.host_is_right, self.device_is_right = True, False
        self._is_recorded = False

    @property
    def is_recorded(self) -> bool:
        """Whether the step being computed will be replayed."""
        if self._is_recorded or torch.compiler.is_compiling():
            return True
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    @contextmanager
    def recorded(self):
        """Steps inside count as those do that are compiled or captured."""
        self._is_recorded = True
        try:
            yield
        finally:
            self._is_recorded = False

    def to_device(self, device: torch.device) -> None:
        # a compiled step does not look at the host's numbers, which change with every step
        if self.host_is_right and not torch.compiler.is_compiling():
            check_same_length({layer.num_held for layer in self.layers})
        if self.on_device is None or _is_left_by_inference_mode(self.on_device):
            self.on_device, self.before_step = torch.zeros(2, dtype=torch.int64, device=device).unbind()
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.on_device)
                torch._dynamo.mark_static_address(self.before_step)
            self.device_is_right = False
        if not self.device_is_right:
            self.on_device.fill_(self.layers[0].num_held)
            self.device_is_right = True

    def to_host(self) -> None:
        if not self.host_is_right:
            num_tokens = int(self.on_device)
            check_capacity(self.layers[0].max_cache_len, num_tokens)
            self._set_host(num_tokens)

    def advance(self, num_tokens: int) -> None:
        """Counts the tokens of a recorded step, before its first layer writes."""
        self.before_step.copy_(self.on_device)
        self.on_device.add_(num_tokens)
        self.host_is_right = False

    def replayed(self, num_tokens: int) -> None:
        """Tells the host that a recorded step of so many tokens was computed, which has counted on the device."""
        self._set_host(self.layers[0].num_held + num_tokens)

    def take_back(self) -> None:
        """Forgets a recorded step that did not come to its end; what it wrote is beyond the tokens held."""
        self.host_is_right, self.device_is_right = True, False

    def _set_host(self, num_tokens: int) -> None:
        self.host_is_right = True
        for layer in self.layers:
            layer.num_held = num_tokens


class StaticLatentCacheLayer(LatentCacheLayer):
    """A `LatentCacheLayer` for at most `max_cache_len` tokens, whose rows [b max_cache_len width] never move."""

    is_compileable = True
    may_widen = False

    def __init__(self, max_cache_len: int, count: TokenCount, cache_dtype: str | None = None):
        if type(max_cache_len) is not int or max_cache_len < 1:
            raise ValueError(f"max_cache_len must be a number of tokens, at least 1, got {max_cache_len!r}.")
        self.max_cache_len, self.count, self.num_held = max_cache_len, count, 0
        count.layers.append(self)
        super().__init__(cache_dtype)

    @property
    def _num_buffered(self) -> int:
        self.count.to_host()
        return self.num_held

    @_num_buffered.setter
    def _num_buffered(self, num_tokens: int) -> None:
        if num_tokens < self.num_held:
            self._make_writable()
            # what is forgotten may not have been finite, and a recorded step multiplies it by 0
            self._buffer[:, num_tokens : self.num_held].zero_()
        self.num_held, self.count.device_is_right = num_tokens, False

    def reset(self) -> None:
        """Forgets all tokens; the buffer stays."""
        if getattr(self, "is_initialized", False):
            self._num_buffered = 0
        else:
            super().reset()

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_seq_length(self) -> int | Tensor:
        """Tokens held; a tensor [] on the device in a step that is recorded."""
        return self.count.on_device if self.count.is_recorded else self._num_buffered

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens attention reads, and from which on."""
        return (self.max_cache_len, 0) if self.count.is_recorded else super().get_mask_sizes(query_length)

    @property
    def latents(self) -> Latents:
        if not self.count.is_recorded:
            return super().latents
        # layers may lie on several devices, and the count on that of the first
        return Latents(Segment(self._buffer, self._format), num_held=self.count.on_device.to(self._buffer.device))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # what is not written yet is read by products that give it no weight, so it must be finite
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
        if _is_left_by_inference_mode(self._buffer):
            self._buffer = self._buffer.clone()

    def _claim(self, new: Tensor) -> tuple[Tensor, int | Tensor]:
        self._make_writable()
        if self.count.is_recorded:
            return self._buffer, self.count.before_step.to(self._buffer.device)
        start, end = self._num_buffered, self._num_buffered + new.shape[2]
        check_capacity(self.max_cache_len, end)
        self._num_buffered = end
        return self._buffer, start

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, side by side, in a buffer of its own."""
        if self.is_initialized:
            self._buffer = self._buffer.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices` (integers, or one boolean per sequence), in that order."""
        if not self.is_initialized:
            return
        chosen = self._buffer[indices.to(self._buffer.device)]
        # beams change places all the time, in the buffer that they have
        self._buffer = self._buffer.copy_(chosen) if chosen.shape == self._buffer.shape else chosen


def _is_left_by_inference_mode(buffer: Tensor) -> bool:
    """Whether a buffer was made in inference mode and cannot be written here, outside of it."""
    # dynamo cannot ask
    if torch.compiler.is_compiling():
        return False
    return buffer.is_inference() and not torch.is_inference_mode_enabled()
