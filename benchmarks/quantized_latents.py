"""Perplexity with latents in fewer bits: python -m benchmarks.quantized_latents FOLDER ... --text FILE ...

Each FOLDER is a DeepSeek-V2 checkpoint with its tokenizer, for instance one that `deepseek-latent convert gqa-to-mla`
wrote. Windows of 256 tokens, evenly spaced in each text, are read with a LatentCache, in which a token is quantized
before anything reads it. Changes are against the cache in the model's dtype, on the same tokens; their standard errors
come from the windows' means.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepseek_latent import LatentCache
from deepseek_latent.cache.format import CACHE_DTYPES
from deepseek_latent.conversion.text import WINDOW_LENGTH, read_text, tokenize

from .machine import described

WINDOWS_PER_BATCH = 4


def windows_of(folder: Path, text: Path, most: int) -> Tensor:
    """At most `most` windows [b WINDOW_LENGTH] of a text, evenly spaced."""
    ids = tokenize(folder, read_text(text))[0]
    windows = ids[: len(ids) // WINDOW_LENGTH * WINDOW_LENGTH].view(-1, WINDOW_LENGTH)
    return windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()]


@torch.no_grad()
def nats(model: PreTrainedModel, windows: Tensor, cache_dtype: str | None) -> tuple[Tensor, int]:
    """Mean nats per token of each window [b], and bytes of the cache per token and layer."""
    means, num_bytes = [], 0
    for ids in windows.split(WINDOWS_PER_BATCH):
        cache = LatentCache(model.config, cache_dtype=cache_dtype)
        logits = model(ids, cache=cache).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        means.append(losses.view(len(ids), -1).mean(dim=1))
        num_bytes = cache.nbytes // (ids.numel() * len(cache.layers))
    return torch.cat(means), num_bytes


def measure(model: PreTrainedModel, windows: Tensor, cache_dtypes: list[str]) -> list[dict]:
    """One row for the cache in the model's dtype, and one for each of `cache_dtypes`."""
    exact, rows = None, []
    for cache_dtype in (None, *cache_dtypes):
        of_windows, num_bytes = nats(model, windows, cache_dtype)
        exact = of_windows if exact is None else exact
        change = of_windows - exact
        rows.append(
            {
                "cache_dtype": cache_dtype,
                "bytes_per_token_and_layer": num_bytes,
                "perplexity": round(math.exp(of_windows.mean()), 3),
                "change_percent": round(100 * math.expm1(change.mean()), 3),
                "standard_error_percent": round(100 * change.std().item() / len(change) ** 0.5, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--windows", type=int, default=32, help="at most this many of each text")
    parser.add_argument("--cache-dtypes", nargs="+", choices=CACHE_DTYPES[1:], default=list(CACHE_DTYPES[1:]))
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    result = described("python -m benchmarks.quantized_latents") | {"rows": []}
    for folder in options.folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        widths = {name: getattr(model.config, name) for name in ("kv_lora_rank", "qk_rope_head_dim")}
        widths["num_unquantized_channels"] = model.config.num_unquantized_channels
        for text in options.text:
            for row in measure(model, windows_of(folder, text, options.windows), options.cache_dtypes):
                result["rows"].append({"model": folder.name, "text": text.name} | widths | row)
                print(json.dumps(result["rows"][-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
