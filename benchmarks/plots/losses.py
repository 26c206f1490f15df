"""The plots of what models lose and learn. Each function takes what a benchmark or an example wrote."""

import math
import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from deepseek_latent.commands.plot_style import COLORS, new_figure, shades, styled

from .marks import MARKERS, Point, listed, log_axis, machine, name_lines, name_points, percent, signed

METHODS = {"ours": "deepseek-latent", "transmla": "recipe of TransMLA", "mha2mla": "recipe of MHA2MLA"}
# perplexities further apart than this need a logarithmic axis
FAR_APART = 3.0


def reference_line(axes: Axes, y: float, end: float) -> Line2D:
    """A line at what a model is compared with, from 0 to the end of what is compared."""
    (line,) = axes.plot([0, end], [y, y], "--", linewidth=1.4, color=COLORS["reference"], zorder=1)
    return line


def ratio_axis(axes: Axes) -> None:
    """The axis of perplexities over the source's, to below the source's own. Call it when everything is drawn."""
    axes.set_ylabel("perplexity over the source's")
    high = axes.get_ylim()[1]
    if high > FAR_APART:
        axes.set_ylim(0.8, high)
        log_axis(axes.yaxis)
    else:
        axes.set_ylim(1 - 0.1 * (high - 1), high)


@styled
def draw_compression(result: dict) -> Figure:
    setting, rows = result["setting"], result["rows"]
    texts = setting["evaluation"]
    found = []
    for row in [row for row in rows if row["method"] == "ours"][:3]:
        largest = max(of_text["ratio"] for of_text in row["texts"].values())
        found.append(f"{largest:.2f} with {percent(row['fraction'])}")
    title = "Perplexity over the source's" + (f", at most: {', '.join(found)} of the cache" if found else "")
    counts = listed([format(of_text["tokens"], ",") for of_text in texts.values()])
    note = f"{setting['model']} per token and layer. Bars: the standard error over the "
    note += f"windows of a text, of {counts} tokens. Nothing is trained after the conversion. "
    note += f"{result['date']}."
    figure, axes = new_figure(title, note, columns=len(texts), height=4.4, sharey=True)
    fractions = sorted({1, *(row["fraction"] for row in rows)})
    points = {text: [Point(1, 1, "source", COLORS["reference"])] for text in texts}
    for ax, (text, of_text) in zip(axes[0], texts.items()):
        for method, marker in zip(METHODS, MARKERS):
            places, errors = [], []
            for row in [row for row in rows if row["method"] == method]:
                places.append((row["fraction"], row["texts"][text]["ratio"]))
                errors.append(row["texts"][text]["standard_error"])
            if not places:
                continue
            ax.errorbar(*zip(*places), errors, color=COLORS[method], marker=marker, capsize=3)
            # the smallest cache has the name of the method and its ratio, where the lines are farthest apart
            points[text].append(Point(*places[-1], f"{METHODS[method]}: {_short(places[-1][1])}", COLORS[method]))
        ax.plot(1, 1, "*", color=COLORS["reference"], markersize=10)
        ax.set_title(f"{text} (source: perplexity {of_text['perplexity of the source']:.2f})")
        ax.set_xlabel("cached elements, % of the source's")
        ax.set_xscale("log")
        ax.set_xticks(fractions, [f"{100 * fraction:.3g}" for fraction in fractions])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.margins(x=0.2, y=0.15)
    ratio_axis(axes[0, 0])
    for ax, of_text in zip(axes[0], points.values()):
        name_points(ax, of_text)
    return figure


