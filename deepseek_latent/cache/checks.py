"""Checks of a cache and of token ids, which raise before anything is computed or written.

Letters: b batch, s new tokens, t all tokens, d model width.
"""

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticCache, StaticLayer

from ..compat.transformers import attention_name
from ..configuration_deepseek_v2 import DeepseekV2Config


def check_cache(cache: Cache | None, config: DeepseekV2Config, hidden: Tensor, is_here: Sequence[bool]) -> None:
    """Refuses a cache that the new tokens, embedded as `hidden` [b s d], cannot continue.

    `is_here` is True for the layers that this process has: a pipeline stage fills only its own.
    """
    if cache is None:
        return
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
        return
    if getattr(cache, "is_recorded", False):
        return
    if getattr(cache, "is_static", False):
        check_capacity(cache.max_cache_len, int(cache.get_seq_length()) + hidden.shape[1])
    if isinstance(cache, StaticCache):
        if attention_name(config) == "flex_attention":
            raise ValueError(
                "flex_attention cannot read a StaticCache, whose length changes after its mask is made; use sdpa."
            )
        check_capacity(cache.layers[0].max_cache_len, int(cache.get_seq_length()) + hidden.shape[1])
    else:
        check_same_length({layer.get_seq_length() for layer in compress(cache.layers, is_here)})
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
            f"this cache holds {max(lengths)} tokens in one layer and {min(lengths)} in another, because a step was "
            "interrupted; use a fresh cache."
        )


def check_capacity(capacity: int, num_tokens: int) -> None:
    """Refuses `num_tokens` tokens in total for a static cache whose capacity is smaller."""
    if num_tokens > capacity:
        raise ValueError(
            f"this static cache has room for {capacity} tokens and would have to hold {num_tokens}; "
            "make it with a larger max_cache_len."
        )


def check_ids(ids: Tensor) -> None:
    """Refuses anything but a tensor of token ids [t] or [b t]."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"expected token ids in a tensor [b t], got {_kind(ids)}; use torch.tensor(ids).")
    if ids.dim() not in (1, 2) or ids.is_floating_point():
        raise ValueError(f"expected token ids [b t] as integers, got shape {list(ids.shape)} of {ids.dtype}.")
