"""A cache in a file: its rows, the token ids it was computed from, and the fingerprint of the model that computed it.

Letters: b batch, t tokens held, p tokens of the shared prefix.
"""

import reprlib
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from .checks import check_ids, check_same_length
from .files import read_metadata, read_tensors
from .fingerprint import fingerprint
from .format import CACHE_DTYPES, LatentFormat, latent_format
from .layer import LatentCacheLayer


class StoredLayers(NamedTuple):
    """What a file holds: per layer the rows of a shared prefix [1 p width] and the rows after it [b t-p width]."""

    format: LatentFormat
    tokens: Tensor  # [b t]
    rows: list[tuple[Tensor | None, Tensor | None]]


def contents_of_file(
    layers: Sequence[LatentCacheLayer], *, tokens: Tensor, model: PreTrainedModel
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata that a file of these layers holds, for `write_tensors`.

    `tokens` [b t'] or [t'] are the ids that the layers were computed from, and t' >= t.
    """
    check_ids(tokens)
    check_same_length({int(layer.get_seq_length()) for layer in layers})
    tokens, batch, length = torch.atleast_2d(tokens), layers[0].batch_size, layers[0].get_seq_length()
    if not batch:
        raise ValueError("this cache holds no sequences, there is nothing to save; run the model with it first.")
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
    return tensors, _shape_for(model) | stored


def read_description(path: str | PathLike) -> dict[str, Any]:
    """Returns the metadata of a file of layers alone; raises as `read_layers` does."""
    stored = read_metadata(path)
    _check_description(path, stored)
    return stored


def read_layers(path: str | PathLike, model: PreTrainedModel) -> StoredLayers:
    """Reads a file of `contents_of_file`, and refuses one that `model` did not compute."""
    tensors, stored = read_tensors(path)
    _check_description(path, stored)
    for name, expected in _shape_for(model).items():
        if stored[name] != expected:
            raise ValueError(
                f"{path} was computed by a model with {name} {_brief(stored[name])}, this one has {expected}; load "
                "that model, or use a fresh cache."
            )
    if stored["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"{path} was computed by a model with other weights, settings or adapters than this one; load that model, "
            "or use a fresh cache."
        )
    # equal to the model's by now
    widths, num_layers = (stored["latent width"], stored["rotary width"]), stored["number of layers"]
    num_unquantized = model.config.get_text_config(decoder=True).num_unquantized_channels
    rows_format = latent_format(stored["cache_dtype"], *widths, model.dtype, num_unquantized)
    tokens = torch.tensor(stored["tokens"])
    _check_tensors(path, tensors, num_layers, tokens, rows_format)
    rows = []
    for i in range(num_layers):
        pair = (tensors.get(f"layers.{i}.{name}") for name in ("prefix", "rows"))
        rows.append(tuple(None if x is None else x.to(model.device) for x in pair))
    return StoredLayers(rows_format, tokens, rows)


def _shape_for(model: PreTrainedModel) -> dict[str, int | str]:
    config = model.config.get_text_config(decoder=True)
    return {
        "number of layers": config.num_hidden_layers,
        "latent width": config.kv_lora_rank,
        "rotary width": config.qk_rope_head_dim,
        "dtype": str(model.dtype),
    }


def _check_description(path: str | PathLike, stored: Any) -> None:
    """Refuses metadata of other fields or types, as another program or version may have sealed it."""
    kinds = {"number of layers": int, "latent width": int, "rotary width": int, "dtype": str, "fingerprint": str}
    if not isinstance(stored, dict) or stored.keys() != kinds.keys() | {"cache_dtype", "tokens"}:
        raise _not_a_cache(path, "its header has other fields")
    for name, kind in kinds.items():
        if type(stored[name]) is not kind:
            raise _not_a_cache(path, f"expected {name} of type {kind.__name__}, got {_brief(stored[name])}")
    if stored["cache_dtype"] not in CACHE_DTYPES:
        raise _not_a_cache(path, f"its cache_dtype is {_brief(stored['cache_dtype'])}")
    if not _are_ids(stored["tokens"]):
        raise _not_a_cache(path, "its tokens are not ids of sequences of the same length")


def _are_ids(tokens: Any) -> bool:
    """True for lists of ids, one per sequence and of the same length."""
    if not isinstance(tokens, list) or not tokens or not all(isinstance(ids, list) for ids in tokens):
        return False
    if len({len(ids) for ids in tokens}) > 1 or not tokens[0]:
        return False
    return all({type(x) for x in ids} == {int} and min(ids) >= 0 and max(ids) < 2**31 for ids in tokens)


def _check_tensors(
    path: str | PathLike, tensors: dict[str, Tensor], num_layers: int, tokens: Tensor, rows_format: LatentFormat
) -> None:
    """Refuses tensors that are not the rows of these tokens [b t], as `LatentCacheLayer.tensors` returns them."""
    batch, length = tokens.shape
    prefix = tensors.get("layers.0.prefix")
    num_shared = 0 if prefix is None or prefix.dim() != 3 else prefix.shape[1]
    expected = {}
    if prefix is not None:
        expected["prefix"] = [1, num_shared, rows_format.row_width]
    if batch > 1 or prefix is None:
        expected["rows"] = [batch, length - num_shared, rows_format.row_width]
    wanted = {f"layers.{i}.{name}": shape for i in range(num_layers) for name, shape in expected.items()}
    found = {name: list(x.shape) for name, x in tensors.items()}
    if found != wanted or (batch == 1 and num_shared != length):
        raise _not_a_cache(path, f"its tensors are not the rows of {num_layers} layers for {batch} x {length} tokens")
    if dtypes := {x.dtype for x in tensors.values()} - {rows_format.storage_dtype}:
        raise _not_a_cache(path, f"its rows are {dtypes.pop()} and not {rows_format.storage_dtype}")


def _brief(value: Any) -> str:
    return value[:40] if isinstance(value, str) else reprlib.repr(value)


def _not_a_cache(path: str | PathLike, reason: str) -> ValueError:
    return ValueError(f"{path} is not a file of a LatentCache: {reason}; remove it.")
