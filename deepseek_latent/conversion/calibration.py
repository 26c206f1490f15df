"""Measures a model on a text: the statistics that compression needs from each layer, and the perplexity.

Letters: b windows, s tokens per window, d model width, h query heads, g key heads, w width of a head.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .llama_source import LlamaSource
from .progress import track
from .text import WINDOW_LENGTH

WINDOWS_PER_BATCH = 4
MAX_STATISTICS_BYTES = 4 * 2**30
# every fourth token tells the mean inputs of heads, which are as many as tokens times heads
QUERY_STRIDE = 4


class LayerStatistics(NamedTuple):
    """Statistics of one attention layer over a text, to first order the costs of errors in its keys and values.

    x is the normalized input of the layer with a 1 appended, p_ij the weight that token i gives to token j, and o_i
    what a head returns for token i. An error of a value v_j changes o_i by p_ij times it, and an error of a score by
    p_ij (v_j - o_i) times it. The square of the latter, after `o_proj`, is the cost of a pair.

    moments        [d+1 d+1]  mean of x x^T over tokens
    value_moments  [g d+1 d+1]  the same of the mean inputs that a key head's queries attend to, sum_j p_ij x_j,
                              each query head weighted by the size of its `o_proj`
    key_moments    [g d+1 d+1]  the same of the tokens attended to, weighted by the costs of their pairs
    query_moments  [h w w]    sums of q q^T per token, weighted by the costs of their pairs
    distances      [h WINDOW_LENGTH]  costs of the pairs at each distance back, per token
    first_token    [d+1]  mean of x at the first token of a window
    """

    moments: Tensor
    value_moments: Tensor
    key_moments: Tensor
    query_moments: Tensor
    distances: Tensor
    first_token: Tensor


class Calibration:
    """Statistics of every layer on a text, in float64: `calibration[layer]`.

    They are collected when they are first read, for as many layers at a time as MAX_STATISTICS_BYTES hold, so read
    them in the order of the layers. `model` is that of `source`, with eager attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: LlamaSource,
        windows: Tensor,  # [b WINDOW_LENGTH]
    ):
        self.model, self.source, self.windows = model, source, windows
        num_bytes = 8 * (1 + 2 * source.g) * (source.d + 1) ** 2
        self._layers_at_a_time = max(1, MAX_STATISTICS_BYTES // num_bytes)
        self._held: dict[int, LayerStatistics] = {}

    def __len__(self) -> int:
        return self.source.config.num_hidden_layers

    def __getitem__(self, layer: int) -> LayerStatistics:
        if layer not in self._held:
            start = layer // self._layers_at_a_time * self._layers_at_a_time
            # the memory of those held is free before more are collected
            self._held = {}
            self._held = self._collect(range(start, min(start + self._layers_at_a_time, len(self))))
        return self._held[layer]

    @torch.no_grad()
    def _collect(self, layers: range) -> dict[int, LayerStatistics]:
        collected = {layer: _empty_statistics(self.source) for layer in layers}
        attention = [layer.self_attn for layer in self.model.model.layers]
        handles = [
            attention[layer].register_forward_hook(
                _accumulate_into(statistics, self.source, layer, self.windows.numel()), with_kwargs=True
            )
            for layer, statistics in collected.items()
        ]
        text = "calibrating" if len(layers) == len(self) else f"calibrating layers {layers.start} to {layers.stop - 1}"
        for batch in track(self.windows.split(WINDOWS_PER_BATCH), text):
            self.model.model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        return collected


def _empty_statistics(source: LlamaSource) -> LayerStatistics:
    d, h, g, w = source.d + 1, source.h, source.g, source.w
    shapes = ((d, d), (g, d, d), (g, d, d), (h, w, w), (h, WINDOW_LENGTH), (d,))
    return LayerStatistics(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def _accumulate_into(statistics: LayerStatistics, source: LlamaSource, layer: int, num_tokens: int):
    """A forward hook of an attention layer, which adds what a batch contributes."""
    h, g, w = source.h, source.g, source.w
    query, value = source.affine(layer, "q_proj").float(), source.affine(layer, "v_proj").float()
    forms = output_forms(source, layer).float()
    head_sizes = forms.diagonal(dim1=1, dim2=2).sum(dim=1).sqrt()[:, None, None]

    def hook(module, args, kwargs, output):
        x = torch.nn.functional.pad(kwargs["hidden_states"].float(), (0, 1), value=1.0)  # [b s d+1]
        weights = output[1].float()  # [b h s s]
        queries = (x @ query.T).unflatten(2, (h, w)).transpose(1, 2)
        values = (x @ value.T).unflatten(2, (g, w)).transpose(1, 2).repeat_interleave(h // g, dim=1)
        costs = weights.square() * _spread(values, weights @ values, forms)
        attended = weights[:, :, ::QUERY_STRIDE] @ x[:, None] * head_sizes
        statistics.moments.add_(_moments(x) / num_tokens)
        statistics.first_token.add_(x[:, 0].double().sum(dim=0) * (x.shape[1] / num_tokens))
        of_tokens = costs.sum(dim=2).unflatten(1, (g, -1)).sum(dim=2).sqrt()  # [b g s]
        for head, heads in enumerate(attended.split(h // g, dim=1)):
            statistics.value_moments[head].add_(_moments(heads) / num_tokens)
            statistics.key_moments[head].add_(_moments(x * of_tokens[:, head, :, None]) / num_tokens)
        weighted = queries * costs.sum(dim=3, keepdim=True).sqrt()
        statistics.query_moments.add_(torch.einsum("bhsw,bhsu->hwu", weighted, weighted).double() / num_tokens)
        s = x.shape[1]
        distance = (torch.arange(s)[:, None] - torch.arange(s)).clamp(min=0)  # costs of later tokens are zero
        of_pairs = costs.sum(dim=0).flatten(1)
        statistics.distances.scatter_add_(1, distance.flatten().expand_as(of_pairs), of_pairs.double() / num_tokens)

    return hook


def _spread(values: Tensor, returned: Tensor, forms: Tensor) -> Tensor:
    """[b h s s]: the square of what `o_proj` makes of v_j - o_i, for values and returned values [b h s w]."""
    of_values, of_returned = values @ forms, returned @ forms
    squares = (values * of_values).sum(dim=-1)[:, :, None, :] + (returned * of_returned).sum(dim=-1)[..., None]
    return (squares - 2 * returned @ of_values.transpose(2, 3)).clamp(min=0)


def _moments(x: Tensor) -> Tensor:
    # in float64, since directions that the text hardly shows must not drown in rounding
    x = x.flatten(0, -2).double()
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
    for batch in track(windows.split(WINDOWS_PER_BATCH), "measuring the perplexity"):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    mean = total / windows[:, 1:].numel()
    if not math.isfinite(mean):
        raise ValueError(f"expected finite logits from {type(model).__name__}, got NaN or infinity; use a wider dtype.")
    return math.exp(mean)
