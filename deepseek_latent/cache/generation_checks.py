"""Checks of a cache that `generate()` was given, which raise before the first token is computed."""

from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from ..compat.transformers import length_of_dropped_mask
from .checks import check_capacity, not_a_cache


def check_cache_for_generation(cache: Cache, generation_config: GenerationConfig, mask: Tensor | None) -> None:
    """Refuses a cache that `generate` would misread; `mask` [b t] covers all tokens, cached ones included."""
    if not isinstance(cache, Cache):
        raise not_a_cache(cache)
    held = int(cache.get_seq_length())
    if generation_config.use_cache is False:
        raise ValueError(f"expected no cache with use_cache=False, got one that holds {held} tokens; drop one of them.")
    # transformers has dropped a mask of ones by now; its length was noted
    given = mask.shape[1] if mask is not None else length_of_dropped_mask(generation_config)
    if 0 < given <= held:
        raise ValueError(
            f"this cache holds {held} tokens and the prompt has {given} by its attention_mask, which is as long as the "
            "ids if none is passed; pass the ids of all tokens, with new ones after those in the cache, or the new "
            "ones alone with an attention_mask over all."
        )
    if cache.is_compileable:
        check_capacity(cache.layers[0].max_cache_len, num_tokens_to_hold(generation_config))


def check_mask_of_prompt(mask: Tensor, num_tokens: int) -> None:
    """Refuses a mask [b t] that is longer than the prompt, as the mask of each generated token is added at its end."""
    if mask.shape[1] > num_tokens:
        raise ValueError(
            f"attention_mask must cover the {num_tokens} tokens of the prompt, got {mask.shape[1]}; "
            "cut it to the prompt."
        )


def num_tokens_to_hold(settings: GenerationConfig) -> int:
    """The largest number of tokens that a static cache holds while `generate` runs."""
    # the last generated token is never fed back; prompt lookup drafts beyond it, then crops (transformers 5.24)
    return settings.max_length - 1 + (settings.prompt_lookup_num_tokens or 0)


def check_starts_with_stored_tokens(cache: Cache, input_ids: Tensor) -> None:
    """Refuses ids [b s] of all tokens that differ from those that `cache` was loaded with, if it is from a file."""
    stored = getattr(cache, "stored_tokens", None)
    # several sequences may have been reordered since
    if stored is None or stored.shape[0] > 1:
        return
    num_tokens = min(stored.shape[1], input_ids.shape[1])
    differs = (input_ids[:, :num_tokens] != stored[:, :num_tokens].to(input_ids.device)).any(dim=0)
    if differs.any():
        raise ValueError(
            "this cache was computed from other ids, which differ from the given ones from token "
            f"{int(differs.int().argmax())} on; pass the ids of all tokens, cached ones (`stored_tokens`) first."
        )
