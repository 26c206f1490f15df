"""The cache of compressed latents: all layers, how they go to files and records and come back.

Letters: b batch, t tokens held, c latent width, r rotary width.
"""

from collections.abc import Iterable
from os import PathLike

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .checks import check_ids
from .files import fingerprint, read_tensors, write_tensors
from .format import Float8Format, check_bits, latent_format
from .layer import LatentCacheLayer
from .segments import Latents
from .static_layer import StaticLatentCacheLayer, TokenCount


def check_offloading() -> None:
    if not torch.cuda.is_available():
        raise ValueError("an offloaded cache moves layers between a CUDA device and the CPU; there is no CUDA device.")


class LatentCache(DynamicCache):
    """All layers' latents: the cache that DeepSeek-V2 uses by default in `generate()` and `forward(use_cache=True)`.

    Per token it holds exactly (c + r) layers elements: 34,560 for DeepSeek-V2, 15,552 for V2-Lite (paper, Table 1).

    Args:
        config: a `DeepseekV2Config`; or, as `torch.nn.DataParallel` passes it when it gathers the replicas' outputs,
            an iterable with (latents, rotary keys, ...) per layer.
        offloading: keep the layers on the CPU and fetch each one just before it is read (CUDA only).
        bits: 8, 6, 5 or 4 bits per latent element, or "fp8", with rotary keys in bfloat16; None keeps what the model
            computes. New tokens too are read as they were stored, so chunks of a prompt do not change what is said.
        max_cache_len: makes it a static cache, for at most so many tokens in buffers that stay where they are, as
            compiled and captured steps need it; None lets it grow.
    """

    def __init__(
        self,
        config: PreTrainedConfig | Iterable[tuple[Tensor, ...]],
        offloading: bool = False,
        bits: int | str | None = None,
        max_cache_len: int | None = None,
    ):
        check_bits(bits)
        if offloading:
            check_offloading()
            if max_cache_len is not None:
                raise ValueError("an offloaded cache moves, and a static one stays where it is; leave out one of both.")
        gathered = []
        if isinstance(config, PreTrainedConfig):
            num_layers = config.get_text_config(decoder=True).num_hidden_layers
        elif isinstance(config, Iterable) and not isinstance(config, (dict, str, torch.nn.Module)):
            gathered = list(config)
            num_layers = len(gathered)
        else:
            raise TypeError(f"LatentCache is made from a model's config, got {type(config).__name__}.")
        # of a static cache alone
        self.count = None if max_cache_len is None else TokenCount()
        if self.count is None:
            layers = [LatentCacheLayer(bits) for _ in range(num_layers)]
        else:
            layers = [StaticLatentCacheLayer(max_cache_len, self.count, bits) for _ in range(num_layers)]
        Cache.__init__(self, layers=layers, offloading=offloading)
        self.stored_tokens: Tensor | None = None
        for layer, (keys, values, *_) in zip(self.layers, gathered):
            if keys is not None:
                layer.update(keys, values)

    def append(self, latent: Tensor, k_rotary: Tensor, layer_idx: int) -> Latents:
        """`update` for a reader who takes all tokens as they are stored."""
        latents, _ = super().update(latent, k_rotary, layer_idx, as_stored=True)
        return latents

    @property
    def is_static(self) -> bool:
        return self.count is not None

    @property
    def is_recorded(self) -> bool:
        """Whether the step being computed will be replayed, over whole buffers; see `TokenCount`."""
        return self.is_static and self.count.is_recorded

    @property
    def max_cache_len(self) -> int | None:
        return self.layers[0].max_cache_len if self.is_static else None

    def begin_step(self, device: torch.device) -> None:
        """Settles who counts the tokens of the next step, which is computed on `device`; see `TokenCount`."""
        if self.is_static:
            self.count.to_device(device) if self.is_recorded else self.count.to_host()

    def advance(self, num_tokens: int) -> None:
        """Counts a step's tokens before its first layer writes, where the device counts."""
        if self.is_recorded:
            self.count.advance(num_tokens)

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
    def bits(self) -> int | str | None:
        return self.layers[0].bits

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held: b t layers times (c + r) itemsize, or what `bits` makes of a row."""
        return sum(layer.nbytes for layer in self.layers)

    def __repr__(self) -> str:
        first = self.layers[0] if self.layers else None
        if first is None or not first.is_initialized:
            return f"LatentCache(layers={len(self.layers)}, empty)"
        allocated = sum(layer.allocated_nbytes for layer in self.layers)
        kept_as = str(first.dtype).removeprefix("torch.") if self.bits is None else f"bits={self.bits}"
        return (
            f"LatentCache(layers={len(self.layers)}, batch={first.batch_size}, tokens={first.get_seq_length()}, "
            f"latent={first.format.latent_width}, rotary={first.format.rotary_width}, {kept_as}, "
            f"{self.nbytes:,} bytes held, {allocated:,} allocated)"
        )

    def save(self, path: str | PathLike, *, tokens: Tensor, model: PreTrainedModel) -> None:
        """Writes one safetensors file with rows, token ids and the model's fingerprint; complete, or not at all.

        `tokens` [b t] or [t] are the ids the cache was made from; more may follow, as `generate` returns them.
        """
        length = self._length_to_write("save")
        check_ids(tokens)
        tokens, batch = torch.atleast_2d(tokens), self.layers[0].batch_size
        if tokens.shape[0] != batch or tokens.shape[1] < length:
            raise ValueError(
                f"expected the ids of the cache's {batch} sequences of {length} tokens, got ids of shape "
                f"{list(tokens.shape)}; give those it was filled from, cached ones first."
            )
        if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
            raise ValueError(
                f"expected ids from 0 to {model.config.vocab_size - 1}, got {int(tokens.min())} to "
                f"{int(tokens.max())}; give those the cache was filled from."
            )
        if self.layers[0].dtype != model.dtype:
            raise ValueError(
                f"this cache holds {self.layers[0].dtype} and the model is {model.dtype}; save it with the model that "
                "filled it, and fill it outside of autocast."
            )
        tensors = {
            f"layers.{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.tensors().items()
        }
        stored = {"bits": self.bits, "tokens": tokens[:, :length].tolist(), "fingerprint": fingerprint(model)}
        write_tensors(path, tensors, self._shape_for(model) | stored)

    @classmethod
    def load(cls, path: str | PathLike, *, model: PreTrainedModel) -> "LatentCache":
        """Reads what `save` wrote; its ids [b t] are then in `stored_tokens`.

        Rows stay in the file until they are read (memory-mapped) where the model is on the CPU. ValueError where the
        file is cut off, altered, or of another model.
        """
        tensors, stored = read_tensors(path)
        for name, own in cls._shape_for(model).items():
            if stored[name] != own:
                raise ValueError(
                    f"{path} is of a model with {name} {stored[name]}, this one has {own}; load that one, or fill a "
                    "new cache."
                )
        if stored["fingerprint"] != fingerprint(model):
            raise ValueError(
                f"{path} is of a model with other weights, settings or adapters than this one; load that one, or fill "
                "a new cache."
            )
        cache = cls(model.config, bits=stored["bits"])
        cache.stored_tokens = torch.tensor(stored["tokens"])
        widths = stored["latent width"], stored["rotary width"]
        for i, layer in enumerate(cache.layers):
            prefix, rows = (tensors.get(f"layers.{i}.{name}") for name in ("prefix", "rows"))
            prefix, rows = (None if x is None else x.to(model.device) for x in (prefix, rows))
            layer.restore(latent_format(cache.bits, *widths, model.dtype), prefix, rows)
        return cache

    @staticmethod
    def _shape_for(model: PreTrainedModel) -> dict[str, int | str]:
        config = model.config.get_text_config(decoder=True)
        return {
            "number of layers": config.num_hidden_layers,
            "latent width": config.kv_lora_rank,
            "rotary width": config.qk_rope_head_dim,
            "dtype": str(model.dtype),
        }

    def flashmla_records(self) -> list[Tensor]:
        """Per layer the tokens as FlashMLA, vLLM (`fp8_ds_mla`) and SGLang keep them: [b t 656] bytes, copied.

        With `bits="fp8"` these are the rows as they are; from any other cache, its tokens rounded to fp8.
        """
        self._length_to_write("make records of")
        return [self._records_of(layer) for layer in self.layers]

    def _length_to_write(self, what_for: str) -> int:
        length = self.get_seq_length()
        if not length:
            raise ValueError(f"this cache is empty, there is nothing to {what_for}; run the model with it first.")
        return length

    @staticmethod
    def _records_of(layer: LatentCacheLayer) -> Tensor:
        record = _record_format(layer.format.latent_width, layer.format.rotary_width, layer.dtype)
        return layer.rows().clone() if layer.bits == "fp8" else record.encode(*layer.latents.dense(layer.batch_size))

    @classmethod
    def from_flashmla_records(
        cls, records: Iterable[Tensor], config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16
    ) -> "LatentCache":
        """A cache with `bits="fp8"` that holds these records, [b t 656] bytes per layer, for a model of `dtype`.

        They are copied. ValueError where layers are unlike, or a code or scale is no finite number.
        """
        cache, records = cls(config, bits="fp8"), list(records)
        record = _record_format(config.kv_lora_rank, config.qk_rope_head_dim, dtype)
        shapes = [list(x.shape) for x in records]
        if len(shapes) != len(cache.layers) or any(s != shapes[0] or len(s) != 3 or s[-1] != 656 for s in shapes):
            raise ValueError(f"expected {len(cache.layers)} layers of records of one shape [b t 656], got {shapes}.")
        if any(x.dtype.itemsize != 1 for x in records):
            raise ValueError(f"expected records of bytes, got {records[0].dtype}; use records.view(torch.uint8).")
        for i, (layer, rows) in enumerate(zip(cache.layers, records)):
            rows = torch.empty_like(rows, memory_format=torch.contiguous_format).copy_(rows).view(torch.uint8)
            record.check_finite(rows, f"the records of layer {i}")
            layer.restore(record, None, rows)
        return cache


def _record_format(latent_width: int, rotary_width: int, dtype: torch.dtype) -> Float8Format:
    if (latent_width, rotary_width) != (512, 64):
        raise ValueError(
            f"records of 656 bytes have latent width 512 and rotary width 64, this model has {latent_width} and "
            f"{rotary_width}."
        )
    return Float8Format(latent_width, rotary_width, dtype)
