"""Cached tokens as records of 656 bytes, the format of FlashMLA, vLLM (`fp8_ds_mla`) and SGLang.

Letters: b batch, t tokens held.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from .format import Float8Format
from .layer import LatentCacheLayer

RECORD_BYTES = 656


def layer_to_records(layer: LatentCacheLayer) -> Tensor:
    """The tokens of one layer as a new tensor of records [b t 656], rounded to fp8 unless they are stored so."""
    widths = layer.format.latent_width, layer.format.rotary_width
    record_format = _record_format(*widths, layer.num_unquantized, layer.dtype)
    if layer.cache_dtype == "fp8":
        return layer.rows().clone()
    return record_format.encode(*layer.latents.dense(layer.batch_size))


def rows_from_records(
    records: Iterable[Tensor], config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[Float8Format, list[Tensor]]:
    """Copies records [b t 656] of every layer into rows; refuses layers that differ in shape, and NaN or infinity."""
    widths = config.kv_lora_rank, config.qk_rope_head_dim
    # a config of transformers' own class has no such field
    num_unquantized = getattr(config, "num_unquantized_channels", 0)
    record_format = _record_format(*widths, num_unquantized, dtype)
    records = list(records)
    shapes, num_layers = [list(x.shape) for x in records], config.num_hidden_layers
    if len(shapes) != num_layers or any(s != shapes[0] or len(s) != 3 or s[-1] != RECORD_BYTES for s in shapes):
        raise ValueError(
            f"expected {num_layers} layers of records of the same shape [b t {RECORD_BYTES}], got {shapes}."
        )
    if any(x.dtype.itemsize != 1 for x in records):
        raise ValueError(f"expected records of bytes, got {records[0].dtype}; use records.view(torch.uint8).")
    copies = []
    for i, rows in enumerate(records):
        rows = torch.empty_like(rows, memory_format=torch.contiguous_format).copy_(rows).view(torch.uint8)
        record_format.check_finite(rows, f"the records of layer {i}")
        copies.append(rows)
    return record_format, copies


def _record_format(latent_width: int, rotary_width: int, num_unquantized: int, dtype: torch.dtype) -> Float8Format:
    if (latent_width, rotary_width) != (512, 64):
        raise ValueError(
            f"records of {RECORD_BYTES} bytes have latent width 512 and rotary width 64, this model has "
            f"{latent_width} and {rotary_width}."
        )
    if num_unquantized:
        raise ValueError(
            f"records of {RECORD_BYTES} bytes quantize every channel of a latent, but this model has "
            f"num_unquantized_channels={num_unquantized}, whose values fp8 holds badly; keep a LatentCache instead."
        )
    return Float8Format(latent_width, rotary_width, dtype)
