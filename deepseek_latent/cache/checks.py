"""What a forward pass refuses, in one sentence each, before anything is computed or cached."""

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicLayer, StaticCache, StaticLayer

from ..compat.transformers import attention_name, length_of_dropped_mask
from ..configuration_deepseek_v2 import DeepseekV2Config


def check_cache(cache: Cache | None, config: DeepseekV2Config, hidden: Tensor, is_here: Sequence[bool]) -> None:
    """Refuses a cache that the new tokens, embedded as `hidden` [b s d], cannot continue; nothing is written to it.

    `is_here` says of each layer whether this process has it: a stage of a pipeline fills its own only.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise _no_cache(cache)
    # a DynamicCache made without a config has no layers before it is used
    if len(cache.layers) not in (0, config.num_hidden_layers):
        raise ValueError(
            f"this cache has {len(cache.layers)} layers and the model {config.num_hidden_layers}; "
            "a cache belongs to the model that filled it."
        )
    # what follows reads numbers that a graph being recorded keeps as tensors
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    if getattr(cache, "is_recorded", False):
        return
    if getattr(cache, "is_static", False):
        check_room(cache.max_cache_len, int(cache.get_seq_length()) + hidden.shape[1])
    if isinstance(cache, StaticCache):
        if attention_name(config) == "flex_attention":
            raise ValueError("flex_attention cannot read a StaticCache, whose length moves under its mask; use sdpa.")
        check_room(cache.layers[0].max_cache_len, int(cache.get_seq_length()) + hidden.shape[1])
    else:
        check_same_length({layer.get_seq_length() for layer in compress(cache.layers, is_here)})
    for layer in cache.layers[:1]:
        # a layer of ours looks for itself
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
    """Refuses new tokens of another shape, device or dtype than those held.

    Each side is (batch, latent width, rotary width, dtype, device); with `may_widen`, a wider dtype may follow.
    """
    if held[:3] != new[:3]:
        raise ValueError(
            f"this cache holds (batch, latent width, rotary width) = {held[:3]}, the new tokens have {new[:3]}; use a "
            "fresh cache for another batch or model, or batch_repeat_interleave to continue one sequence as many."
        )
    (held_dtype, held_device), (new_dtype, new_device) = held[3:], new[3:]
    if held_device != new_device:
        raise ValueError(f"this cache is on {held_device}, the new tokens are on {new_device}; move one.")
    wanted = torch.promote_types(held_dtype, new_dtype) if may_widen else held_dtype
    if new_dtype != wanted:
        raise ValueError(
            f"this cache holds {held_dtype}, the new tokens are {new_dtype}; "
            "use a fresh cache, or a model of the cache's dtype."
        )


def _no_cache(thing: object) -> TypeError:
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
            f"this cache holds {max(lengths)} tokens in one layer and {min(lengths)} in another, as an interrupted "
            "step leaves it; fill a new one."
        )


def check_room(room: int, num_tokens: int) -> None:
    """Refuses a static cache for `room` tokens that `num_tokens` in all do not fit into."""
    if num_tokens > room:
        raise ValueError(
            f"this static cache has room for {room} tokens and would have to hold {num_tokens}; "
            "make it with a larger max_cache_len."
        )


def check_cache_for_generation(cache: Cache, generation_config: GenerationConfig, mask: Tensor | None) -> None:
    """Refuses a cache that `generate` was given and would misread; `mask` [b t] covers what is held too."""
    if not isinstance(cache, Cache):
        raise _no_cache(cache)
    held = int(cache.get_seq_length())
    if generation_config.use_cache is False:
        raise ValueError(f"use_cache=False goes without a cache, and the one given holds {held} tokens; drop one.")
    # a mask of ones has been dropped by now, and its length noted
    given = mask.shape[1] if mask is not None else length_of_dropped_mask(generation_config)
    if 0 < given <= held:
        raise ValueError(
            f"this cache holds {held} tokens and the prompt has {given}; give the ids of all tokens, with new "
            "ones behind those in the cache, or the new ones alone with an attention_mask over all."
        )
    if cache.is_compileable:
        check_room(cache.layers[0].max_cache_len, room_needed(generation_config))


def room_needed(settings: GenerationConfig) -> int:
    """Tokens that a static cache has to hold at most while `generate` runs."""
    # the last token is said and not read; prompt lookup drafts beyond it, and takes that back (transformers 5.24)
    return settings.max_length - 1 + (settings.prompt_lookup_num_tokens or 0)


def check_begins_as_stored(cache: Cache, input_ids: Tensor) -> None:
    """Refuses ids [b s] of all tokens that are not those which `cache` was loaded with, where it came from a file."""
    stored = getattr(cache, "stored_tokens", None)
    # several sequences may have been put into another order since
    if stored is None or stored.shape[0] > 1:
        return
    num_tokens = min(stored.shape[1], input_ids.shape[1])
    differs = (input_ids[:, :num_tokens] != stored[:, :num_tokens].to(input_ids.device)).any(dim=0)
    if differs.any():
        raise ValueError(
            f"this cache was loaded for other ids, which differ from these from token {int(differs.int().argmax())} "
            "on; give the ids of all tokens, cached ones (`stored_tokens`) first."
        )


def check_ids(ids: Tensor) -> None:
    """Refuses what are no token ids [t] or [b t] in a tensor."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"expected token ids in a tensor [b t], got {_kind(ids)}; use torch.tensor(ids).")
    if ids.dim() not in (1, 2) or ids.is_floating_point():
        raise ValueError(f"expected token ids [b t] as integers, got shape {list(ids.shape)} of {ids.dtype}.")


def check_padding_mask(mask: Tensor | None, inputs_embeds: Tensor, cached: int | Tensor) -> None:
    """Refuses a 2-D mask that is too small; transformers would fill it up with padding."""
    # a static cache counts in a tensor, which is not read here lest it break the graph
    if mask is None or mask.dim() != 2 or isinstance(cached, Tensor):
        return
    batch, visible = inputs_embeds.shape[0], cached + inputs_embeds.shape[1]
    if mask.shape[0] != batch or mask.shape[1] < visible:
        raise ValueError(
            f"a 2-D attention_mask must be [batch, visible tokens] = [{batch}, {visible}], cached ones included, "
            f"got {list(mask.shape)}."
        )


def check_dense_mask(mask: object, t: int) -> None:
    """Refuses a 4-D mask [b 1 s t] that cannot be meant; other kinds are not looked at."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return
    if mask.shape[-1] != t:
        raise ValueError(f"a 4-D attention_mask must cover all {t} visible tokens, cached too, got {mask.shape[-1]}.")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"a 4-D attention_mask must be boolean or additive in floating point, got {mask.dtype}.")
