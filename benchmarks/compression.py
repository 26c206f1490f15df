"""Three ways to a smaller cache on the same model, tokens and cache sizes, nothing trained after: this package's,
TransMLA's and MHA2MLA's. FOLDER is a Llama without biases and with a tokenizer.

    python -m benchmarks.compression FOLDER --calibrate wiki.txt news.txt --evaluate other.txt pydoc.txt --out FILE.json

Each method gets the same windows of the calibration texts. This package's rotary width is a quarter of the cache. What
a recipe leaves open (its rotary width and its options) is chosen for each size by the loss on other windows of these
texts, one option after the other; the evaluation texts are only read for the perplexities. Cached elements are those
per token and layer of the source's keys and values.
Rows are written to FILE.json when they are ready, with a plot beside it, and replace those of the same method and size.
Seconds are those of one conversion with known options, as the CPU spent them.
"""

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from deepseek_latent.conversion.calibration import Calibration
from deepseek_latent.conversion.compress import CompressedMla
from deepseek_latent.conversion.compression_report import build_model
from deepseek_latent.conversion.llama_source import LlamaSource
from deepseek_latent.conversion.loading import load_model
from deepseek_latent.conversion.refine import refine
from deepseek_latent.conversion.source import Source
from deepseek_latent.conversion.text import read_text, split_into_windows, tokenize

from . import mha2mla, transmla
from .compression_rows import add_row, compared
from .machine import described
from .partial_rope import PartialRope, frequencies_of, input_moments, losses, read_layers, replaced_attention

FRACTIONS = (0.75, 0.5, 0.3125, 0.25, 0.125)
EVALUATION_LENGTH = 512
# this package's rotary width, as a fraction of the cache, to the nearest multiple of 8
ROTARY_FRACTION = 1 / 4
# fractions of the cache between which the recipes' rotary widths are tried
SMALLEST_ROTARY, LARGEST_ROTARY = 0.11, 0.6


class Task(NamedTuple):
    """What every method gets."""

    folder: Path
    model: PreTrainedModel
    calibration: Tensor  # [b s]
    choosing: Tensor  # [b s]
    sizes: list[int]  # cached elements per token and layer


class Conversion(NamedTuple):
    choice: dict
    seconds: float
    losses: Callable[[Tensor], Tensor]  # of windows [b s], to [b]
    loss: float  # where options are chosen


def tried(task: Task, choice: dict, seconds: float, losses: Callable[[Tensor], Tensor]) -> Conversion:
    loss = losses(task.choosing).mean().item()
    print(json.dumps({"tried": choice, "loss": loss}), flush=True)
    return Conversion(choice, seconds, losses, loss)


def tried_recipe(task: Task, choice: dict, seconds: float, layers: list[PartialRope]) -> Conversion:
    def losses_of_recipe(windows: Tensor) -> Tensor:
        with replaced_attention(task.model, layers) as model:
            return losses(model, windows)

    return tried(task, choice, seconds, losses_of_recipe)


def best(conversions: Iterator[Conversion]) -> Conversion:
    return min(conversions, key=lambda conversion: conversion.loss)


def timed(function: Callable, *args, **options) -> tuple:
    """The function's result, and the seconds that the CPU spent on it, whatever else the machine does."""
    start = time.process_time()
    return function(*args, **options), time.process_time() - start


def for_all_layers(function: Callable, *per_layer: list, **options) -> list:
    return [function(*layer, **options) for layer in zip(*per_layer)]


def widths_between(cached: int, widths: list[int]) -> list[int]:
    return [x for x in widths if SMALLEST_ROTARY * cached <= x <= LARGEST_ROTARY * cached]


def ours(task: Task) -> Iterator[tuple[int, Conversion]]:
    files, source = Source(task.folder), LlamaSource(Source(task.folder))
    eager = load_model(task.folder, dtype=torch.float32, attn_implementation="eager")
    statistics = Calibration(eager, source, task.calibration)
    _, calibrating = timed(lambda: statistics[0])

    def convert(r: int, c: int) -> tuple[PreTrainedModel, float]:
        model = build_model(CompressedMla(files, statistics, r=r, c=c))
        loss = losses(model, task.choosing).mean().item()
        refine(model, task.model, task.calibration)
        return model, loss

    for cached in task.sizes:
        r = max(round(cached * ROTARY_FRACTION / 8), 1) * 8
        (model, loss), seconds = timed(convert, r, cached - r)
        choice = {"rotary": r, "latent": cached - r, "loss before the refinement": loss}
        yield cached, tried(task, choice, calibrating + seconds, functools.partial(losses, model))


