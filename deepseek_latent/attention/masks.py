"""Attention masks: the checks of a mask that a user passes, and the masks that attention computes for itself.

A mask is None (causal: the last query token sees all t), boolean (True where a query may attend) or additive.
Letters: b batch, s query tokens, t all visible tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.cache_utils import Cache

from ..cache.segments import Latents
from ..compat.torch import device_of
from ..compat.transformers import attention_name
from ..configuration_deepseek_v2 import DeepseekV2Config


def checked_mask(
    mask: Tensor | BlockMask,
    inputs_embeds: Tensor,  # [b s d]
    config: DeepseekV2Config,
    cache: Cache | None,
    num_held: int | None,
) -> Tensor | BlockMask:
    """Refuses a mask that does not fit the new tokens and those in the cache, before anything is computed.

    `cache` is the one that the user passed, and `num_held` the number of tokens in it, or None if only the device knows
    it. A 4-D mask covers all rows of a static cache. With a cache, a 2-D mask may also cover tokens to come, which are
    cut off.
    """
    b, s = inputs_embeds.shape[:2]
    if not isinstance(mask, (Tensor, BlockMask)):
        raise TypeError(
            f"attention_mask must be a tensor [b t] or [b 1 s t], a BlockMask or None, got {type(mask).__name__}; "
            "pass the mask of full attention itself."
        )
    if isinstance(mask, Tensor):
        if mask.is_meta and not inputs_embeds.is_meta:
            raise ValueError(f"expected attention_mask on {inputs_embeds.device}, got one on meta; make it there.")
        if mask.dim() == 2:
            return _checked_padding_mask(mask, b, s, cache, num_held)
    t = _num_visible(s, cache, None if cache is not None and cache.is_compileable else num_held)
    if isinstance(mask, BlockMask):
        # dynamo does not trace the shape of a BlockMask
        if not torch.compiler.is_compiling():
            _check_dense_shape(tuple(mask.shape), b, config.num_attention_heads, s, t)
        return mask
    if mask.dim() != 4:
        raise ValueError(
            f"attention_mask must be [b t] = [{b} {t}] or [b 1 s t] = [{b} 1 {s} {t}], got shape {list(mask.shape)}."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"a 4-D attention_mask must be boolean or additive in floating point, got {mask.dtype}.")
    if attention_name(config) != "flex_attention" or flex_cannot_read(mask):
        _check_dense_shape(tuple(mask.shape), b, config.num_attention_heads, s, t)
        return mask
    # flex_attention adds an element to each score, does not broadcast, and reads the first head's mask for all heads
    _check_dense_shape(tuple(mask.shape), b, 1, s, t)
    return additive_mask(mask, inputs_embeds.dtype).expand(b, 1, s, t).contiguous()


def _checked_padding_mask(mask: Tensor, b: int, s: int, cache: Cache | None, num_held: int | None) -> Tensor:
    visible = _num_visible(s, cache, num_held)
    is_right = mask.shape[0] == b
    # a step that is recorded takes a mask of any length
    if num_held is not None:
        is_right = is_right and (mask.shape[1] == visible or (mask.shape[1] > visible and cache is not None))
    if not is_right:
        raise ValueError(
            f"a 2-D attention_mask must be [batch, visible tokens] = [{b}, {visible}], cached tokens included, "
            f"got {list(mask.shape)}."
        )
    return mask if num_held is None or mask.shape[1] == visible else mask[:, :visible]


def _num_visible(s: int, cache: Cache | None, num_held: int | None) -> int:
    if cache is None:
        return s
    # transformers reads the first layer, which is empty in a pipeline stage that has only later ones
    return cache.get_mask_sizes(s, 0)[0] if num_held is None else num_held + s


def flex_cannot_read(mask: Tensor | BlockMask | None) -> bool:
    """True for a dense mask on a CPU, where flex_attention corrupts memory if it is given one (torch 2.10 to 2.13)."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.device.type == "cpu"


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as one to add to scores; an additive one as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _check_dense_shape(shape: tuple[int, ...], b: int, num_heads: int, s: int, t: int) -> None:
    if shape[3] != t:
        raise ValueError(f"a 4-D attention_mask must cover all {t} visible tokens, cached or new, got {shape[3]}.")
    if shape[0] not in (1, b) or shape[1] not in (1, num_heads) or shape[2] not in (1, s):
        raise ValueError(
            f"a 4-D attention_mask must be [b h s t] = [{b} {num_heads} {s} {t}], or 1 in place of b, h or s, "
            f"got {list(shape)}."
        )


def dense_mask(mask: Tensor | BlockMask | None, s: int, t: int) -> Tensor | None:
    """Converts a mask made for any attention function to None or to [b 1 s t], boolean or additive."""
    if isinstance(mask, BlockMask):
        batch, heads = mask.shape[:2]
        return create_mask(mask.mask_mod, batch, heads, s, t, device=device_of(mask))
    if mask is None or mask.dim() == 4:
        return mask
    # a mask for flash attention [b t] marks padding only, since its kernel is causal by itself
    is_token = mask[:, None, None, :].bool()
    causal = causal_mask(s, t, None, mask.device)
    return is_token if causal is None else is_token & causal


def held_tokens_mask(padding: Tensor | None, s: int, latents: Latents) -> Tensor:
    """The causal mask of the last s tokens held over a buffer of t rows: [b 1 s t] or [1 1 s t], boolean.

    `padding` [b t'] is False where one of the first t' rows is padding; t' <= t.
    """
    rows = torch.arange(latents.num_tokens, device=latents.num_held.device)
    ends = latents.num_held + torch.arange(1 - s, 1, device=rows.device)
    held = (rows < ends[:, None])[None, None]
    if padding is None:
        return held
    return held & F.pad(padding.bool(), (0, latents.num_tokens - padding.shape[1]), value=True)[:, None, None]


def causal_mask(s: int, t: int, mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Returns `mask`, or for None the causal mask [1 1 s t], boolean; it stays None for one query, which sees all."""
    if mask is not None or s == 1:
        return mask
    return torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)[None, None]
