"""Attention masks: the checks of a mask that a user passes, and the masks that attention computes for itself.

A mask is None (causal: the last query token sees all t), boolean (True where a query may attend) or additive.
Letters: b batch, s query tokens, t all visible tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from ..cache.segments import Latents
from ..compat.torch import device_of


def check_padding_mask(mask: Tensor | None, inputs_embeds: Tensor, cached: int | Tensor) -> None:
    """Refuses a 2-D mask that is too small, which transformers would extend with padding."""
    # a static cache counts in a tensor, and reading it here would break the graph
    if mask is None or mask.dim() != 2 or isinstance(cached, Tensor):
        return
    batch, visible = inputs_embeds.shape[0], cached + inputs_embeds.shape[1]
    if mask.shape[0] != batch or mask.shape[1] < visible:
        raise ValueError(
            f"a 2-D attention_mask must be [batch, visible tokens] = [{batch}, {visible}], cached tokens included, "
            f"got {list(mask.shape)}."
        )


def check_dense_mask(mask: object, t: int) -> None:
    """Refuses a 4-D mask [b 1 s t] of the wrong length or dtype; other kinds of mask are not checked."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return
    if mask.shape[-1] != t:
        raise ValueError(
            f"a 4-D attention_mask must cover all {t} visible tokens, cached or new, got {mask.shape[-1]}."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"a 4-D attention_mask must be boolean or additive in floating point, got {mask.dtype}.")


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
