"""`deepseek-latent experts`: shows which experts a model uses on a text, how evenly, and how texts differ.

Letters: e routed experts, l layers with experts.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.table import Column, Table
from torch import Tensor
from transformers import PreTrainedModel

from ..conversion.checkpoint import checkpoint_tensors, read_config
from ..conversion.loading import load_model
from ..conversion.progress import announce_without_terminal
from ..conversion.size import RoutedSize, routed_size
from ..conversion.source import fetch_source
from ..conversion.text import read_text, tokenize
from ..finetuning.activity import WINDOW, Activity, activity_of, activity_of_halves
from ..finetuning.expert_selection import THRESHOLDS, ExpertSelection, expert_scores, select_experts
from ..modeling_deepseek_v2 import moe_layers
from .terminal import print_tables, quiet_transformers

# two texts use different experts if their halves differ this many times as much as the halves of one text
SPECIALIZED = 1.2


@quiet_transformers()
def show_experts(arguments: argparse.Namespace) -> int:
    folder = fetch_source(arguments.model)
    config = read_config(str(folder))
    # a model without experts, a missing folder or package is reported before any work
    if not config.moe_layers:
        raise ValueError(f"expected a model with experts, and no layer of {arguments.model} has any.")
    for file in filter(None, (arguments.plot, arguments.esft)):
        if not file.parent.is_dir():
            raise ValueError(f"expected a folder to write into, got {file.parent}; make it, or name another one.")
    if arguments.plot and arguments.plot.is_dir():
        raise ValueError(f"expected a file for --plot, got the folder {arguments.plot}; name a file in it.")
    if arguments.plot and arguments.plot.suffix.lower() != ".png":
        raise ValueError(f"--plot writes a PNG file, so expected a name that ends with .png, got {arguments.plot}.")
    save_loads = _import_drawing() if arguments.plot else None
    files = [arguments.text, *arguments.against]
    ids = [tokenize(folder, read_text(file)) for file in files]
    model = load_model(folder, dtype="auto")
    layers = moe_layers(model).values()
    is_tied = not any(moe.gate.weight.any() for moe in layers)
    if is_tied:
        print("all routers are zero: every token gets the same experts until they are trained.", file=sys.stderr)
    # as upcycle --scheme M0 leaves them
    is_idle = not any(moe.experts.down_proj.any() for moe in layers)
    if is_idle:
        print("all routed experts are zero: they add nothing until they are trained.", file=sys.stderr)
    texts = []
    for file, tokens in zip(files, ids):
        # on a terminal, a bar counts its windows
        announce_without_terminal(f"reading {tokens.numel():,} tokens of {file.name}")
        texts.append(_text(model, file.name, tokens))
    first, *others = [text.activity for text in texts]
    comparisons = list(itertools.starmap(_compare, itertools.combinations(texts, 2)))
    size = None if is_tied or is_idle else routed_size(config, checkpoint_tensors(config))
    if arguments.esft:
        by = arguments.by or "token"
        threshold = THRESHOLDS[by] if arguments.threshold is None else arguments.threshold
        selected = select_experts(expert_scores(first, by), threshold)
        ExpertSelection(selected).save(arguments.esft)
        num_selected, num_experts = sum(map(len, selected.values())), first.shares.numel()
        print(f"{num_selected} of {num_experts} experts to fine-tune written to {arguments.esft}", file=sys.stderr)
    if save_loads is not None:
        save_loads(arguments.plot, [(text.name, text.activity) for text in texts])
        print(f"the plot is in {arguments.plot}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(_report(first, others, comparisons, size), indent=2))
    else:
        print_tables(_table(texts), *([] if size is None else [_size_table(size)]))
        for comparison in comparisons:
            print(comparison.sentence())
    return 0


class _Text(NamedTuple):
    """What a model chooses on a text, and on each half of it. A text of less than two windows has no halves."""

    name: str
    activity: Activity
    halves: tuple[Activity, ...]


class _Comparison(NamedTuple):
    """How much the choices on two texts differ, as means over the layers of the distance between halves.

    between  mean distance from a half of one text to a half of the other; None if either has no halves
    within   distance between the halves of one text, the larger of the two
    """

    texts: tuple[str, str]
    between: float | None
    within: float | None

    def sentence(self) -> str:
        names = " and ".join(self.texts)
        if self.between is None:
            return f"{names}: one has less than {2 * WINDOW:,} tokens, too few to tell specialization from chance."
        figures = f"choices on halves of {names} differ by {self.between:.3f}, on two halves of one text by "
        if self.between > SPECIALIZED * self.within:
            return f"{figures}{self.within:.3f} or less: these texts use different experts."
        return f"{figures}up to {self.within:.3f}: this shows no specialization on these texts."


def _text(model: PreTrainedModel, name: str, ids: Tensor) -> _Text:
    if ids.numel() < 2 * WINDOW:
        return _Text(name, activity_of(model, ids), ())
    activity, *halves = activity_of_halves(model, ids)
    return _Text(name, activity, tuple(halves))


def _compare(one: _Text, other: _Text) -> _Comparison:
    if not one.halves or not other.halves:
        return _Comparison((one.name, other.name), None, None)
    pairs = list(itertools.product(one.halves, other.halves))
    between = sum(a.distance(b).mean().item() for a, b in pairs) / len(pairs)
    within = max(text.halves[0].distance(text.halves[1]).mean().item() for text in (one, other))
    return _Comparison((one.name, other.name), between, within)


def _report(first: Activity, others: list[Activity], comparisons: list[_Comparison], size: RoutedSize | None) -> dict:
    layers = [
        {"layer": layer, "load": load, "entropy": entropy, "unused": unused, "shares": shares, "mean_weights": weights}
        for layer, load, entropy, unused, shares, weights in zip(
            first.layers,
            *(x.tolist() for x in (first.load(), first.entropy(), first.unused(), first.shares, first.weights)),
        )
    ]
    for row, *distances in zip(layers, *(first.distance(other).tolist() for other in others)):
        if distances:
            row |= {"distance": distances[0], "distances": distances}
    return {"layers": layers, "comparisons": [x._asdict() for x in comparisons], "scaling_law": size and size._asdict()}


def _table(texts: list[_Text]) -> Table:
    first, others = texts[0].activity, [text.activity for text in texts[1:]]
    headings = ["highest load", "entropy", "never chosen", "most chosen", "its share", "its mean weight"]
    headings += [f"distance to {text.name}" for text in texts[1:]]
    title = f"{first.shares.shape[1]} experts, {len(first.layers)} layers"
    table = Table("layer", *(Column(heading, justify="right") for heading in headings), title=title)
    distances = [first.distance(other).tolist() for other in others]
    for row, layer in enumerate(first.layers):
        most_chosen = int(first.shares[row].argmax())
        table.add_row(
            str(layer),
            f"{first.load()[row]:.2f}",
            f"{first.entropy()[row]:.3f}",
            f"{int(first.unused()[row])}",
            str(most_chosen),
            f"{first.shares[row, most_chosen]:.1%}",
            f"{first.weights[row, most_chosen]:.3f}",
            *(f"{distance[row]:.2f}" for distance in distances),
        )
    return table


def _size_table(size: RoutedSize) -> Table:
    table = Table(
        "", Column(justify="right"), show_header=False, title="scaling law of routed models, arXiv:2202.01169"
    )
    table.add_row("N, parameters active per token, without embeddings", f"{size.base:,}")
    table.add_row("E, routed experts over experts per token", f"{size.expansion:.1f}")
    table.add_row("parameters of an equally good dense model", f"{size.effective:,.0f}")
    table.caption = (
        "log L = a log N + b log E' + c log N log E' + d, E' is E with saturation; eqs. 1 and 11, S-BASE of Table 3"
    )
    return table


def _import_drawing() -> Callable[[Path, list[tuple[str, Activity]]], None]:
    try:
        from .expert_plot import save_loads
    except ImportError as error:
        raise ValueError("--plot draws with matplotlib, which is not installed; pip install matplotlib.") from error
    return save_loads
