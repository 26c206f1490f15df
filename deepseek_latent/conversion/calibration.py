"""Measures a model on a text: the statistics that compression needs from each layer, and the perplexity.

Letters: b windows, s tokens per window, d model width, h query heads, g key heads, w width of a head.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .llama_source import LlamaSource
from .text import WINDOW_LENGTH

WINDOWS_PER_BATCH = 4
# every fourth token tells the mean inputs of heads, which are as many as tokens times heads
QUERY_STRIDE = 4


class LayerStatistics(NamedTuple):
    """Statistics of one attention layer over a text, to first order the costs of errors in its keys and values.

    x is the normalized input of the layer with a 1 appended, p_ij the weight that token i gives to token j, and o_i
    what a head returns for token i. An error of a value v_j changes o_i by p_ij times it, and an error of a score by
    p_ij (v_j - o_i) times it. The square of the latter, after `o_proj`, is the cost of a pair.

    moments        [d+1 d+1]  mean of x x^T over tokens
    value_moments  [d+1 d+1]  the same of the mean inputs that heads attend to, sum_j p_ij x_j, weighted by `o_proj`
    key_moments    [d+1 d+1]  the same of the tokens attended to, weighted by the costs of their pairs
    query_moments  [h w w]    sums of q q^T per token, weighted by the costs of their pairs
    distances      [h WINDOW_LENGTH]  costs of the pairs at each distance back, per token
    """

    moments: Tensor
    value_moments: Tensor
    key_moments: Tensor
    query_moments: Tensor
    distances: Tensor


@torch.no_grad()
def collect_statistics(
    model: PreTrainedModel,
    source: LlamaSource,
    windows: Tensor,  # [b WINDOW_LENGTH]
) -> list[LayerStatistics]:
    """Statistics of every layer in float32. `model` is that of `source`, with eager attention."""
    statistics = [_empty_statistics(source) for _ in model.model.layers]
    handles = [
        layer.self_attn.register_forward_hook(
            _accumulate_into(statistics[i], source, i, windows.numel()), with_kwargs=True
        )
        for i, layer in enumerate(model.model.layers)
    ]
    for batch in tqdm(windows.split(WINDOWS_PER_BATCH), desc="calibrating"):
        model.model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return statistics


def _empty_statistics(source: LlamaSource) -> LayerStatistics:
    moments = [torch.zeros(source.d + 1, source.d + 1) for _ in range(3)]
    return LayerStatistics(*moments, torch.zeros(source.h, source.w, source.w), torch.zeros(source.h, WINDOW_LENGTH))


def _accumulate_into(statistics: LayerStatistics, source: LlamaSource, layer: int, num_tokens: int):
    """A forward hook of an attention layer, which adds what a batch contributes."""
    h, w = source.h, source.w
    of_head = torch.arange(h) // (h // source.g)
    query, value = source.affine(layer, "q_proj").float(), source.affine(layer, "v_proj").float()
    forms = output_forms(source, layer).float()  # [h w w]
    head_shares = forms.diagonal(dim1=1, dim2=2).sum(dim=1)
    head_shares = head_shares / head_shares.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def hook(module, args, kwargs, output):
        x = torch.nn.functional.pad(kwargs["hidden_states"].float(), (0, 1), value=1.0)  # [b s d+1]
        weights = output[1].float()  # [b h s s]
        queries = (x @ query.T).unflatten(2, (h, w)).transpose(1, 2)
        values = (x @ value.T).unflatten(2, (source.g, w)).transpose(1, 2)[:, of_head]
        returned = weights @ values
        costs = weights.square() * _spread(values, returned, forms)
        attended = (weights[:, :, ::QUERY_STRIDE] @ x[:, None]) * head_shares.sqrt()[:, None, None]
        statistics.moments.add_(_moments(x) / num_tokens)
        statistics.value_moments.add_(_moments(attended) * (QUERY_STRIDE / num_tokens))
        statistics.key_moments.add_(_moments(x * costs.sum(dim=(1, 2))[..., None].sqrt()) / num_tokens)
        weighted = queries * costs.sum(dim=3, keepdim=True).sqrt()
        statistics.query_moments.add_(torch.einsum("bhsw,bhsu->hwu", weighted, weighted) / num_tokens)
        s = x.shape[1]
        distance = (torch.arange(s)[:, None] - torch.arange(s)).clamp(min=0)  # costs of later tokens are zero
        per_head = costs.sum(dim=0).flatten(1)
        statistics.distances.scatter_add_(1, distance.flatten().expand_as(per_head), per_head / num_tokens)

    return hook


def _spread(values: Tensor, returned: Tensor, forms: Tensor) -> Tensor:
    """[b h s s]: the square of what `o_proj` makes of v_j - o_i, for values and returned values [b h s w]."""
    of_values, of_returned = values @ forms, returned @ forms
    squares = (values * of_values).sum(dim=-1)[:, :, None, :] + (returned * of_returned).sum(dim=-1)[..., None]
    return (squares - 2 * returned @ of_values.transpose(2, 3)).clamp(min=0)


def _moments(x: Tensor) -> Tensor:
    x = x.flatten(0, -2)
    return x.T @ x


def output_forms(source: LlamaSource, layer: int) -> Tensor:
    """[h w w] in float64: the square of what `o_proj` makes of a head's values, as a quadratic form."""
    out = source.weight(layer, "o_proj").double().unflatten(1, (source.h, source.w)).permute(1, 0, 2)
    return out.transpose(1, 2) @ out


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    windows: Tensor,  # [b s]
) -> float:
    """exp of the mean cross-entropy of every token but the first of each window."""
    total = 0.0
    for batch in tqdm(windows.split(WINDOWS_PER_BATCH), desc="measuring the perplexity"):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    mean = total / windows[:, 1:].numel()
    if not math.isfinite(mean):
        raise ValueError(f"expected finite logits from {type(model).__name__}, got NaN or infinity; use a wider dtype.")
    return math.exp(mean)
