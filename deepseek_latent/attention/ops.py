"""Latent attention as functions without state: the absorbed form, the expanded form, and what both share.

Letters: b batch, s query tokens, t all visible tokens, h heads, n content, r rotary, v value width, c latent width.
A mask is None (causal, the last query token sees all t), boolean (True where a query may look) or additive, of shape
[b 1 s t] or [b h s t].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from ..cache.segments import Latents
from .masks import causal_mask

# bounds on what one block of work may allocate: scores, and widened latents or expanded keys or values
SCORES_PER_BLOCK = 1 << 24
ELEMENTS_PER_BLOCK = 1 << 25
# cached tokens that a CPU reads at once; 1024 of them, widened to float32, stay in a core's cache
TOKENS_PER_BLOCK = 1 << 10


class UpProjection(NamedTuple):
    """W^UK or W^UV per head, as it acts: a weight and, for each LoRA adapter on it, two factors.

    weight   [h m c]   m is n for keys, v for values
    factors  pairs (B [h m k], A [k c]) with the adapter's scaling inside B; the effective weight is weight + sum B A
    """

    weight: Tensor
    factors: tuple[tuple[Tensor, Tensor], ...] = ()

    def absorb(self, x: Tensor) -> Tensor:
        """x W: [b s h m] to [b s h c], in the dtype of x."""
        return self.with_adapters_absorbed(_per_head(x, self.weight), x)

    def with_adapters_absorbed(self, y: Tensor, x: Tensor) -> Tensor:
        """y [b s h c], the weight's share of `absorb(x)`, with that of the adapters added."""
        for b, a in self.factors:
            y = y + torch.einsum("bshm,hmk->bshk", x.to(b.dtype), b).matmul(a).to(y.dtype)
        return y

    def expand(self, x: Tensor) -> Tensor:
        """W x: latents or latent contexts [b s h c] to [b s h m], in the dtype of x."""
        return self.with_adapters_expanded(_per_head(x, self.weight.mT), x)

    def with_adapters_expanded(self, y: Tensor, x: Tensor) -> Tensor:
        """y [b s h m], the weight's share of `expand(x)`, with that of the adapters added."""
        for b, a in self.factors:
            y = y + torch.einsum("bshk,hmk->bshm", x.to(a.dtype).matmul(a.T), b).to(y.dtype)
        return y

    def heads(self, first: int, last: int) -> "UpProjection":
        return UpProjection(self.weight[first:last], tuple((b[first:last], a) for b, a in self.factors))

    def effective_weight(self) -> Tensor:
        """The weight [h m c] with every adapter added."""
        weight = self.weight
        for b, a in self.factors:
            weight = (weight + torch.einsum("hmk,kc->hmc", b, a)).to(self.weight.dtype)
        return weight


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """[b s h i] times [h i o] to [b s h o], in the dtype of x.

    On a CPU by way of float32, since half precision takes up to three times as long.
    """
    wide = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    product = x.flatten(0, 1).transpose(0, 1).to(wide) @ weight.to(wide)
    return torch.unflatten(product.transpose(0, 1), 0, x.shape[:2]).to(x.dtype)


def absorbed_attention(
    q_content: Tensor,  # [b s h n]
    q_rotary: Tensor,  # [b s h r]  rotated
    latents: Latents,  # t tokens   cached, after kv_a_layernorm; keys rotated, one for all heads
    w_uk: UpProjection,
    w_uv: UpProjection,
    *,
    mask: Tensor | None,
    scale: float,
) -> Tensor:  # [b s h v]
    """Latent attention that never expands the cache into keys and values.

    Moves the key up-projection onto the query and the value up-projection onto the result, because
    q . (W_UK c) = (q W_UK) . c. Equal to `expanded_attention` in exact arithmetic; cheaper for few queries, since no
    term costs t h c (n + v). Cached tokens are read once, a block at a time, with a running softmax.

    Scores, softmax and the sum of latents in float32, since c terms of half precision would cost several times the
    rounding of the expanded form; result in the dtype of the queries.
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.1.2 and Appendix C, eqs. 37-47.
    """
    queries = torch.cat((w_uk.absorb(q_content), q_rotary), dim=-1)  # [b s h c+r]
    # autocast would turn the products back into half precision
    with maybe_autocast(queries.device.type, enabled=False):
        if queries.device.type == "cpu":
            accumulator = torch.promote_types(queries.dtype, torch.float32)
            context = _attend_to_blocks(queries.to(accumulator) * scale, latents, mask, w_uv.weight.shape[-1])
        else:
            context = _attend_to_blocks(queries, latents, mask, w_uv.weight.shape[-1], scale)
    return w_uv.expand(context.to(queries.dtype))


