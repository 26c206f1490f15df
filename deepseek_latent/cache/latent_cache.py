"""The cache of compressed latents that a model fills: all layers, and what transformers asks of a cache.

Letters: b batch, t tokens held, c latent width, r rotary width.
"""

from collections.abc import Iterable
from os import PathLike

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .files import write_tensors
from .format import check_cache_dtype, refuse_unknown_options
from .layer import LatentCacheLayer
from .quantization_error import warn_of_large_error
from .records import layer_to_records, rows_from_records
from .segments import Latents
from .static_layer import StaticLatentCacheLayer, TokenCount
from .storage import contents_of_file, read_layers


def check_offloading() -> None:
    if not torch.cuda.is_available():
        raise ValueError("an offloaded cache moves layers between a CUDA device and the CPU; there is no CUDA device.")


class LatentCache(DynamicCache):
    """The latents of all layers: the default cache of DeepSeek-V2 in `generate()` and `forward(use_cache=True)`.

    Per token and layer it holds exactly c + r elements: in all, 34,560 for DeepSeek-V2 and 15,552 for V2-Lite (paper,
    Table 1).

    Args:
        config: a `DeepseekV2Config`; or an iterable with (latents, rotary keys, ...) per layer, which is what
            `torch.nn.DataParallel` passes when it gathers the replicas' outputs.
        offloading: keep the layers on the CPU and fetch each one just before it is read (CUDA only).
        cache_dtype: quantize latents to "int8", "int6", "int5", "int4" or "fp8", and store rotary keys in bfloat16;
            None stores both in the dtype that the model computes in. New tokens are quantized before they are first
            read, so a prompt read in chunks gives the same output. A model that was converted to a smaller cache also
            has channels of the latent that are stored in bfloat16, `config.num_unquantized_channels` of them.
        max_cache_len: make it a static cache for at most this many tokens, in buffers whose addresses never change, as
            compiled and captured steps need it; None lets it grow.
    """

    def __init__(
        self,
        config: PreTrainedConfig | Iterable[tuple[Tensor, ...]],
        offloading: bool = False,
        cache_dtype: str | None = None,
        max_cache_len: int | None = None,
        **unknown,
    ):
        refuse_unknown_options(LatentCache, unknown)
        check_cache_dtype(cache_dtype)
        if offloading:
            check_offloading()
            if max_cache_len is not None:
                raise ValueError(
                    "an offloaded cache moves and a static one must not; drop offloading or max_cache_len."
                )
        gathered, self._model_name = [], ""
        if isinstance(config, PreTrainedConfig):
            text_config = config.get_text_config(decoder=True)
            if text_config.model_type != "deepseek_v2":
                raise ValueError(
                    f"expected the config of a DeepSeek-V2, whose tokens have latents, got model_type "
                    f"{text_config.model_type!r}; use a cache of transformers for that model."
                )
            num_layers, self._model_name = text_config.num_hidden_layers, text_config.name_or_path
            # other config classes of the same models do not know this field
            num_unquantized = getattr(text_config, "num_unquantized_channels", 0)
        elif isinstance(config, Iterable) and not isinstance(config, (dict, str, torch.nn.Module)):
            gathered = list(config)
            num_layers, num_unquantized = len(gathered), 0
        else:
            raise TypeError(f"expected a model's config to make a LatentCache from, got {type(config).__name__}.")
        # only a static cache has a count
        self.count = None if max_cache_len is None else TokenCount()
        if self.count is None:
            layers = [LatentCacheLayer(cache_dtype, num_unquantized) for _ in range(num_layers)]
        else:
            layers = [
                StaticLatentCacheLayer(max_cache_len, self.count, cache_dtype, num_unquantized)
                for _ in range(num_layers)
            ]
        Cache.__init__(self, layers=layers, offloading=offloading)
        self.stored_tokens: Tensor | None = None
        self._has_warned = False
        for layer, (keys, values, *_) in zip(self.layers, gathered):
            if keys is not None:
                layer.update(keys, values)

    def append(self, latent: Tensor, k_rotary: Tensor, layer_idx: int) -> Latents:
        """Adds new tokens as `update` does, and returns all tokens as they are stored."""
        is_first = self.cache_dtype is not None and not self.layers[layer_idx].is_initialized
        # transformers passes `as_stored` on to `LatentCacheLayer.update`
        latents, _ = super().update(latent, k_rotary, layer_idx, as_stored=True)
        if is_first and len(latent) and not (self._has_warned or self.is_recorded or torch.jit.is_tracing()):
            self._has_warned = warn_of_large_error(latent[0, 0], latents.segments[0], self._model_name)
        return latents

    @property
    def is_static(self) -> bool:
        return self.count is not None

    @property
    def is_recorded(self) -> bool:
        """True if the step being computed will be replayed, over whole buffers; see `TokenCount`."""
        return self.is_static and self.count.is_recorded

    @property
    def max_cache_len(self) -> int | None:
        return self.layers[0].max_cache_len if self.is_static else None

    def update_count(self, device: torch.device) -> None:
        """Brings up to date the count that the next step on `device` uses; see `TokenCount`."""
        if self.is_static:
            if self.is_recorded:
                self.count.to_device(device)
            else:
                self.count.to_host()

    def advance(self, num_tokens: int) -> None:
        """Makes room for the tokens of a recorded step before its first layer writes them."""
        if self.is_recorded:
            self.count.advance(num_tokens)

    def end_step(self) -> None:
        """Counts the tokens of a recorded step after its last layer."""
        if self.is_recorded:
            self.count.end_step()

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_static:
            self.count.to_host()
        super().crop(tokens_to_remove)
        if self.stored_tokens is not None:
            self.stored_tokens = self.stored_tokens[:, : self.get_seq_length()]

    def reset(self) -> None:
        if self.is_static:
            self.count.to_host()
        super().reset()
        self.stored_tokens = None

    @property
    def cache_dtype(self) -> str | None:
        return self.layers[0].cache_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held: b t layers times (c + r) itemsize, or the bytes of a row in `cache_dtype`."""
        return sum(layer.nbytes for layer in self.layers)

    def __repr__(self) -> str:
        first = self.layers[0] if self.layers else None
        if first is None or not first.is_initialized:
            return f"LatentCache(layers={len(self.layers)}, empty)"
        allocated = sum(layer.allocated_nbytes for layer in self.layers)
        stored_as = str(first.dtype).removeprefix("torch.") if self.cache_dtype is None else self.cache_dtype
        return (
            f"LatentCache(layers={len(self.layers)}, batch={first.batch_size}, tokens={first.get_seq_length()}, "
            f"latent={first.format.latent_width}, rotary={first.format.rotary_width}, {stored_as}, "
            f"{self.nbytes:,} bytes held, {allocated:,} allocated)"
        )

    def save(self, path: str | PathLike, *, tokens: Tensor, model: PreTrainedModel) -> None:
        """Writes one safetensors file with rows, token ids and the model's fingerprint, or nothing if it fails.

        `tokens` [b t] or [t] are the ids that the cache was computed from. Further ids may follow them, as in what
        `generate` returns. A file at `path` is replaced and not changed, so caches that were loaded from it stay
        valid. If the process is killed, its unfinished file is removed when `path` is saved again.
        """
        self._check_not_empty("save")
        write_tensors(path, *contents_of_file(self.layers, tokens=tokens, model=model))

    @classmethod
    def load(cls, path: str | PathLike, *, model: PreTrainedModel) -> "LatentCache":
        """Reads what `save` wrote; `stored_tokens` then holds its ids [b t].

        If the model is on the CPU, rows are memory-mapped and read when they are used. Until the cache is gone, the
        file must then not be changed in place: if it is cut off, the process ends with SIGBUS, and changed bytes are
        read unnoticed. To remove the file, or to replace it as `save` does, is safe. `copy.deepcopy(cache)` holds its
        rows in memory and needs no file.

        Raises:
            ValueError: if the file is cut off or altered, or belongs to another model.
            OSError: if there is no such file, or it may not be read.
        """
        stored = read_layers(path, model)
        cache = cls(model.config, cache_dtype=stored.format.cache_dtype)
        cache.stored_tokens = stored.tokens
        for layer, (prefix, rows) in zip(cache.layers, stored.rows):
            layer.restore(stored.format, prefix, rows)
        return cache

    def flashmla_records(self) -> list[Tensor]:
        """Copies the tokens of each layer into records [b t 656] of bytes, as FlashMLA, vLLM and SGLang keep them.

        With `cache_dtype="fp8"` these are the rows as they are stored; any other cache is rounded to fp8.
        """
        self._check_not_empty("make records of")
        return [layer_to_records(layer) for layer in self.layers]

    @classmethod
    def from_flashmla_records(
        cls, records: Iterable[Tensor], config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16
    ) -> "LatentCache":
        """Makes a cache with `cache_dtype="fp8"` from records [b t 656] of bytes per layer, for a model of `dtype`.

        The records are copied. Raises ValueError if layers differ in shape, or a code or scale is not finite.
        """
        cache = cls(config, cache_dtype="fp8")
        record_format, rows_of_layers = rows_from_records(records, config, dtype)
        for layer, rows in zip(cache.layers, rows_of_layers):
            layer.restore(record_format, None, rows)
        return cache

    def _check_not_empty(self, purpose: str) -> None:
        if not self.get_seq_length():
            raise ValueError(f"this cache is empty, there is nothing to {purpose}; run the model with it first.")
