"""Three ways to a smaller cache on the same model, tokens and cache sizes, nothing trained after: this package's,
TransMLA's and MHA2MLA's. FOLDER is a Llama without biases and with a tokenizer.

    python -m benchmarks.compression FOLDER --calibrate wiki.txt news.txt --evaluate other.txt pydoc.txt --out FILE.json

Each method gets the same windows of the calibration texts. What it leaves open (rotary width and the options of a
recipe) is chosen for each size by the loss on other windows of these texts, one option after the other; the evaluation
texts are only read for the perplexities. Cached elements are those per token and layer of the source's keys and values.
Rows are written to FILE.json when they are ready, with a plot beside it, and replace those of the same method and size.
"""

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from deepseek_latent.conversion.calibration import collect_statistics
from deepseek_latent.conversion.compress import CompressedMla
from deepseek_latent.conversion.compression_report import build_model
from deepseek_latent.conversion.loading import load_model
from deepseek_latent.conversion.source import Source
from deepseek_latent.conversion.text import read_text, split_into_windows, tokenize
from deepseek_latent.whole_files import save_text, whole_file

from . import mha2mla, transmla
from .machine import described
from .partial_rope import PartialRope, frequencies_of, input_moments, losses, read_layers, replaced_attention

FRACTIONS = (0.75, 0.5, 0.3125, 0.25, 0.125)
NUM_CALIBRATION_WINDOWS, NUM_CHOOSING_WINDOWS, EVALUATION_LENGTH = 128, 8, 512
# a rotary part beyond these fractions of the cache is not tried
SMALLEST_ROTARY, LARGEST_ROTARY = 1 / 9, 2 / 3
LABELS = {"ours": "deepseek-latent", "transmla": "recipe of TransMLA", "mha2mla": "recipe of MHA2MLA"}


class Task(NamedTuple):
    """What every method gets."""

    folder: Path
    model: PreTrainedModel
    calibration: Tensor  # [b s]
    choosing: Tensor  # [b s]
    sizes: list[int]  # cached elements per token and layer


class Conversion(NamedTuple):
    """One way to reach a size: its options, the seconds of calibration and conversion, its loss where it is chosen."""

    choice: dict
    seconds: float
    loss: float
    layers: list[PartialRope] | None = None  # of a recipe
    model: PreTrainedModel | None = None  # of this package

    def losses(self, task: Task, windows: Tensor) -> Tensor:
        if self.model is not None:
            return losses(self.model, windows)
        with replaced_attention(task.model, self.layers) as model:
            return losses(model, windows)


def tried(task: Task, choice: dict, seconds: float, **result) -> Conversion:
    """The conversion with its loss on the choosing windows."""
    conversion = Conversion(choice, seconds, 0.0, **result)
    conversion = conversion._replace(loss=conversion.losses(task, task.choosing).mean().item())
    print(json.dumps({"tried": choice, "loss": conversion.loss}), flush=True)
    return conversion


def best(conversions: Iterator[Conversion]) -> Conversion:
    # one after the other, because each holds the weights of a model's attention
    return functools.reduce(lambda x, y: y if y.loss < x.loss else x, conversions)


def timed(work: Callable[[], object]) -> tuple[object, float]:
    """The result, and the seconds that the CPU spent on it, which do not depend on other load."""
    start = time.process_time()
    return work(), time.process_time() - start


def rotary_widths(cached: int, widths: list[int]) -> list[int]:
    return [x for x in widths if SMALLEST_ROTARY * cached <= x <= LARGEST_ROTARY * cached]


def ours(task: Task) -> Iterator[tuple[int, Conversion]]:
    files = Source(task.folder)
    eager = load_model(task.folder, dtype=torch.float32, attn_implementation="eager")
    statistics, calibrating = timed(functools.partial(collect_statistics, eager, task.calibration))
    for cached in task.sizes:

        def convert(r: int, cached: int = cached) -> Conversion:
            built, seconds = timed(lambda: build_model(CompressedMla(files, statistics, r=r, c=cached - r)))
            return tried(task, {"rotary": r, "latent": cached - r}, calibrating + seconds, model=built)

        widths = {max(round(cached * x / 8), 1) * 8 for x in (1 / 6, 1 / 4, 1 / 3)}
        yield cached, best(convert(r) for r in sorted(widths))


