"""Measures a model on a text: the statistics that compression needs from each layer, and the perplexity.

Letters: b windows, s tokens per window, d model width, h query heads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .text import WINDOW_LENGTH

WINDOWS_PER_BATCH = 4


class LayerStatistics(NamedTuple):
    """Statistics of one attention layer over a text, in float64.

    moments    [d+1 d+1]  mean of x x^T over tokens, where x is the normalized input of the layer with a 1 appended
    distances  [h WINDOW_LENGTH]  mean attention weight that a head gives to the token at each distance back
    first_token  [d+1]  mean of x at the first token of a window
    """

    moments: Tensor
    distances: Tensor
    first_token: Tensor


@torch.no_grad()
def collect_statistics(
    model: PreTrainedModel,
    windows: Tensor,  # [b WINDOW_LENGTH]
) -> list[LayerStatistics]:
    """Statistics of every layer of a Llama-like model with eager attention."""
    d, h = model.config.hidden_size, model.config.num_attention_heads
    statistics = [
        LayerStatistics(
            torch.zeros(d + 1, d + 1, dtype=torch.float64),
            torch.zeros(h, WINDOW_LENGTH, dtype=torch.float64),
            torch.zeros(d + 1, dtype=torch.float64),
        )
        for _ in model.model.layers
    ]

    def accumulate(layer: LayerStatistics):
        def hook(module, args, kwargs, output):
            x = kwargs["hidden_states"].flatten(0, 1).double()
            x = torch.nn.functional.pad(x, (0, 1), value=1.0)
            layer.moments.add_(x.T @ x / windows.numel())
            layer.first_token.add_(x[:: windows.shape[1]].sum(dim=0) / len(windows))
            for distance in range(WINDOW_LENGTH):
                weights = output[1].diagonal(-distance, dim1=2, dim2=3).double().sum(dim=(0, 2))
                layer.distances[:, distance] += weights / windows.numel()

        return hook

    handles = [
        layer.self_attn.register_forward_hook(accumulate(of_layer), with_kwargs=True)
        for layer, of_layer in zip(model.model.layers, statistics)
    ]
    for batch in tqdm(windows.split(WINDOWS_PER_BATCH), desc="calibrating"):
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return statistics


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    windows: Tensor,  # [b s]
) -> float:
    """exp of the mean cross-entropy of every token but the first of each window."""
    total = 0.0
    for batch in windows.split(WINDOWS_PER_BATCH):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    mean = total / windows[:, 1:].numel()
    if not math.isfinite(mean):
        raise ValueError(f"expected finite logits from {type(model).__name__}, got NaN or infinity; use a wider dtype.")
    return math.exp(mean)