def _attend_to_blocks(queries: Tensor, latents: Latents, mask: Tensor | None, c: int, scale: float = 1.0) -> Tensor:
    """Queries [b s h c+r] to weighted sums of latents [b s h c]; a query that may look nowhere gets zeros.

    Latents are multiplied in the dtype of the queries, and summed in float32 or wider.

    A block gives its largest score, and total and context in units of exp(that score); blocks are merged when many
    have come together. Source: Milakov and Gimelshein, arXiv:1805.02867, section 3.1.
    """
    (b, s, h, width), t = queries.shape, latents.num_tokens
    # all heads read the same latents, so tokens and heads together are the rows of one product
    rows = queries.flatten(1, 2)
    first, parts, lowest = 0, [], torch.finfo(torch.float32).min
    per_block = _tokens_per_block(b, s * h, width, queries.device)
    for block in latents.blocks(per_block, rows.dtype):
        last = first + block.shape[1]
        scores = _score(rows, block) if scale == 1 else _score(rows, block).mul_(scale)
        scores = _hide(torch.unflatten(scores, 1, (s, h)), mask, first, last, t).flatten(1, 2)
        if last == t and not parts and mask is None:
            # one block, and every query sees some of it: fewer and larger steps
            return torch.unflatten(_sum(scores.softmax(dim=-1), block[..., :c]), 1, (s, h))
        # finite, so that a row which sees nothing of this block gives zeros and not NaN
        largest = scores.amax(dim=-1, keepdim=True).clamp(min=lowest)
        weights = (scores - largest).exp_()
        parts.append((largest, weights.sum(dim=-1, keepdim=True), _sum(weights, block[..., :c])))
        if len(parts) * b * s * h * c > ELEMENTS_PER_BLOCK:
            parts = [_merge(parts)]
        first = last
    _, total, context = _merge(parts)
    return torch.unflatten(context / total.where(total > 0, 1.0), 1, (s, h))


