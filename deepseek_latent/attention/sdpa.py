"""Attention of queries to keys and values, fused or explicit, also as transformers' attention functions.

A mask is None (causal, the last query token attends to all t), boolean (True where a query may attend) or additive, of
shape [b 1 s t] or [b h s t].
Letters: b batch, s query tokens, t all visible tokens, h heads, n content, r rotary, v value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from .masks import causal_mask, dense_mask


def fused_attention(
    queries: Tensor,  # [b h s n+r]
    keys: Tensor,  # [b h t n+r]
    values: Tensor,  # [b h t v]
    *,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:  # [b h s v]
    """Scaled dot-product attention by torch's kernels, which never make the matrix of all scores.

    On a CPU the narrower of keys and values is padded with zeros, which change no score and no value: for widths that
    differ, such as 192 and 128, torch would compute explicit scores. On a GPU it has kernels for such widths.
    """
    qk_width, v_width = queries.shape[-1], values.shape[-1]
    pads = queries.device.type != "cuda"
    if pads and v_width < qk_width:
        values = F.pad(values, (0, qk_width - v_width))
    elif pads and v_width > qk_width:
        queries, keys = F.pad(queries, (0, v_width - qk_width)), F.pad(keys, (0, v_width - qk_width))
    if queries.shape[2] < keys.shape[2]:
        # torch aligns its causal mask with the first key
        mask = causal_mask(queries.shape[2], keys.shape[2], mask, keys.device)
    is_causal = mask is None and queries.shape[2] > 1
    context = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale
    )
    if mask is not None and mask.dtype == torch.bool and not pads:
        # some GPU kernels return nonzero values for a query that may attend to nothing, such as padding
        context = context.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return context[..., :v_width]


def explicit_attention(
    queries: Tensor,  # [b h s n+r]
    keys: Tensor,  # [b h t n+r]
    values: Tensor,  # [b h t v]
    *,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # [b h s v], [b h s t]
    """Attention that returns its weights, for `attn_implementation="eager"` and for `output_attentions`."""
    mask = causal_mask(queries.shape[2], keys.shape[2], mask, keys.device)
    weights = masked_softmax(queries @ keys.mT, mask, scale).to(values.dtype)
    return F.dropout(weights, dropout) @ values, weights


def masked_softmax(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax over the last axis of `scores * scale` in float32 or wider; zeros for a row that is masked everywhere."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if mask is None:
        return scores.softmax(dim=-1)
    if mask.dtype != torch.bool:
        sees_nothing = (mask <= torch.finfo(mask.dtype).min).all(dim=-1, keepdim=True)
        return (scores + mask).masked_fill(sees_nothing, 0.0).softmax(dim=-1).masked_fill(sees_nothing, 0.0)
    # the lowest finite number, not -inf: a row of -inf would be NaN before it is zeroed
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).masked_fill(~mask, 0.0)


def explicit_attention_forward(module, query, key, value, attention_mask, *, scaling, dropout=0.0, **kwargs):
    """`explicit_attention` with the signature of transformers' attention functions."""
    mask = dense_mask(attention_mask, query.shape[2], key.shape[2])
    context, weights = explicit_attention(query, key, value, mask=mask, scale=scaling, dropout=dropout)
    return context.transpose(1, 2), weights


def fused_attention_forward(module, query, key, value, attention_mask, *, scaling, dropout=0.0, **kwargs):
    """`fused_attention` with the signature of transformers' attention functions."""
    context = fused_attention(query, key, value, mask=attention_mask, scale=scaling, dropout=dropout)
    return context.transpose(1, 2), None


# transformers lets a model override functions in a table of its own; "sdpa" pads the values in this table only
ATTENTION_FUNCTIONS = AttentionInterface()
ATTENTION_FUNCTIONS["sdpa"] = fused_attention_forward
