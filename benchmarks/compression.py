"""Perplexity against the size of the cache: python -m benchmarks.compression FOLDER

FOLDER is a Llama made by `python -m benchmarks.llama FOLDER`, or any other with a `held_out.txt`. Its attention is
compressed to latents of several sizes, without training after it, by this package and by the recipe of TransMLA
(arXiv:2502.07864, as in its code): real rotations of neighboring frequencies, evenly spaced frequencies that keep their
rotation, keys and values balanced by their norms, no means. Both get the same calibration tokens, the same widths and
the same constant channel. `--out benchmarks/results/compression.json` writes the result there, with a plot beside it.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from deepseek_latent.conversion.calibration import collect_statistics, perplexity
from deepseek_latent.conversion.compress import CompressedLayer, CompressedMla, LayerParts
from deepseek_latent.conversion.compression_report import build_model
from deepseek_latent.conversion.source import Source
from deepseek_latent.conversion.text import split_into_windows

from .machine import described

# rotary width and latent width, as fractions of the width of keys and values together
WIDTHS = [(1 / 4, 1 / 2), (1 / 8, 3 / 8), (1 / 8, 1 / 4), (1 / 8, 1 / 8), (1 / 16, 3 / 16), (1 / 16, 1 / 16)]


class TransMla(CompressedMla):
    """The recipe of the paper's code: blocks of `fold` neighboring frequencies share a real rotation."""

    fold = 1

    def choose_num_kept(self) -> Tensor:
        self.collapse = self.w // self.r
        kept = torch.zeros(self.w // 2, dtype=torch.long)
        kept[:: self.collapse] = 1
        return kept

    def _compress_layer(self, parts: LayerParts) -> CompressedLayer:
        p, fold = self.w // 2, self.fold
        rotary, remaining = [], []
        query_mix = torch.zeros(self.g, p, self.r // 2, dtype=torch.complex128)
        per_block = fold // self.collapse
        for block in range(p // fold):
            of_block = slice(block * fold, (block + 1) * fold)
            keys = parts.keys[of_block].flatten(0, 1)  # [fold g, d+1]
            second = (keys @ parts.moments.to(keys.dtype) @ keys.mH).real
            kept = torch.linalg.eigh(damped(second))[1].flip(1)[:, :per_block].to(keys.dtype)
            rotary.append(kept.mT @ keys)
            remaining.append((keys - kept @ rotary[-1]).unflatten(0, (fold, self.g)))
            slots = slice(block * per_block, (block + 1) * per_block)
            query_mix[:, of_block, slots] = kept.unflatten(0, (fold, self.g)).transpose(0, 1)
        latent, keys, values = self.principal_components(parts, torch.cat(remaining))
        return CompressedLayer(torch.cat(rotary), query_mix, latent, keys, values, torch.ones_like(parts.means))

    def principal_components(self, parts: LayerParts, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        real = torch.cat((keys.real.flatten(0, 1), keys.imag.flatten(0, 1)))
        values = parts.values.flatten(0, 1)

        def norm(x: Tensor) -> Tensor:
            return (x @ parts.moments * x).sum(dim=1).sqrt().mean()

        y = torch.cat((real * (norm(values) / norm(real)), values))
        directions = torch.linalg.eigh(damped(y @ parts.moments @ y.T))[1].flip(1)[:, : self.c - 1]
        latent = directions.T @ y
        if len(latent) < self.c - 1:
            latent = torch.nn.functional.pad(latent, (0, 0, 0, self.c - 1 - len(latent)))
            directions = torch.nn.functional.pad(directions, (0, self.c - 1 - directions.shape[1]))
        back = directions.clone()
        back[: len(real)] *= norm(real) / norm(values)
        back = torch.nn.functional.pad(back, (0, 1))
        real, imaginary, values = back.split((len(real) // 2, len(real) // 2, len(values)))
        return latent, torch.complex(real, imaginary).unflatten(0, (-1, self.g)), values.unflatten(0, (self.g, -1))


def damped(second: Tensor) -> Tensor:
    return second + 0.01 * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)


def transmla_perplexities(files: Source, statistics: list, held_out: Tensor, r: int, c: int) -> dict:
    """Perplexities of TransMLA with the best number of folded frequencies, a power of two as in its code."""
    width = files.config["hidden_size"] // files.config["num_attention_heads"]
    # it keeps at most one mixture per frequency; the latent gets the remaining width
    r, c = min(r, width), c + max(r - width, 0)

    def evaluate(fold: int, c: int | None) -> float:
        conversion = type("Folded", (TransMla,), {"fold": fold})(files, statistics, r=r, c=c)
        return perplexity(build_model(conversion), held_out)

    folds = [fold for fold in (1, 2, 4, 8) if fold >= width // r and width // 2 % fold == 0]
    rotary = {fold: evaluate(fold, None) for fold in folds}
    fold = min(rotary, key=rotary.get)
    return {"fold": fold, "rotary": rotary[fold], "perplexity": evaluate(fold, c)}


def plot(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    share = [row["cached_share"] for row in result["rows"]]
    for name, label in (("ours", "deepseek-latent"), ("transmla", "recipe of TransMLA")):
        axes.plot(share, [row[name]["perplexity"] for row in result["rows"]], "o", label=label)
    axes.axhline(result["perplexity_of_source"], linestyle="--", color="gray", label="source")
    axes.set(yscale="log", xlabel="fraction of the source's cache", ylabel="perplexity without training after it")
    axes.set_title(f"{result['model']}, {result['judging_tokens']:,} held-out tokens", fontsize=9)
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file, and a plot beside it")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    files = Source(options.folder)
    calibration, held_out = split_into_windows(
        options.folder, (options.folder / "held_out.txt").read_text(encoding="utf-8")
    )
    model = AutoModelForCausalLM.from_pretrained(options.folder, attn_implementation="eager").eval()
    statistics = collect_statistics(model, calibration)
    result = described("python -m benchmarks.compression") | {
        "model": f"Llama of {model.num_parameters():,} parameters on Python's standard library",
        "calibration_tokens": calibration.numel(),
        "judging_tokens": held_out.numel(),
        "perplexity_of_source": round(perplexity(model, held_out), 3),
        "rows": [],
    }
    whole = 2 * model.config.num_key_value_heads * model.config.head_dim
    for r, c in track([(round(a * whole), round(b * whole)) for a, b in WIDTHS], "compressing"):
        row = {"rotary_width": r, "latent_width": c, "cached_share": (r + c) / whole}
        row["ours"] = {
            name: perplexity(build_model(CompressedMla(files, statistics, r=r, c=width)), held_out)
            for name, width in (("rotary", None), ("perplexity", c))
        }
        row["transmla"] = transmla_perplexities(files, statistics, held_out, r, c)
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        plot(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
