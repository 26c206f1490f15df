"""Latent attention as pure functions: the absorbed form, the expanded form, and which of them is cheaper.

A mask is None (causal, the last query token attends to all t), boolean (True where a query may attend) or additive, of
shape [b 1 s t] or [b h s t].
Letters: b batch, s query tokens, t all visible tokens, t' tokens of one block, h heads, n content, r rotary, v value
width, c latent width, k rank of a LoRA adapter. sh stands for s times h, as one axis.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from ..cache.segments import Latents
from .sdpa import fused_attention

# the most elements that one block may allocate for scores, and for widened latents or expanded keys or values
SCORES_PER_BLOCK = 1 << 24
ELEMENTS_PER_BLOCK = 1 << 25
# cached tokens in one block on a CPU: 1024 of them, widened to float32, stay in a core's cache
TOKENS_PER_BLOCK = 1 << 10


class UpProjection(NamedTuple):
    """W^UK or W^UV per head: a weight and, for each LoRA adapter on it, two factors.

    weight   [h m c]   m is n for keys and v for values
    factors  pairs (B [h m k], A [k c]), with the adapter's scaling in B; the projection is weight + sum of B A
    """

    weight: Tensor
    factors: tuple[tuple[Tensor, Tensor], ...] = ()

    def absorb(self, x: Tensor) -> Tensor:
        """x W: maps [b s h m] to [b s h c], in the dtype of x."""
        return self.with_adapters_absorbed(_multiply_per_head(x, self.weight), x)

    def with_adapters_absorbed(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds the adapters' part of `absorb(x)` to y [b s h c], the weight's part."""
        for b, a in self.factors:
            y = y + torch.einsum("bshm,hmk->bshk", x.to(b.dtype), b).matmul(a).to(y.dtype)
        return y

    def expand(self, x: Tensor) -> Tensor:
        """W x: maps latent contexts [b s h c] to [b s h m], in the dtype of x."""
        return self.with_adapters_expanded(_multiply_per_head(x, self.weight.mT), x)

    def with_adapters_expanded(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds the adapters' part of `expand(x)` to y [b s h m], the weight's part."""
        for b, a in self.factors:
            y = y + torch.einsum("bshk,hmk->bshm", x.to(a.dtype).matmul(a.T), b).to(y.dtype)
        return y

    def heads(self, first: int, last: int) -> "UpProjection":
        return UpProjection(self.weight[first:last], tuple((b[first:last], a) for b, a in self.factors))

    def merged_weight(self) -> Tensor:
        """The weight [h m c] with every adapter added."""
        weight = self.weight
        for b, a in self.factors:
            weight = (weight + torch.einsum("hmk,kc->hmc", b, a)).to(self.weight.dtype)
        return weight


def absorbed_attention(
    q_content: Tensor,  # [b s h n]
    q_rotary: Tensor,  # [b s h r]  rotated
    latents: Latents,  # t tokens: cached latents, after kv_a_layernorm, and rotated keys, one for all heads
    w_uk: UpProjection,
    w_uv: UpProjection,
    *,
    mask: Tensor | None,
    scale: float,
) -> Tensor:  # [b s h v]
    """Latent attention that never expands the cache into keys and values.

    Moves the key up-projection onto the query and the value up-projection onto the result, because
    q . (W_UK c) = (q W_UK) . c. It equals `expanded_attention` in exact arithmetic and is cheaper for few queries,
    since no term costs t h c (n + v). Cached tokens are read once, a block at a time, with a running softmax.

    Scores, softmax and the sum of latents are computed in float32, since sums of c terms in half precision would
    round several times as much as the expanded form. The result has the dtype of the queries.
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.1.2 and Appendix C, eqs. 37-47.
    """
    queries = torch.cat((w_uk.absorb(q_content), q_rotary), dim=-1)  # [b s h c+r]
    # autocast would compute these products in half precision
    with maybe_autocast(queries.device.type, enabled=False):
        if queries.device.type == "cpu":
            accumulator = torch.promote_types(queries.dtype, torch.float32)
            context = _attend_to_blocks(queries.to(accumulator) * scale, latents, mask, w_uv.weight.shape[-1])
        else:
            context = _attend_to_blocks(queries, latents, mask, w_uv.weight.shape[-1], scale)
    return w_uv.expand(context.to(queries.dtype))


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
    """Latent attention that expands the latents into keys and values, a block of heads at a time.

    It has the arguments and, in exact arithmetic, the result of `absorbed_attention`, and is cheaper for many queries,
    since each score costs n + r and not c + r. Only one block of heads is expanded at a time, so the memory beside the
    result is at most ELEMENTS_PER_BLOCK elements or one head, and this layer's latents if they are quantized.
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


def absorbing_is_cheaper(s: int, t: int, *, c: int, n: int, v: int) -> bool:
    """True if the absorbed form takes fewer multiplications for s query tokens over t visible ones.

    Per head, absorbing costs s c (n + v), and 2c + r for each score and its part of the context; expanding costs
    t c (n + v), and n + r + v. If t is much larger than s, absorbing is cheaper for s < c (n + v) / (2c - n - v), which
    is 171 at DeepSeek-V2's widths. If nothing is cached (s = t), expanding is cheaper at every length.
    """
    return s * t * (2 * c - n - v) < (t - s) * c * (n + v)


def _multiply_per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies [b s h i] by [h i o] to [b s h o], in the dtype of x.

    On a CPU the product is computed in float32, since half precision takes up to three times as long.
    """
    wide = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    product = torch.bmm(x.flatten(0, 1).transpose(0, 1).to(wide), weight.to(wide))
    return torch.unflatten(product.transpose(0, 1), 0, x.shape[:2]).to(x.dtype)


def _expand_latents(latent: Tensor, w: UpProjection) -> Tensor:
    """Maps latents [b t c] to keys or values [b h t m]."""
    weight = w.merged_weight()
    return torch.unflatten(F.linear(latent, weight.flatten(0, 1)), -1, weight.shape[:2]).transpose(1, 2)


def _attend_to_blocks(queries: Tensor, latents: Latents, mask: Tensor | None, c: int, scale: float = 1.0) -> Tensor:
    """Maps queries [b s h c+r] to weighted sums of latents [b s h c]; zeros for a query that is masked everywhere.

    Latents are multiplied in the dtype of the queries, and summed in float32 or wider.

    Each block yields its largest score, and its total and context in units of exp(largest score); several blocks are
    merged at once. Source: Milakov and Gimelshein, arXiv:1805.02867, section 3.1.
    """
    (b, s, h, _), t = queries.shape, latents.num_tokens
    # all heads read the same latents, so every token and head is a row of one product
    rows = queries.flatten(1, 2)
    first, parts, lowest = 0, [], torch.finfo(torch.float32).min
    per_block = _tokens_per_block(rows, latents)
    for block in latents.blocks(per_block, rows.dtype):
        last = first + block.shape[1]
        scores = _scores(rows, block) if scale == 1 else _scores(rows, block).mul_(scale)
        # only the last s tokens can come after a query
        if mask is not None or (s > 1 and last > t - s + 1):
            scores = _mask_scores(torch.unflatten(scores, 1, (s, h)), mask, first, last, t).flatten(1, 2)
        if last == t and not parts and mask is None:
            # there is one block and every query attends to part of it, so torch's own softmax will do
            return torch.unflatten(_weighted_sum(scores.softmax(dim=-1), block[..., :c]), 1, (s, h))
        # finite, so that a row that is masked in all of this block gives zeros and not NaN
        largest = scores.amax(dim=-1, keepdim=True).clamp(min=lowest)
        weights = (scores - largest).exp_()
        parts.append((largest, weights.sum(dim=-1, keepdim=True), _weighted_sum(weights, block[..., :c])))
        if len(parts) * b * s * h * c > ELEMENTS_PER_BLOCK:
            parts = [_merge_blocks(parts)]
        first = last
    _, total, context = _merge_blocks(parts)
    return torch.unflatten(context / total.where(total > 0, 1.0), 1, (s, h))


def _merge_blocks(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Merges (largest score [b sh 1], total [b sh 1], context [b sh c]) of several blocks into those of one."""
    if len(parts) == 1:
        return parts[0]
    largest, total, context = (torch.stack(x) for x in zip(*parts))
    rescale = (largest - largest.amax(dim=0)).exp_()
    return largest.amax(dim=0), (total * rescale).sum(dim=0), (context * rescale).sum(dim=0)


def _tokens_per_block(rows: Tensor, latents: Latents) -> int:
    b, num_rows, width = rows.shape
    most = max(SCORES_PER_BLOCK // (b * num_rows), 1)
    if rows.device.type == "cpu":
        return min(TOKENS_PER_BLOCK, most)
    # each block takes more launches, so what takes no memory is one block
    if _multiplies_as_it_is(rows) and latents.is_read_in_place(rows.dtype):
        return most
    return min(max(ELEMENTS_PER_BLOCK // (b * width), 1), most)


def _scores(rows: Tensor, block: Tensor) -> Tensor:
    """Multiplies queries [b sh c+r] by tokens [b t' c+r] to [b sh t']; tokens [1 t' c+r] take one product for all b."""
    if block.shape[0] != rows.shape[0]:
        return _scores(rows.flatten(0, 1)[None], block).view(*rows.shape[:2], -1)
    if rows.device.type != "cpu":
        return _product_in_float32(rows, block.mT)
    # a CPU multiplies many tokens by few queries faster than few queries by many tokens
    return torch.bmm(block, rows.mT).mT.contiguous()


def _weighted_sum(weights: Tensor, block: Tensor) -> Tensor:
    """Multiplies weights [b sh t'] by latents [b t' c] to [b sh c]; latents [1 t' c] take one product for all b."""
    if block.shape[0] != weights.shape[0]:
        return _weighted_sum(weights.flatten(0, 1)[None], block).view(*weights.shape[:2], -1)
    return _product_in_float32(weights.to(block.dtype), block)


def _multiplies_as_it_is(x: Tensor) -> bool:
    """Whether `_product_in_float32` makes no wider copy of x."""
    return x.device.type in ("cuda", "meta") or x.dtype not in (torch.bfloat16, torch.float16)


def _product_in_float32(x: Tensor, y: Tensor) -> Tensor:
    """Multiplies two batches of matrices into float32 or wider; a GPU takes inputs in half precision as they are."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype != wide and _multiplies_as_it_is(x):
        return torch.bmm(x, y, out_dtype=wide)
    return torch.bmm(x.to(wide), y.to(wide))


def _mask_scores(scores: Tensor, mask: Tensor | None, first: int, last: int, t: int) -> Tensor:
    """Scores [b s h last-first] with -inf where a query may not attend."""
    s = scores.shape[1]
    if mask is None:
        queries, keys = torch.arange(t - s, t, device=scores.device), torch.arange(first, last, device=scores.device)
        return scores.masked_fill((keys > queries[:, None])[:, None], -torch.inf)
    mask = mask[..., first:last].transpose(1, 2)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
