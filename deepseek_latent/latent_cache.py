"""The cache of compressed latents: c + r elements per token and layer, whatever the number of heads."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig


class LatentCacheLayer(DynamicLayer):
    """What one MLA layer remembers: per token, one latent and one shared rotary key.

    latent    [b 1 t c]   KV latent after its RMSNorm, also as `keys`
    k_rotary  [b 1 t r]   already rotated to its absolute position, also as `values`

    Both are views of one buffer [b 1 capacity c+r] that grows geometrically and is written in place, so a new token
    copies nothing. The axis of size 1 stands where DynamicLayer expects heads, so generic code finds its layout.
    Source: paper 2.1.3, (d_c + d_h^R) l elements.
    """

    def __init__(self):
        # not super().__init__: it would assign `keys` and `values`, which are views here
        self.is_initialized = False
        self._clear()

    def _clear(self):
        self._buffer: Tensor | None = None
        self._length = 0
        self._latent_width = 0
        self._autograd_may_hold_it = False

    @property
    def keys(self) -> Tensor | None:
        return self._buffer[:, :, : self._length, : self._latent_width] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        return self._buffer[:, :, : self._length, self._latent_width :] if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held: b t (c + r) itemsize."""
        return self._used().nbytes if self.is_initialized else 0

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the buffer, room to grow included."""
        return self._buffer.nbytes if self.is_initialized else 0

    def _used(self) -> Tensor:
        return self._buffer[:, :, : self._length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._latent_width = key_states.shape[-1]
        width = key_states.shape[-1] + value_states.shape[-1]
        self._buffer = key_states.new_empty(key_states.shape[0], 1, 0, width)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends latents [b 1 s c] and rotary keys [b 1 s r]; returns all of them, [b 1 t c] and [b 1 t r]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        start, end = self._length, self._length + key_states.shape[-2]
        if self._in_place_is_wrong(key_states):
            new = torch.cat((key_states, value_states), dim=-1)
            self._buffer = torch.cat((self._used(), new), dim=-2)
            self.dtype = self._buffer.dtype
        else:
            if end > self._buffer.shape[-2]:
                self._grow(end)
            self._buffer[:, :, start:end, : self._latent_width] = key_states
            self._buffer[:, :, start:end, self._latent_width :] = value_states
        self._length = end
        self._autograd_may_hold_it = torch.is_grad_enabled()
        return self.keys, self.values

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        b, _, _, width = self._buffer.shape
        came = (key_states.shape[0], key_states.shape[-1], value_states.shape[-1])
        expected = (b, self._latent_width, width - self._latent_width)
        if came != expected:
            raise ValueError(
                "this cache holds (batch, latent width, rotary width) = "
                f"{expected}, the new tokens have {came}; use a fresh cache for another batch or another model."
            )
        if key_states.device != self.device:
            raise ValueError(f"this cache is on {self.device}, the new tokens are on {key_states.device}; move one.")
        if torch.promote_types(key_states.dtype, self._buffer.dtype) != key_states.dtype:
            raise ValueError(
                f"this cache holds {self._buffer.dtype}, the new tokens are {key_states.dtype}; "
                "use a fresh cache, or a model of the cache's dtype."
            )

    def _in_place_is_wrong(self, new: Tensor) -> bool:
        """What autograd may have saved must not change under it, nor may what inference mode made outside of it."""
        if torch.is_grad_enabled() or self._autograd_may_hold_it or new.dtype != self._buffer.dtype:
            return True
        # dynamo cannot ask, and traces neither mode into the other
        return not torch.compiler.is_compiling() and self._buffer.is_inference() and not new.is_inference()

    def _grow(self, length: int) -> None:
        # an eighth more than needed: every token is copied a bounded number of times, and little lies idle
        capacity = length + max(length // 8, 64)
        buffer = self._buffer.new_empty(*self._buffer.shape[:2], capacity, self._buffer.shape[-1])
        buffer[:, :, : self._length] = self._used()
        self._buffer = buffer

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens; 0 forgets none. The memory stays for the tokens to come."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to forget, got {tokens_to_remove}; to keep the first "
                f"{tokens_to_remove} of {self._length} tokens, crop({min(tokens_to_remove - self._length, 0)})."
            )
        if -tokens_to_remove > self._length:
            raise ValueError(f"cannot forget {-tokens_to_remove} tokens, the cache holds {self._length}.")
        self._length += tokens_to_remove

    def reset(self) -> None:
        """Forgets everything, the memory included."""
        self.is_initialized = False
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, side by side."""
        if self.is_initialized:
            self._buffer = self._used().repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices` (integers, or one boolean per sequence), in that order."""
        if self.is_initialized:
            self._buffer = self._used()[indices.to(self._buffer.device)]

    def offload(self) -> None:
        """Moves the tokens held to the CPU."""
        if self.is_initialized:
            self._buffer = self._used().to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Brings offloaded tokens back to the device they came from."""
        if self.is_initialized and self._buffer.device != self.device:
            self._buffer = self._buffer.to(self.device, non_blocking=True)


class LatentCache(DynamicCache):
    """All layers' latents: the cache that DeepSeek-V2 uses by default in `generate()` and `forward(use_cache=True)`.

    Per token it holds exactly (c + r) layers elements: 34,560 for DeepSeek-V2, 15,552 for V2-Lite (paper, Table 1).

    Args:
        config: a `DeepseekV2Config`; or, as `torch.nn.DataParallel` passes it when it gathers the replicas' outputs,
            an iterable with (latents, rotary keys, ...) per layer.
        offloading: keep the layers on the CPU and fetch each one just before it is read (CUDA only).
    """

    def __init__(
        self,
        config: PreTrainedConfig | Iterable[tuple[Tensor, ...]],
        offloading: bool = False,
    ):
        if isinstance(config, PreTrainedConfig):
            num_layers = config.get_text_config(decoder=True).num_hidden_layers
            layers, gathered = [LatentCacheLayer() for _ in range(num_layers)], []
        else:
            gathered = list(config)
            layers = [LatentCacheLayer() for _ in gathered]
        Cache.__init__(self, layers=layers, offloading=offloading)
        for layer, (keys, values, *_) in zip(layers, gathered):
            if keys is not None:
                layer.update(keys, values)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held: b t (c + r) layers itemsize."""
        return sum(layer.nbytes for layer in self.layers)

    def __repr__(self) -> str:
        first = self.layers[0] if self.layers else None
        if first is None or not first.is_initialized:
            return f"LatentCache(layers={len(self.layers)}, empty)"
        batch, _, tokens, latent_width = first.keys.shape
        allocated = sum(layer.allocated_nbytes for layer in self.layers)
        return (
            f"LatentCache(layers={len(self.layers)}, batch={batch}, tokens={tokens}, latent={latent_width}, "
            f"rotary={first.values.shape[-1]}, dtype={str(first.dtype).removeprefix('torch.')}, "
            f"{self.nbytes:,} bytes held, {allocated:,} allocated)"
        )