def by_transmla(task: Task) -> Iterator[tuple[int, Conversion]]:
    sources, frequencies = read_layers(task.model), frequencies_of(task.model)
    moments, calibrating = timed(input_moments, task.model, task.calibration)
    width = 2 * len(frequencies)

    @functools.cache
    def first_step(r: int) -> tuple[dict, float, list[transmla.MixedKeys], list[Tensor]]:
        """Options, seconds, mixed keys and the inputs' moments after; the fold doubles while the loss falls."""
        chosen, fold = None, max(width // r, 1)
        while fold <= width // 2:
            options = {"fold": fold, "collapse": max(width // r, 1), "rope_heads": max(r // width, 1)}
            mixed, seconds = timed(
                for_all_layers, transmla.mix_keys, sources, moments, frequencies=frequencies, **options
            )
            layers = for_all_layers(transmla.partial_rope, sources, mixed)
            conversion = tried_recipe(task, {"rotary": r} | options, seconds, layers)
            if chosen is not None and conversion.loss >= chosen[0].loss:
                break
            chosen, fold = (conversion, mixed, layers), fold * 2
        conversion, mixed, layers = chosen
        with replaced_attention(task.model, layers) as model:
            moments_after, seconds = timed(input_moments, model, task.calibration)
        return conversion.choice, calibrating + conversion.seconds + seconds, mixed, moments_after

    def convert(r: int, c: int, balance: float | None) -> Conversion:
        choice, before, mixed, moments_after = first_step(r)
        layers, seconds = timed(for_all_layers, transmla.compress, sources, mixed, moments_after, c=c, balance=balance)
        return tried_recipe(task, choice | {"latent": c, "balance": balance}, before + seconds, layers)

    for cached in task.sizes:
        widths = widths_between(cached, [width * 2, width, width // 2, width // 4, width // 8])
        by_width = best(convert(r, cached - r, 1.0) for r in widths)
        r, c = by_width.choice["rotary"], by_width.choice["latent"]
        yield cached, best(iter([by_width, best(convert(r, c, balance) for balance in (0.5, 2.0))]))


def by_mha2mla(task: Task) -> Iterator[tuple[int, Conversion]]:
    sources, frequencies = read_layers(task.model), frequencies_of(task.model)
    products, calibrating = timed(mha2mla.norm_products, task.model, task.calibration)
    p, g = len(frequencies), task.model.config.num_key_value_heads

    def convert(selection: str, num_kept: int, rank: int | None, decomposition: str) -> Conversion:
        kept = [mha2mla.choose_frequencies(selection, of_layer, num_kept) for of_layer in products]
        options = {"rank": rank, "decomposition": decomposition}
        layers, seconds = timed(for_all_layers, mha2mla.convert, sources, kept, frequencies=frequencies, **options)
        choice = {"rotary": 2 * num_kept * g, "selection": selection, "latent": rank, "decomposition": decomposition}
        # the other selections need no text
        return tried_recipe(task, choice, seconds + (calibrating if selection == "2-norm" else 0), layers)

    @functools.cache
    def selection_for(num_kept: int) -> str:
        selections = [x for x in mha2mla.SELECTIONS if x != "uniform" or p % num_kept == 0]
        return best(convert(x, num_kept, None, "joint") for x in selections).choice["selection"]

    for cached in task.sizes:
        widths = widths_between(cached, [2 * g * x for x in (p // 16, p // 8, p // 4, p // 2, p * 3 // 4) if x])
        choices = [(r // (2 * g), cached - r, x) for r in widths for x in mha2mla.DECOMPOSITIONS]
        yield cached, best(convert(selection_for(kept), kept, rank, x) for kept, rank, x in choices)


METHODS = {"ours": ours, "transmla": by_transmla, "mha2mla": by_mha2mla}


def evenly_spaced(windows: Tensor, most: int) -> Tensor:
    return windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()]


def training_windows(folder: Path, texts: list[Path], *, calibration: int, choosing: int) -> tuple[Tensor, Tensor]:
    """At most so many windows [b s] to calibrate and to choose on, the same number from each text."""
    sides = zip(*(split_into_windows(folder, read_text(text)) for text in texts))
    return tuple(
        torch.cat([evenly_spaced(windows, most // len(texts)) for windows in side])
        for side, most in zip(sides, (calibration, choosing))
    )


def evaluation_windows(folder: Path, text: Path, most: int) -> Tensor:
    ids = tokenize(folder, read_text(text))[0]
    return evenly_spaced(ids[: len(ids) // EVALUATION_LENGTH * EVALUATION_LENGTH].view(-1, EVALUATION_LENGTH), most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True, help="texts to calibrate and choose on")
    parser.add_argument("--evaluate", type=Path, nargs="+", required=True, help="texts to evaluate on")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, help="of the source's cache")
    parser.add_argument("--calibration-windows", type=int, default=128, help="of 256 tokens, from all texts")
    parser.add_argument("--choosing-windows", type=int, default=8, help="of 256 tokens, from all texts")
    parser.add_argument("--evaluation-windows", type=int, default=40, help="of 512 tokens, from each text")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file to write or to extend, with a plot beside it"
    )
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load_model(options.folder, dtype=torch.float32)
    whole = 2 * model.config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    calibration, choosing = training_windows(
        options.folder, options.calibrate, calibration=options.calibration_windows, choosing=options.choosing_windows
    )
    texts = {x.stem: evaluation_windows(options.folder, x, options.evaluation_windows) for x in options.evaluate}
    before = {name: losses(model, windows) for name, windows in texts.items()}
    setting = {
        "model": f"{type(model).__name__} of {model.num_parameters():,} parameters, {whole} cached elements",
        "calibration": {"texts": [x.stem for x in options.calibrate], "tokens": calibration.numel()},
        "sha256 of the calibration tokens": hashlib.sha256(calibration.numpy().tobytes()).hexdigest(),
        "choosing tokens": choosing.numel(),
        "evaluation": {
            name: {"tokens": windows.numel(), "perplexity of the source": round(before[name].mean().exp().item(), 2)}
            for name, windows in texts.items()
        },
    }
    result = described("python -m benchmarks.compression") | {"setting": setting}
    sizes = [2 * round(fraction * whole / 2) for fraction in options.fractions]
    task = Task(options.folder, model, calibration, choosing, sizes)
    for method in options.methods:
        for cached, conversion in METHODS[method](task):
            row = {"method": method, "fraction": cached / whole, "cached": cached, "choice": conversion.choice}
            row["seconds"] = round(conversion.seconds, 1)
            row["texts"] = {name: compared(conversion.losses(windows), before[name]) for name, windows in texts.items()}
            print(json.dumps(row), flush=True)
            add_row(result, row, options.out)


if __name__ == "__main__":
    main()
