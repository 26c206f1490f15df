"""Checks of a cache and of token ids, which raise before anything is computed or written.

Letters: b batch, s new tokens, t all tokens, d model width.
"""

from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticCache, StaticLayer

from ..compat.transformers import attention_name
from ..configuration_deepseek_v2 import DeepseekV2Config


def check_cache(cache: Cache | None, config: DeepseekV2Config, hidden: Tensor, is_here: Sequence[bool]) -> int | None:
    """Refuses a cache that the new tokens, embedded as `hidden` [b s d], cannot continue.

    `is_here` is True for the layers that this process has: a pipeline stage fills only its own. Returns the number of
    tokens held, or None in a step that is recorded, where only the device knows it.
    """
    if cache is None:
        return 0
    if not isinstance(cache, Cache):
        raise not_a_cache(cache)
    # a DynamicCache made without a config has no layers before it is used
    if len(cache.layers) not in (0, config.num_hidden_layers):
        raise ValueError(
            f"this cache has {len(cache.layers)} layers and the model has {config.num_hidden_layers}; use a cache made "
            "from the model's own config."
        )
    # the checks below read lengths on the host, which a graph being recorded keeps as tensors
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return None
    if getattr(cache, "is_recorded", False):
        return None
    if getattr(cache, "is_static", False):
        check_capacity(cache.max_cache_len, int(cache.get_seq_length()) + hidden.shape[1])
    if isinstance(cache, StaticCache):
        if attention_name(config) == "flex_attention":
            raise ValueError(
                "flex_attention cannot read a StaticCache, whose length changes after its mask is made; use sdpa."
            )
        num_tokens = int(cache.get_seq_length())
        check_capacity(cache.layers[0].max_cache_len, num_tokens + hidden.shape[1])
    else:
        lengths = {layer.get_seq_length() for layer in compress(cache.layers, is_here)}
        check_same_length(lengths)
        num_tokens = next(iter(lengths), 0)
    for layer in cache.layers[:1]:
        # LatentCacheLayer.update does this check itself
        if type(layer) in (DynamicLayer, StaticLayer) and layer.is_initialized:
            check_continues(
                (
                    layer.keys.shape[0],
                    layer.keys.shape[-1],
                    layer.values.shape[-1],
                    layer.keys.dtype,
                    layer.keys.device,
                ),
                (
                    hidden.shape[0],
                    config.kv_lora_rank,
                    config.qk_rope_head_dim,
                    _dtype_of_latents(hidden),
                    hidden.device,
                ),
                may_widen=type(layer) is DynamicLayer,
            )
    return num_tokens


def check_continues(held: tuple, new: tuple, *, may_widen: bool = True) -> None:
    """Refuses new tokens whose shape, device or dtype differs from that of the tokens held.

    `held` and `new` are (batch, latent width, rotary width, dtype, device). With `may_widen`, new tokens may have a
    wider dtype.
    """
    if held[:3] != new[:3]:
        raise ValueError(
            f"this cache holds (batch, latent width, rotary width) = {held[:3]}, the new tokens have {new[:3]}; use a "
            "fresh cache for another batch or model, or batch_repeat_interleave to continue one sequence in many ways."
        )
    (held_dtype, held_device), (new_dtype, new_device) = held[3:], new[3:]
    if held_device != new_device:
        raise ValueError(f"this cache is on {held_device}, the new tokens are on {new_device}; move one of them.")
    wanted = torch.promote_types(held_dtype, new_dtype) if may_widen else held_dtype
    if new_dtype != wanted:
        raise ValueError(
            f"this cache holds {held_dtype}, the new tokens are {new_dtype}; "
            "use a fresh cache, or a model of the cache's dtype."
        )


def not_a_cache(thing: object) -> TypeError:
    return TypeError(f"expected a Cache as cache, such as LatentCache(model.config), got {_kind(thing)}.")