def _merge(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Largest score [b sh 1], total [b sh 1] and context [b sh c] of several blocks as those of one."""
    if len(parts) == 1:
        return parts[0]
    largest, total, context = (torch.stack(x) for x in zip(*parts))
    shares = (largest - largest.amax(dim=0)).exp_()
    return largest.amax(dim=0), (total * shares).sum(dim=0), (context * shares).sum(dim=0)


def _tokens_per_block(batch: int, num_rows: int, width: int, device: torch.device) -> int:
    wanted = TOKENS_PER_BLOCK if device.type == "cpu" else max(ELEMENTS_PER_BLOCK // (batch * width), 1)
    return min(wanted, max(SCORES_PER_BLOCK // (batch * num_rows), 1))


def _score(rows: Tensor, block: Tensor) -> Tensor:
    """Queries [b m w] times tokens [b k w] to [b m k]; tokens [1 k w] in one product for all sequences."""
    folded = rows if block.shape[0] == rows.shape[0] else rows.flatten(0, 1)[None]
    if rows.device.type != "cpu":
        return _wide_product(folded, block.mT).view(*rows.shape[:2], -1)
    # a CPU multiplies many tokens by few queries faster than the other way round
    return (block @ folded.mT).mT.contiguous().view(*rows.shape[:2], -1)


def _sum(weights: Tensor, block: Tensor) -> Tensor:
    """Weights [b m k] times latents [b k c] to [b m c]; latents [1 k c] in one product for all sequences."""
    folded = weights if block.shape[0] == weights.shape[0] else weights.flatten(0, 1)[None]
    return _wide_product(folded.to(block.dtype), block).view(*weights.shape[:2], -1)


def _wide_product(x: Tensor, y: Tensor) -> Tensor:
    """[b m k] times [b k n] in float32 or wider; halves are multiplied as they are where the device can sum them so."""
    if x.dtype in (torch.bfloat16, torch.float16) and x.device.type in ("cuda", "meta"):
        return torch.bmm(x, y, out_dtype=torch.float32)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ y.to(wide)


def _hide(scores: Tensor, mask: Tensor | None, first: int, last: int, t: int) -> Tensor:
    """Scores [b s h last-first] with -inf where a query may not look."""
    s = scores.shape[1]
    if mask is None:
        # only the last s tokens can lie in some query's future
        if s == 1 or last <= t - s + 1:
            return scores
        queries, keys = torch.arange(t - s, t, device=scores.device), torch.arange(first, last, device=scores.device)
        return scores.masked_fill((keys > queries[:, None])[:, None], -torch.inf)
    mask = mask[..., first:last].transpose(1, 2)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)


def expanded_attention(
    q_content: Tensor,  # [b s h n]
    q_rotary: Tensor,  # [b s h r]  rotated
    latents: Latents,  # t tokens
    w_uk: UpProjection,
    w_uv: UpProjection,
    *,
    mask: Tensor | None,
    scale: float,
) -> Tensor:  # [b s h v]
    """Latent attention by expanding the latents into keys and values, a block of heads at a time.

    Same arguments and, in exact arithmetic, same result as `absorbed_attention`; cheaper for many queries, since each
    score costs n + r and not c + r. Only one block of heads is ever expanded, so the memory above the result is
    bounded by ELEMENTS_PER_BLOCK elements or one head, and by this layer's latents where they are stored in codes.
    Source: DeepSeek-V2 (arXiv:2405.04434) eqs. 9-19.
    """
    batch, num_tokens, num_heads, _ = q_content.shape
    latent, k_rotary = latents.dense(batch)
    per_head = batch * latent.shape[1] * (q_content.shape[-1] + q_rotary.shape[-1])
    heads_per_block = min(max(ELEMENTS_PER_BLOCK // per_head, 1), num_heads)
    context = latent.new_empty(batch, num_tokens, num_heads, w_uv.weight.shape[1])
    for first in range(0, num_heads, heads_per_block):
        last = min(first + heads_per_block, num_heads)
        keys, values = (_expand_latents(latent, w.heads(first, last)) for w in (w_uk, w_uv))
        keys = torch.cat((keys, k_rotary[:, None].expand(-1, last - first, -1, -1)), dim=-1)
        queries = torch.cat((q_content[:, :, first:last], q_rotary[:, :, first:last]), dim=-1).transpose(1, 2)
        visible = mask[:, first:last] if mask is not None and mask.shape[1] > 1 else mask
        context[:, :, first:last] = fused_attention(queries, keys, values, mask=visible, scale=scale).transpose(1, 2)
    return context


def _expand_latents(latent: Tensor, w: UpProjection) -> Tensor:
    """[b t c] and [h m c] to [b h t m]."""
    weight = w.effective_weight()
    return torch.unflatten(F.linear(latent, weight.flatten(0, 1)), -1, weight.shape[:2]).transpose(1, 2)


def fused_attention(
    queries: Tensor,  # [b h s n+r]
    keys: Tensor,  # [b h t n+r]
    values: Tensor,  # [b h t v]
    *,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:  # [b h s v]
    """Scaled dot-product attention; on a CPU with its narrower side padded, so that no t x t matrix is made.

    There, with 192-wide keys and 128-wide values, torch falls back to explicit scores; zeros change no score and no
    value. On a GPU it has kernels for widths that differ.
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
        # of a query that may look nowhere, as padding is one, some kernels for GPUs make what is no zero
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
    """Attention with its weights in the open: what `attn_implementation="eager"` and `output_attentions` ask for."""
    mask = causal_mask(queries.shape[2], keys.shape[2], mask, keys.device)
    weights = masked_softmax(queries @ keys.mT, mask, scale).to(values.dtype)
    return F.dropout(weights, dropout) @ values, weights


def masked_softmax(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax over the last axis of `scores * scale` in float32 or wider; a row that may look nowhere gives zeros."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if mask is None:
        return scores.softmax(dim=-1)
    if mask.dtype != torch.bool:
        blind = (mask <= torch.finfo(mask.dtype).min).all(dim=-1, keepdim=True)
        return (scores + mask).masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)
    # the lowest finite number, not -inf: a row of -inf would be NaN before it is zeroed
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).masked_fill(~mask, 0.0)


def absorbing_is_cheaper(s: int, t: int, *, c: int, n: int, v: int) -> bool:
    """Whether s query tokens over t visible ones cost fewer products in the absorbed form.

    Absorbing costs s c (n + v) and scores and contexts of width 2c + r; expanding costs t c (n + v) and widths
    n + r + v, all per head. For t far above s this is s < c (n + v) / (2c - n - v), 171 at DeepSeek-V2's widths;
    with nothing cached (s = t) expanding wins at every length.
    """
    return s * t * (2 * c - n - v) < (t - s) * c * (n + v)
