"""Perplexities of a real model, converted and quantized: python -m benchmarks.real_model FOLDER

FOLDER is what `make real` prepares: `llama` (SmolLM2-135M-Instruct), `mla` (its exact conversion) and `texts`. Every
reader sees the same evenly spaced windows of two held-out texts. Models are compared on whole windows, caches on the
second halves of windows, which are read over the rows that the first halves left. A ratio is that of perplexities on
the same tokens, with the standard error of the mean of the differences between windows.

`--out benchmarks/results/real_model.json` writes the result there, and `python -m benchmarks.real_card FOLDER` then
writes it into the model's card.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from deepseek_latent import LatentCache
from deepseek_latent.cache.format import CACHE_DTYPES
from deepseek_latent.conversion.compression_report import build_model
from deepseek_latent.conversion.gqa_to_mla import GqaToMla
from deepseek_latent.conversion.source import Source
from deepseek_latent.conversion.text import WINDOW_LENGTH, tokenize
from deepseek_latent.conversion.upcycle import Upcycle

from .machine import described

TEXTS = {"Wikipedia": "wiki_eval.txt", "Python's help": "pydoc_eval.txt"}
UPCYCLES = {
    "M0": {"e": 2, "shared": 4, "k": 1, "groups": 1},
    "M5": {"e": 4, "shared": 2, "k": 2, "groups": 2},
}
WINDOWS_AT_ONCE = 4


@torch.no_grad()
def nats(model: PreTrainedModel, windows: Tensor, new_cache=None) -> Tensor:
    """The mean loss of each window [b]; with `new_cache`, of its second half, read from a cache in two parts."""
    losses = []
    for ids in windows.split(WINDOWS_AT_ONCE):
        if new_cache is None:
            targets, logits = ids[:, 1:], model(ids[:, :-1], use_cache=False).logits
        else:
            cache, half = new_cache(), ids.shape[1] // 2
            model(ids[:, :half], cache=cache, logits_to_keep=1)
            targets, logits = ids[:, half + 1 :], model(ids[:, half:-1], cache=cache).logits
        loss = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        losses.append(loss.mean(dim=1))
    return torch.cat(losses)


def compared(name: str, found: dict[str, Tensor], base: dict[str, Tensor]) -> dict:
    """A row: for each text the perplexity, its ratio to that of `base`, and the ratio's standard error."""
    row = {"what": name}
    for text, losses in found.items():
        difference = losses - base[text]
        ratio = difference.mean().exp().item()
        row[text] = {
            "perplexity": round(losses.mean().exp().item(), 3),
            "ratio": round(ratio, 5),
            "standard_error": round(ratio * difference.std().item() / len(difference) ** 0.5, 5),
        }
    return row


def upcycled(llama: Path, scheme: str, layout: dict) -> PreTrainedModel:
    return build_model(Upcycle(GqaToMla(Source(llama)), scheme, **layout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--windows", type=int, default=48, help="windows of each text; default: 48, if it is so long")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    llama, mla = options.folder / "llama", options.folder / "mla"
    windows = {}
    for text, file in TEXTS.items():
        ids = tokenize(llama, (options.folder / "texts" / file).read_text(encoding="utf-8"))[0]
        every = ids[: len(ids) // WINDOW_LENGTH * WINDOW_LENGTH].view(-1, WINDOW_LENGTH)
        chosen = torch.linspace(0, len(every) - 1, min(options.windows, len(every))).round().long()
        windows[text] = every[chosen]
    loaders = {
        "source, Llama": lambda: AutoModelForCausalLM.from_pretrained(llama),
        "latent attention, exact": lambda: AutoModelForCausalLM.from_pretrained(mla),
    }
    for scheme, layout in UPCYCLES.items():
        loaders[f"experts, {scheme}"] = partial(upcycled, llama, scheme, layout)
    models, base = [], None
    for name, load in track(loaders.items(), "models"):
        model = load().eval()
        found = {text: nats(model, ids) for text, ids in windows.items()}
        base = base or found
        models.append(compared(name, found, base))
        print(json.dumps(models[-1]), flush=True)
        del model
    model, caches, base = AutoModelForCausalLM.from_pretrained(mla).eval(), [], None
    for cache_dtype in track(CACHE_DTYPES, "caches"):
        found = {
            text: nats(model, ids, lambda kind=cache_dtype: LatentCache(model.config, cache_dtype=kind))
            for text, ids in windows.items()
        }
        base = base or found
        caches.append(compared(cache_dtype or "as the model computes", found, base))
        print(json.dumps(caches[-1]), flush=True)
    result = described("python -m benchmarks.real_model .real") | {
        "model": "SmolLM2-135M-Instruct, 4-bit weights dequantized to float32",
        "windows": {text: len(ids) for text, ids in windows.items()},
        "window_length": WINDOW_LENGTH,
        "models": models,
        "caches": caches,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