def _dtype_of_latents(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


def _kind(thing: object) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def check_same_length(lengths: set[int]) -> None:
    """Refuses a cache whose layers hold different numbers of tokens."""
    if len(lengths) > 1:
        raise ValueError(
            f"this cache holds {max(lengths)} tokens in one layer and {min(lengths)} in another, because a change was "
            "interrupted; use a fresh cache."
        )


def check_capacity(capacity: int, num_tokens: int) -> None:
    """Refuses `num_tokens` tokens in total for a static cache whose capacity is smaller."""
    if num_tokens > capacity:
        raise ValueError(
            f"this static cache has room for {capacity} tokens and would have to hold {num_tokens}; "
            "make it with a larger max_cache_len."
        )


def check_new_tokens(ids: Tensor | None, embeds: Tensor | None, width: int) -> None:
    """Refuses what is neither token ids [b s] nor embeddings [b s d] of `width` d, and refuses no tokens at all."""
    if (ids is None) == (embeds is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds.")
    if ids is not None:
        check_batch_of_ids(ids)
        return
    if not isinstance(embeds, Tensor):
        raise TypeError(f"expected inputs_embeds as a tensor [b s d], got {_kind(embeds)}.")
    if embeds.dim() != 3 or embeds.shape[2] != width or not embeds.is_floating_point():
        raise ValueError(
            f"expected inputs_embeds [b s d] in floating point with d = {width}, got shape {list(embeds.shape)} of "
            f"{embeds.dtype}."
        )
    if not embeds.numel():
        raise _no_tokens("inputs_embeds", embeds)


def check_batch_of_ids(ids: Tensor) -> None:
    """Refuses anything but at least one token id in a tensor [b s] of a dtype that torch looks up."""
    check_ids(ids)
    if ids.dim() != 2:
        raise ValueError(f"expected token ids [b s], got shape {list(ids.shape)}; a single sequence is ids[None].")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected token ids in torch.int64 or torch.int32, got {ids.dtype}; use ids.long().")
    if not ids.numel():
        raise _no_tokens("input_ids", ids)


def _no_tokens(name: str, x: Tensor) -> ValueError:
    return ValueError(f"expected at least one sequence of at least one token, got {name} of shape {list(x.shape)}.")


def check_positions(positions: Tensor, b: int, s: int) -> None:
    """Refuses positions of another shape than [b s], [1 s] or [s]."""
    if not isinstance(positions, Tensor):
        raise TypeError(f"expected position_ids in a tensor [b s], got {_kind(positions)}.")
    if tuple(positions.shape) not in ((b, s), (1, s), (s,)):
        expected = f"[{b} {s}]" if b == 1 else f"[{b} {s}] or [1 {s}]"
        raise ValueError(
            f"expected position_ids of the new tokens, [b s] = {expected}, got shape {list(positions.shape)}."
        )


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuses labels that are not integers, one for each of the logits [b s vocab]."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"expected labels in a tensor [b s], got {_kind(labels)}.")
    if labels.shape != logits.shape[:2] or labels.is_floating_point():
        raise ValueError(
            f"expected labels [b s] = {list(logits.shape[:2])} as integers, one for each of the logits, got shape "
            f"{list(labels.shape)} of {labels.dtype}."
        )


def look_up_ids(look_up: Callable[[Tensor], Tensor], ids: Tensor, num_ids: int, ignored: int | None = None) -> Tensor:
    """Calls `look_up(ids)`, and if torch finds an id outside of 0 to num_ids - 1, names it.

    With `ignored`, ids are labels, and that value is right too. This costs nothing while ids are right. On a GPU, torch
    finds it later, and then nothing can be computed any more.
    """
    if torch.compiler.is_compiling():
        return look_up(ids)
    try:
        return look_up(ids)
    except IndexError as error:
        wrong = set(ids.flatten().tolist()) - {*range(num_ids), ignored}
        # the error may have another cause, such as a hook
        if not wrong:
            raise
        expected = f"ids from 0 to {num_ids - 1}"
        if ignored is not None:
            expected = f"labels from 0 to {num_ids - 1}, or {ignored}, which is ignored"
        raise ValueError(f"expected {expected}, got {min(wrong)}; use the tokenizer of this model.") from error


def check_ids(ids: Tensor) -> None:
    """Refuses anything but a tensor of token ids [t] or [b t]."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"expected token ids in a tensor [b t], got {_kind(ids)}; use torch.tensor(ids).")
    if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"expected token ids [b t] as integers, got shape {list(ids.shape)} of {ids.dtype}.")