def by_transmla(task: Task) -> Iterator[tuple[int, Conversion]]:
    sources, frequencies = read_layers(task.model), frequencies_of(task.model)
    moments, calibrating = timed(lambda: input_moments(task.model, task.calibration))
    width = 2 * len(frequencies)

    @functools.cache
    def first_step(r: int) -> tuple[list[transmla.MixedKeys], list[Tensor], Conversion]:
        """Doubles the fold until the loss grows, as its code does, and measures the model's inputs anew."""
        best_mixed, first, fold = None, None, max(width // r, 1)
        while fold <= width // 2:
            options = {"fold": fold, "collapse": max(width // r, 1), "rope_heads": max(r // width, 1)}
            mixed, mixing = timed(
                lambda options=options: [
                    transmla.mix_keys(x, y, frequencies, **options) for x, y in zip(sources, moments)
                ]
            )
            layers = [transmla.partial_rope(*x) for x in zip(sources, mixed)]
            conversion = tried(task, {"rotary": r} | options, mixing, layers=layers)
            if first is not None and conversion.loss >= first.loss:
                break
            best_mixed, first, fold = mixed, conversion, fold * 2
        with replaced_attention(task.model, first.layers) as model:
            moments_after, seconds = timed(lambda: input_moments(model, task.calibration))
        return best_mixed, moments_after, first._replace(seconds=first.seconds + calibrating + seconds, layers=None)

    for cached in task.sizes:

        def convert(r: int, balance: float | None, cached: int = cached) -> Conversion:
            mixed, moments_after, first = first_step(r)
            options = {"c": cached - r, "balance": balance}
            layers, seconds = timed(
                lambda: [transmla.compress(*x, **options) for x in zip(sources, mixed, moments_after)]
            )
            choice = first.choice | {"latent": cached - r, "balance": balance}
            return tried(task, choice, first.seconds + seconds, layers=layers)

        widths = rotary_widths(cached, [width * 2, width, width // 2, width // 4, width // 8])
        chosen = best(convert(r, 1.0) for r in widths)
        rest = (convert(chosen.choice["rotary"], balance) for balance in (None, 0.5, 2.0))
        yield cached, best(iter([chosen, best(rest)]))


def by_mha2mla(task: Task) -> Iterator[tuple[int, Conversion]]:
    sources, frequencies = read_layers(task.model), frequencies_of(task.model)
    products, calibrating = timed(lambda: mha2mla.norm_products(task.model, task.calibration))
    p, g = len(frequencies), task.model.config.num_key_value_heads

    def convert(selection: str, kept: int, rank: int | None = None, decomposition: str = "joint") -> Conversion:
        layers, seconds = timed(
            lambda: [
                mha2mla.convert(
                    source,
                    frequencies,
                    mha2mla.choose_frequencies(selection, of_layer, kept),
                    rank=rank,
                    decomposition=decomposition,
                )
                for source, of_layer in zip(sources, products)
            ]
        )
        choice = {"rotary": 2 * kept * g, "selection": selection, "latent": rank, "decomposition": decomposition}
        # the other selections need no text
        seconds += calibrating if selection == "2-norm" else 0
        return tried(task, choice, seconds, layers=layers)

    @functools.cache
    def selection_for(kept: int) -> str:
        selections = [x for x in mha2mla.SELECTIONS if x != "uniform" or p % kept == 0]
        return best(convert(x, kept) for x in selections).choice["selection"]

    for cached in task.sizes:
        widths = rotary_widths(cached, [2 * g * x for x in (p // 16, p // 8, p // 4, p // 2, p * 3 // 4) if x])
        yield (
            cached,
            best(
                convert(selection_for(r // (2 * g)), r // (2 * g), cached - r, decomposition)
                for r in widths
                for decomposition in mha2mla.DECOMPOSITIONS
            ),
        )


METHODS = {"ours": ours, "transmla": by_transmla, "mha2mla": by_mha2mla}


def evenly_spaced(windows: Tensor, most: int) -> Tensor:
    return windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()]


def compared(changed: Tensor, before: Tensor) -> dict:
    """Perplexity, its ratio to the source's, and the ratio's standard error, from the losses of the same windows."""
    difference = changed - before
    ratio = difference.mean().exp().item()
    return {
        "perplexity": round(changed.mean().exp().item(), 4),
        "ratio": round(ratio, 5),
        "standard_error": round(ratio * difference.std().item() / len(difference) ** 0.5, 5),
    }


def add_row(result: dict, row: dict, out: Path) -> None:
    """Writes the row among those that the file has by now, and plots them all.

    Raises ValueError if these were measured on other texts or another model.
    """
    rows = []
    if out.exists():
        written = json.loads(out.read_text())
        if written["setting"] != result["setting"]:
            raise ValueError(f"{out} has rows with another model or other texts; choose another file.")
        rows = [x for x in written["rows"] if (x["method"], x["cached"]) != (row["method"], row["cached"])]
    order = list(METHODS)
    rows = sorted([*rows, row], key=lambda x: (order.index(x["method"]), -x["cached"]))
    with whole_file(out) as place:
        save_text(place, json.dumps(result | {"rows": rows}, indent=2) + "\n")
    plot(result | {"rows": rows}, out.with_suffix(".png"))


def plot(result: dict, path: Path) -> None:
    texts = result["setting"]["evaluation"]
    figure, all_axes = plt.subplots(1, len(texts), figsize=(5.5 * len(texts), 4.2), sharey=True, squeeze=False)
    for axes, text in zip(all_axes[0], texts):
        for method, label in LABELS.items():
            rows = [row for row in result["rows"] if row["method"] == method]
            ratios = [row["texts"][text]["ratio"] for row in rows]
            errors = [row["texts"][text]["standard_error"] for row in rows]
            if rows:
                axes.errorbar([row["fraction"] for row in rows], ratios, errors, marker="o", capsize=2, label=label)
        axes.axhline(1, linestyle="--", color="gray")
        axes.set(yscale="log", xlabel="fraction of the source's cache", title=text)
        axes.grid(True, which="both", alpha=0.3)
    all_axes[0][0].set_ylabel("perplexity over the source's")
    all_axes[0][0].legend()
    figure.savefig(path, bbox_inches="tight", dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True, help="texts to calibrate and choose on")
    parser.add_argument("--evaluate", type=Path, nargs="+", required=True, help="texts to evaluate on")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, help="of the source's cache")
    parser.add_argument(
        "--windows", type=int, default=40, help="evaluation windows of 512 tokens of each text, at most"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file to write or to extend, with a plot beside it"
    )
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load_model(options.folder, dtype=torch.float32)
    config = model.config
    whole = 2 * config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    calibrations = [split_into_windows(options.folder, read_text(file)) for file in options.calibrate]
    calibration, choosing = (
        torch.cat([evenly_spaced(windows, most // len(calibrations)) for windows in side])
        for side, most in zip(zip(*calibrations), (NUM_CALIBRATION_WINDOWS, NUM_CHOOSING_WINDOWS))
    )
    texts = {}
    for file in options.evaluate:
        ids = tokenize(options.folder, read_text(file))[0]
        ids = ids[: len(ids) // EVALUATION_LENGTH * EVALUATION_LENGTH]
        texts[file.stem] = evenly_spaced(ids.view(-1, EVALUATION_LENGTH), options.windows)
    before = {name: losses(model, windows) for name, windows in texts.items()}
    sizes = [2 * round(fraction * whole / 2) for fraction in options.fractions]
    result = described("python -m benchmarks.compression") | {
        "setting": {
            "model": f"{type(model).__name__} of {model.num_parameters():,} parameters, {whole} cached elements",
            "calibration": {"texts": [x.stem for x in options.calibrate], "tokens": calibration.numel()},
            "sha256 of the calibration tokens": hashlib.sha256(calibration.numpy().tobytes()).hexdigest(),
            "choosing tokens": choosing.numel(),
            "evaluation": {
                name: {
                    "tokens": windows.numel(),
                    "perplexity of the source": round(before[name].mean().exp().item(), 2),
                }
                for name, windows in texts.items()
            },
        }
    }
    task = Task(options.folder, model, calibration, choosing, sizes)
    for method in options.methods:
        for cached, conversion in METHODS[method](task):
            row = {"method": method, "fraction": cached / whole, "cached": cached, "choice": conversion.choice}
            row["seconds"] = round(conversion.seconds, 1)
            row["texts"] = {
                name: compared(conversion.losses(task, windows), before[name]) for name, windows in texts.items()
            }
            print(json.dumps(row), flush=True)
            add_row(result, row, options.out)


if __name__ == "__main__":
    main()
