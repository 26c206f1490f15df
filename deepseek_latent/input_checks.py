"""What a forward pass refuses, in one sentence each, before anything is computed or cached."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache

from .configuration_deepseek_v2 import DeepseekV2Config


def check_cache(cache: Cache | None, config: DeepseekV2Config, num_tokens: int | Tensor) -> None:
    """Refuses a cache of another model as far as it shows, and a static one too small for `num_tokens` in all."""
    if cache is None:
        return
    # a DynamicCache made without a config has no layers before it is used
    if len(cache.layers) not in (0, config.num_hidden_layers):
        raise ValueError(
            f"this cache has {len(cache.layers)} layers and the model {config.num_hidden_layers}; "
            "a cache belongs to the model that filled it."
        )
    if not isinstance(cache, StaticCache):
        return
    if config._attn_implementation == "flex_attention":
        raise ValueError("flex_attention cannot read a StaticCache, whose length moves under its mask; use sdpa.")
    # it counts in a tensor, which may not be read while a graph is being recorded
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    room = cache.layers[0].max_cache_len
    if num_tokens > room:
        raise ValueError(
            f"this StaticCache has room for {room} tokens and would have to hold {int(num_tokens)}; "
            "make it with a larger max_cache_len."
        )


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
