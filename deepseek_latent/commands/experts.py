"""`deepseek-latent experts`: which experts a model uses on a text, how evenly, and how unlike on another text.

Letters: e routed experts, l layers with experts.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from ..conversion.calibration import text_of, tokenized
from ..conversion.checkpoint import checkpoint_tensors, read_config
from ..conversion.size import RoutedSize, routed_size
from ..conversion.source import source_folder
from ..finetuning.activity import Activity, activity_of
from ..finetuning.expert_selection import THRESHOLDS, ExpertSelection, expert_scores, select_experts


def add_command(commands) -> None:
    parser = commands.add_parser("experts", help="see which experts a model uses on a text, and how evenly")
    parser.description = (
        "Per layer and expert, the share of choices and the mean gate weight on a text; per layer, load, entropy and "
        "experts never chosen, and how unlike another text is. Also where the model stands on the scaling law of "
        "routed models."
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder or a hub id")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="FILE", help="another text to compare with")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw layers and experts as a heat map")
    parser.add_argument("--esft", type=Path, metavar="JSON", help="write the experts to fine-tune on the text")
    parser.add_argument("--by", choices=("token", "gate"), help="how --esft scores (default: token)")
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="where a layer's scores stop adding up (default: 0.2; by gate 0.1)"
    )
    parser.add_argument("--json", action="store_true", help="all figures as JSON")
    parser.set_defaults(action=_experts)


def _experts(arguments: argparse.Namespace) -> int:
    set_verbosity_error()
    disable_progress_bar()
    config, place = read_config(arguments.model), source_folder(arguments.model)
    if arguments.esft is None and (arguments.by, arguments.threshold) != (None, None):
        raise ValueError(
            "--by and --threshold say how --esft chooses experts; give --esft a file to write, or leave them."
        )
    # a missing package or folder is said before any work
    for file in filter(None, (arguments.plot, arguments.esft)):
        if not file.parent.is_dir():
            raise ValueError(f"expected a folder to write into, got {file.parent}, which is not there.")
    if arguments.plot:
        plot = _plotter(arguments.plot)
    model = AutoModelForCausalLM.from_pretrained(place, dtype="auto").eval()
    texts = [file for file in (arguments.text, arguments.against) if file is not None]
    first, *others = [activity_of(model, tokenized(place, text_of(file))) for file in texts]
    size = routed_size(config, checkpoint_tensors(config))
    if arguments.esft:
        by = arguments.by or "token"
        threshold = THRESHOLDS[by] if arguments.threshold is None else arguments.threshold
        chosen = select_experts(expert_scores(first, by), threshold)
        ExpertSelection(chosen).save(arguments.esft)
        num_chosen, num_experts = sum(map(len, chosen.values())), first.shares.numel()
        print(f"{num_chosen} of {num_experts} experts to fine-tune written to {arguments.esft}", file=sys.stderr)
    if arguments.plot:
        plot(first, *others, names=[file.name for file in texts])
    if arguments.json:
        print(json.dumps(_report(first, others, size), indent=2))
    else:
        Console().print(_table(first, others), _size_table(size), sep="\n\n")
    return 0


def _report(first: Activity, others: list[Activity], size: RoutedSize) -> dict:
    layers = [
        {"layer": layer, "load": load, "entropy": entropy, "unused": unused, "shares": shares, "mean_weights": weights}
        for layer, load, entropy, unused, shares, weights in zip(
            first.layers,
            *(x.tolist() for x in (first.load(), first.entropy(), first.unused(), first.shares, first.weights)),
        )
    ]
    for other in others:
        for row, distance in zip(layers, first.distance(other).tolist()):
            row["distance"] = distance
    return {"layers": layers, "scaling_law": size._asdict()}


def _table(first: Activity, others: list[Activity]) -> Table:
    headings = ["busiest x even", "entropy", "never chosen", "busiest expert"] + ["unlike the other text"] * len(others)
    title = f"{first.shares.shape[1]} experts, {len(first.layers)} layers"
    table = Table("layer", *(Column(heading, justify="right") for heading in headings), title=title)
    distances = [first.distance(other).tolist() for other in others]
    for row, layer in enumerate(first.layers):
        busiest = int(first.shares[row].argmax())
        table.add_row(
            str(layer),
            f"{first.load()[row]:.2f}",
            f"{first.entropy()[row]:.3f}",
            f"{int(first.unused()[row])}",
            f"{busiest} ({first.shares[row, busiest]:.1%}, mean weight {first.weights[row, busiest]:.3f})",
            *(f"{distance[row]:.2f}" for distance in distances),
        )
    return table


def _size_table(size: RoutedSize) -> Table:
    table = Table(
        "", Column(justify="right"), show_header=False, title="scaling law of routed models, arXiv:2202.01169"
    )
    table.add_row("N, parameters a token uses, without embeddings", f"{size.base:,}")
    table.add_row("E, experts as wide as all that a token visits", f"{size.expansion:.1f}")
    table.add_row("parameters of the dense model expected to be as good", f"{size.effective:,.0f}")
    table.caption = "log L = a log N + b log E' + c log N log E' + d, E' saturating E; eqs. 1 and 11, S-BASE of Table 3"
    return table


def _plotter(path: Path):
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError("--plot draws with matplotlib, which is not installed; pip install matplotlib.") from error

    def plot(*activities: Activity, names: list[str]) -> None:
        num_layers, e = activities[0].shares.shape
        size = (max(5.0, 0.16 * e + 2), max(3.6, (0.22 * num_layers + 1.2) * len(activities) + 0.4))
        figure, axes = plt.subplots(len(activities), 1, figsize=size, squeeze=False, layout="constrained")
        most = max((activity.shares * e).max().item() for activity in activities)
        for activity, name, ax in zip(activities, names, axes[:, 0]):
            image = ax.imshow((activity.shares * e).numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=most)
            ax.set(xlabel="expert", ylabel="layer", title=name)
            ax.set_yticks(range(num_layers), activity.layers)
        figure.colorbar(image, ax=axes[:, 0], label="choices, 1 where all experts are chosen evenly")
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)

    return plot
