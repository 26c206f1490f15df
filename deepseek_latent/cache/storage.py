"""A cache in a file: its rows, the token ids it was computed from, and the fingerprint of the model that computed it.

Letters: b batch, t tokens held, p tokens of the shared prefix.
"""

from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from .checks import check_ids
from .files import read_tensors, write_tensors
from .fingerprint import fingerprint
from .format import LatentFormat, latent_format
from .layer import LatentCacheLayer


class StoredLayers(NamedTuple):
    """What a file holds: per layer the rows of a shared prefix [1 p width] and the rows after it [b t-p width]."""

    format: LatentFormat
    tokens: Tensor  # [b t]
    rows: list[tuple[Tensor | None, Tensor | None]]


def write_layers(
    path: str | PathLike, layers: Sequence[LatentCacheLayer], *, tokens: Tensor, model: PreTrainedModel
) -> None:
    """Writes the rows of all layers; `tokens` [b t'] or [t'] are the ids they were computed from, and t' >= t."""
    check_ids(tokens)
    tokens, batch, length = torch.atleast_2d(tokens), layers[0].batch_size, layers[0].get_seq_length()
    if tokens.shape[0] != batch or tokens.shape[1] < length:
        raise ValueError(
            f"expected the ids of the cache's {batch} sequences of {length} tokens, got ids of shape "
            f"{list(tokens.shape)}; pass the ids that it was computed from, cached ones first."
        )
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise ValueError(
            f"expected ids from 0 to {model.config.vocab_size - 1}, got {int(tokens.min())} to "
            f"{int(tokens.max())}; pass the ids that the cache was computed from."
        )
    if layers[0].dtype != model.dtype:
        raise ValueError(
            f"this cache holds {layers[0].dtype} and the model is {model.dtype}; save it with the model that "
            "computed it, and compute it outside of autocast."
        )
    tensors = {f"layers.{i}.{name}": x for i, layer in enumerate(layers) for name, x in layer.tensors().items()}
    stored = {
        "cache_dtype": layers[0].cache_dtype,
        "tokens": tokens[:, :length].tolist(),
        "fingerprint": fingerprint(model),
    }
    write_tensors(path, tensors, _shape_for(model) | stored)


def read_layers(path: str | PathLike, model: PreTrainedModel) -> StoredLayers:
    """Reads what `write_layers` wrote, and refuses a file that `model` did not compute."""
    tensors, stored = read_tensors(path)
    for name, expected in _shape_for(model).items():
        if stored[name] != expected:
            raise ValueError(
                f"{path} was computed by a model with {name} {stored[name]}, this one has {expected}; load that model, "
                "or use a fresh cache."
            )
    if stored["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"{path} was computed by a model with other weights, settings or adapters than this one; load that model, "
            "or use a fresh cache."
        )
    rows_format = latent_format(stored["cache_dtype"], stored["latent width"], stored["rotary width"], model.dtype)
    rows = []
    for i in range(stored["number of layers"]):
        pair = (tensors.get(f"layers.{i}.{name}") for name in ("prefix", "rows"))
        rows.append(tuple(None if x is None else x.to(model.device) for x in pair))
    return StoredLayers(rows_format, torch.tensor(stored["tokens"]), rows)


def _shape_for(model: PreTrainedModel) -> dict[str, int | str]:
    config = model.config.get_text_config(decoder=True)
    return {
        "number of layers": config.num_hidden_layers,
        "latent width": config.kv_lora_rank,
        "rotary width": config.qk_rope_head_dim,
        "dtype": str(model.dtype),
    }