def _short(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


@styled
def draw_healing(runs: dict[str, dict]) -> Figure:
    # a model and what is trained of it: its longest training
    kinds = {}
    for name in sorted(runs, key=lambda name: runs[name]["evaluated"][-1]["seconds"]):
        kinds["\n".join(name.split(", ")[:2])] = runs[name]

    def ratio(point: dict) -> float:
        """The mean over the texts."""
        return math.exp(sum(math.log(x["ratio"]) for x in point["texts"].values()) / len(point["texts"]))

    def gain(kind: str) -> float:
        return ratio(kinds[kind]["evaluated"][0]) / ratio(kinds[kind]["evaluated"][-1])

    best = max(kinds, key=gain)
    first, last = kinds[best]["evaluated"][0], kinds[best]["evaluated"][-1]
    texts = list(first["texts"])
    title = (
        f"Healing {best.splitlines()[0]}: perplexity from {ratio(first):.2f} to {ratio(last):.2f} times the source's "
    )
    title += f"in {last['seconds'] / 60:.0f} minutes"
    note = "A compressed model is trained to predict what its source predicts. Beside a line: cached rotary + latent "
    note += "elements per token and layer, and what is trained. Bars: the standard error over the windows of "
    note += "a text, which is not trained on. Minutes of processor time per thread, without evaluation; "
    note += machine(kinds[best])
    figure, axes = new_figure(title, note, columns=len(texts), height=4.4, sharey=True)
    lines = {text: [] for text in texts}
    for ax, text in zip(axes[0], texts):
        for (kind, run), color, marker in zip(sorted(kinds.items()), shades(COLORS["ours"], len(kinds)), MARKERS):
            minutes = [point["seconds"] / 60 for point in run["evaluated"]]
            found = [point["texts"][text] for point in run["evaluated"]]
            ratios, errors = ([x[key] for x in found] for key in ("ratio", "standard_error_of_ratio"))
            line = ax.errorbar(minutes, ratios, errors, color=color, marker=marker, capsize=3).lines[0]
            lines[text].append((line, kind))
        ax.set_title(f"{text} (source: perplexity {first['texts'][text]['of_source']:.2f})")
        ax.set_xlabel("minutes of training")
        reference_line(ax, 1, max(run["evaluated"][-1]["seconds"] for run in kinds.values()) / 60)
        ax.annotate("source", (0, 1), (0, -4), textcoords="offset points", va="top", size=9)
    ratio_axis(axes[0, 0])
    for ax, of_text in zip(axes[0], lines.values()):
        name_lines(ax, of_text)
    return figure


def draw_differences(axes: Axes, series: dict[str, dict[int, float]]) -> None:
    """Held-out losses of experts minus those of their dense parent, against steps."""
    lines = []
    for (name, differences), color, marker in zip(series.items(), shades(COLORS["ours"], len(series)), MARKERS):
        (line,) = axes.plot(*zip(*sorted(differences.items())), color=color, marker=marker)
        lines.append((line, name))
    lines.append((reference_line(axes, 0, max(max(x) for x in series.values())), "dense parent"))
    axes.set(xlabel="steps of training", ylabel="loss minus the parent's, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    name_lines(axes, lines)


def final_sentence(differences: list[float], steps: int) -> str:
    low, high = min(differences), max(differences)
    if low < 0 < high:
        side, ends = "from", [signed(low), signed(high)]
    else:
        side, ends = "above" if high > 0 else "below", [f"{x:.3f}" for x in sorted(map(abs, (low, high)))]
    # once if both have the same digits
    found = " to ".join(dict.fromkeys(ends))
    return f"After {steps} steps, the experts' loss is {found} nats {side} the dense parent's"


@styled
def draw_upcycling(result: dict) -> Figure:
    rows = dict(result["rows"])
    parent = rows.pop("dense parent")
    of_parent = {x["step"]: x["loss"] for x in parent["losses"]}
    series = {}
    for name, row in rows.items():
        name = textwrap.fill(f"{name}: {row['active_parameters'] / 1e6:.1f}\N{NO-BREAK SPACE}M", 22)
        series[name] = {x["step"]: x["loss"] - of_parent[x["step"]] for x in row["losses"]}
    title = final_sentence([of_name[max(of_name)] for of_name in series.values()], result["steps"])
    note = "All are trained on the same text, Python's documentation, and evaluated on a part of it that is held out; "
    note += "below 0, the experts have learned more. M0 adds experts to the whole MLP, M5 cuts it into experts. At the "
    note += "end of a name: parameters that are active per token; the parent has "
    note += f"{parent['active_parameters'] / 1e6:.1f} M. {machine(result)}"
    figure, axes = new_figure(title, note)
    draw_differences(axes[0, 0], series)
    return figure


@styled
def draw_upcycled_training(result: dict) -> Figure:
    dense, experts = (result["rows"][name] for name in ("dense", "experts"))
    final, series = result["differences"], {}
    for text, losses in experts["held_out_nats"].items():
        name = f"{text}\n{signed(final[text]['nats'], 4)} ± {final[text]['standard_error']:.4f}"
        series[name] = {int(step): loss - dense["held_out_nats"][text][step] for step, loss in losses.items()}
    if all(abs(x["nats"]) < 2 * x["standard_error"] for x in final.values()):
        largest = max(abs(x["nats"]) + 2 * x["standard_error"] for x in final.values())
        title = f"After {result['steps']} steps, experts and dense parent have the same loss within {largest:.4f} nats"
    else:
        title = final_sentence([x["nats"] for x in final.values()], result["steps"])
    note = "Both are trained on the same windows in the same order, and evaluated on texts that they are not trained "
    note += (
        "on; below 0, the experts have learned more. ±: the standard error over the windows of a text. Parameters that "
    )
    note += f"are active per token: experts {experts['active_parameters'] / 1e6:.0f} M, parent "
    note += f"{dense['active_parameters'] / 1e6:.0f} M. {result['training_tokens']:,} tokens, {result['date']}."
    figure, axes = new_figure(title, note)
    draw_differences(axes[0, 0], series)
    return figure


@styled
def draw_finetuning(programs: dict[str, dict]) -> Figure:
    rows = {name: row for program in programs.values() for name, row in program["rows"].items()}
    before, facts = rows.pop("before"), next(iter(programs.values()))
    learned = max(rows, key=lambda name: -rows[name]["new_nats_per_token"])
    kept = min(rows, key=lambda name: rows[name]["old_nats_per_token"])
    gain = before["new_nats_per_token"] - rows[learned]["new_nats_per_token"]
    loss = rows[kept]["old_nats_per_token"] - before["old_nats_per_token"]
    title = f"Most learned: {learned} ({gain:.2f} nats). Least forgotten: {kept} ({loss:.2f} nats)"
    note = f"examples/pydoc-tiny, trained on documentation, learns source code for {facts['steps']} steps. Losses on "
    note += (
        "text that is not trained on. Each point has one seed and one learning rate, where a higher one learns more "
    )
    note += f"and forgets more. {facts['date']}."
    figure, axes = new_figure(title, note, height=5.0)
    axes = axes[0, 0]
    points = [(before, "before", COLORS["reference"], "*")]
    points += [(row, name, COLORS["ours"], "s" if "ESFT" in name else "o") for name, row in rows.items()]
    for row, _, color, marker in points:
        # hollow, because points of similar variants overlap
        place = row["old_nats_per_token"], row["new_nats_per_token"]
        axes.plot(*place, marker, color=color, markersize=9, markerfacecolor="none", markeredgewidth=1.5)
    axes.set_xlabel("old text, documentation: loss in nats per token")
    axes.set_ylabel("new text, source code: loss in nats per token")
    axes.margins(0.08)
    arrow = {"arrowstyle": "->", "color": COLORS["floor"]}
    style = {"xycoords": "axes fraction", "color": COLORS["floor"], "size": 9, "arrowprops": arrow}
    axes.annotate("lower left is better", (0.01, 0.02), (0.07, 0.09), **style)
    name_points(axes, [Point(row["old_nats_per_token"], row["new_nats_per_token"], *x) for row, *x, _ in points])
    return figure
