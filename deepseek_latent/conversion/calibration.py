"""What a model does with some text: what an error in a layer costs, and how well the text is predicted.

Letters: b windows, s tokens of one, d model width, h query heads.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

WINDOW = 256  # tokens that are read at a time
CALIBRATED, JUDGED = 128, 32  # windows at most
_AT_ONCE = 4  # windows


class LayerStatistics(NamedTuple):
    """What attention of one layer meets, float64.

    moments    [d+1 d+1]  mean of x x^T over tokens, where x is the normalised input of the layer and a one behind it
    distances  [h WINDOW]  mean share of its attention that a head gives to the token so far behind
    """

    moments: Tensor
    distances: Tensor


def windows_of(folder: Path, text: str) -> tuple[Tensor, Tensor]:
    """Windows [b WINDOW] of a text by the tokenizer in `folder`: those to calibrate on, and every fifth to judge by.

    Raises ValueError without a tokenizer, and for a text of fewer than five windows.
    """
    ids = tokenized(folder, text)[0]
    num_windows = len(ids) // WINDOW
    if num_windows < 5:
        raise ValueError(f"expected a text of at least {5 * WINDOW:,} tokens to calibrate on, got {len(ids):,}.")
    windows = ids[: num_windows * WINDOW].view(num_windows, WINDOW)
    is_judge = torch.arange(num_windows) % 5 == 4
    return _spread(windows[~is_judge], CALIBRATED), _spread(windows[is_judge], JUDGED)


def text_of(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8, got {file}.") from error
    if not text.strip():
        raise ValueError(f"expected a text, got {file}, which is empty.")
    return text


def tokenized(folder: Path, text: str) -> Tensor:
    """Ids [1 s] of a text by the tokenizer in `folder`; ValueError if there is none."""
    if not any(folder.glob("tokenizer*")):
        raise ValueError(f"a text needs a tokenizer to be read by, and there is none in {folder}.")
    return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False)["input_ids"]


def _spread(windows: Tensor, most: int) -> Tensor:
    """At most so many of them, from everywhere."""
    return windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()]


@torch.no_grad()
def statistics_of(model: PreTrainedModel, windows: Tensor) -> list[LayerStatistics]:
    """Of every layer of a Llama-like model whose attention is computed eagerly, over windows [b WINDOW]."""
    d, h = model.config.hidden_size, model.config.num_attention_heads
    found = [
        LayerStatistics(torch.zeros(d + 1, d + 1, dtype=torch.float64), torch.zeros(h, WINDOW, dtype=torch.float64))
        for _ in model.model.layers
    ]

    def look(layer: LayerStatistics):
        def hook(module, args, kwargs, output):
            x = kwargs["hidden_states"].flatten(0, 1).double()
            x = torch.nn.functional.pad(x, (0, 1), value=1.0)
            layer.moments.add_(x.T @ x / windows.numel())
            for distance in range(WINDOW):
                shares = output[1].diagonal(-distance, dim1=2, dim2=3).double().sum(dim=(0, 2))
                layer.distances[:, distance] += shares / windows.numel()

        return hook

    handles = [
        layer.self_attn.register_forward_hook(look(into), with_kwargs=True)
        for layer, into in zip(model.model.layers, found)
    ]
    for some in tqdm(windows.split(_AT_ONCE), desc="calibrating"):
        model(some, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """exp of the mean cross-entropy of every token of windows [b s] but the first of each."""
    total = 0.0
    for some in windows.split(_AT_ONCE):
        logits = model(some, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum").item()
    mean = total / windows[:, 1:].numel()
    if not math.isfinite(mean):
        raise ValueError(f"{type(model).__name__} gives logits that are no numbers; take a wider dtype.")
    return math.exp(mean)
