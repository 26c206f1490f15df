"""The plots of time and memory against context. Each function takes what a benchmark wrote, and returns a figure."""

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deepseek_latent.commands.plot_style import COLORS, new_figure, shades, styled

from .marks import from_zero, log_axis, machine, name_lines, number, percent, size, times, token_axis, tokens


class Side(NamedTuple):
    name: str
    color: str
    marker: str


# what the benchmarks call a side
SIDES = {
    "native": Side("transformers' own class", COLORS["transformers"], "s"),
    "plain": Side("deepseek-latent", COLORS["ours"], "o"),
    "ours": Side("deepseek-latent", COLORS["ours"], "o"),
    "kernels": Side("with kernels", COLORS["kernels"], "D"),
    "optimized": Side("with kernels", COLORS["kernels"], "D"),
    "int8": Side("with kernels, int8 weights", COLORS["int8"], "^"),
    "graphs": Side("with kernels, steps replayed", COLORS["replayed"], "v"),
    "llama_cpp": Side("llama.cpp", COLORS["llama.cpp"], "P"),
}
FLOOR = Side("floor", COLORS["floor"], "")
LITE_4 = "Lite-4 has the widths of DeepSeek-V2-Lite, 4 of its 27 layers, and random weights."
OURS = "deepseek-latent runs in plain torch, or with its kernels."


def draw_line(axes: Axes, side: Side, points: list[tuple[float, float]], style: str = "-") -> Line2D:
    (line,) = axes.plot(*zip(*points), style, color=side.color, marker=side.marker)
    return line


def draw_steps(axes: Axes, rows: list[dict], sides: list[str]) -> None:
    """Milliseconds per decoded token of one sequence against context, for these sides and the floor."""
    lines = []
    for side in sides:
        points = [(row["context"], row[f"{side}_milliseconds"]) for row in rows if f"{side}_milliseconds" in row]
        lines.append((draw_line(axes, SIDES[side], points), SIDES[side].name))
    floor = [(row["context"], row["floor_milliseconds"]) for row in rows]
    lines.append((draw_line(axes, FLOOR, floor, "--"), FLOOR.name))
    axes.set_ylabel("milliseconds per decoded token")
    token_axis(axes, [row["context"] for row in rows], "tokens in the cache")
    log_axis(axes.yaxis)
    name_lines(axes, lines)


@styled
def draw_decoding(result: dict) -> Figure:
    rows = [row for row in result["rows"] if row["batch"] == 1]
    dtype, compared = result["model"].split(", ")[1], [row for row in rows if "native_milliseconds" in row]
    last = max(compared or rows, key=lambda row: row["context"])
    title = f"Over {tokens(last['context'])} cached tokens, deepseek-latent's kernels decode "
    if compared:
        ratio = last["native_milliseconds"] / last["kernels_milliseconds"]
        title += f"{times(ratio)} times as fast as transformers' own class ({dtype})"
    else:
        title += f"a token in {number(last['kernels_milliseconds'])} ms ({dtype})"
    note = f"{LITE_4} {OURS} Floor: the time to read the {dtype} weights that a token needs, and the cache, once at "
    note += "the bandwidth of the memory, or to compute the cache's products if that takes longer. int8 weights are "
    note += f"fewer bytes, and may be read faster. One sequence, {dtype}. {machine(result)}"
    figure, axes = new_figure(title, note)
    draw_steps(axes[0, 0], rows, [side for side in ("native", "plain", "kernels", "int8") if measured(rows, side)])
    return figure


@styled
def draw_gpu_decoding(result: dict) -> Figure:
    rows = [row for row in result["rows"] if row["batch"] == 1]
    last = max(rows, key=lambda row: row["context"])
    replayed, ratio = last["graphs_milliseconds"], last["graphs_milliseconds"] / last["floor_milliseconds"]
    title = f"A replayed step over {tokens(last['context'])} cached tokens takes {number(replayed)} ms, "
    title += f"{times(ratio)} times the floor"
    note = f"DeepSeek-V2-Lite with random weights, bfloat16, one sequence. {OURS} Replayed: a step is captured once as "
    note += "a CUDA graph, and no longer waits for the host. Floor: the time to read the weights that a step needs, "
    note += f"and the cache, once at the rate of a copy. {machine(result)}"
    figure, axes = new_figure(title, note)
    sides = [side for side in ("native", "ours", "optimized", "graphs") if measured(rows, side)]
    draw_steps(axes[0, 0], rows, sides)
    return figure


def measured(rows: list[dict], side: str) -> bool:
    return any(f"{side}_milliseconds" in row for row in rows)


@styled
def draw_llama_cpp(result: dict) -> Figure:
    rows = sorted(result["rows"], key=lambda row: row["context"])
    ratios = [row["llama_cpp_milliseconds"] / row["kernels_milliseconds"] for row in rows]
    title = f"deepseek-latent's kernels decode {times(min(ratios))} to {times(max(ratios))} times as fast as llama.cpp"
    note = f"{LITE_4} Floor: the time to read the weights that a token needs once at the bandwidth of the memory. Both "
    note += (
        "read the same bfloat16 weights and were measured in turn; llama.cpp has its default settings and a float16 "
    )
    note += f"cache (llama-cpp-python {result['llama_cpp_python']}). One sequence. {machine(result)}"
    figure, axes = new_figure(title, note)
    axes, lines = axes[0, 0], []
    for side in ("llama_cpp", "kernels"):
        points = [(row["context"], row[f"{side}_milliseconds"]) for row in rows]
        lines.append((draw_line(axes, SIDES[side], points), SIDES[side].name))
    floor = [(row["context"], row["reading_the_weights_milliseconds"]) for row in rows]
    lines.append((draw_line(axes, FLOOR, floor, "--"), FLOOR.name))
    axes.set_ylabel("milliseconds per decoded token")
    from_zero(axes)
    token_axis(axes, [row["context"] for row in rows], "tokens in the cache")
    name_lines(axes, lines)
    return figure


@styled
def draw_memory(result: dict) -> Figure:
    kernels = shades(COLORS["kernels"], 3)
    sides = {
        "native": SIDES["native"],
        "bfloat16": Side("with kernels, bfloat16 cache", kernels[0], "D"),
        "int8": Side("with kernels, int8 cache", kernels[1], "D"),
        "int4": Side("with kernels, int4 cache", kernels[2], "D"),
    }
    peaks = {side: {} for side in sides}
    for row in result["rows"]:
        peak = row["growth_while_cached_bytes"] + row["further_peak_while_decoding_bytes"]
        peaks[row["side"]][row["tokens"]] = peak
    last = max(peaks["native"])
    title = f"Over {tokens(last)} cached tokens, deepseek-latent decodes in {size(peaks['bfloat16'][last])} above the "
    title += f"weights, transformers' own class in {size(peaks['native'][last])}"
    note = f"{LITE_4} Peak of the process while the cache is filled and tokens are decoded, above what it held before. "
    note += f"Weights are in bfloat16. One sequence. {machine(result)}"
    figure, axes = new_figure(title, note)
    axes = axes[0, 0]
    lines = [(draw_line(axes, side, sorted(peaks[name].items())), side.name) for name, side in sides.items()]
    axes.set_ylabel("memory above the weights")
    token_axis(axes, [row["tokens"] for row in result["rows"]], "tokens in the cache")
    log_axis(axes.yaxis, size)
    name_lines(axes, lines)
    return figure


@styled
def draw_reading(result: dict) -> Figure:
    """Reading a prompt: tokens per second and memory."""
    runs = {side: {} for side in ("native", "plain", "kernels")}
    for run in result["runs"]:
        runs[run["side"]][run["tokens"]] = run
    ours = "kernels" if runs["kernels"] else "plain"
    last = max(runs[ours].keys() & runs["native"].keys())
    own, native = runs[ours][last], runs["native"][last]
    speed = native["seconds"] / own["seconds"]
    memory = own["memory_above_weights_bytes"] / native["memory_above_weights_bytes"]
    dtype = result["model"].split(", ")[1]
    title = "deepseek-latent's kernels read" if runs["kernels"] else "deepseek-latent reads"
    title += f" {tokens(last)} tokens {times(speed)} times as fast as transformers' own "
    title += f"class, in {percent(memory)} of its memory ({dtype})"
    note = f"{LITE_4} {OURS} Memory is the peak of the process while it reads a prompt, above the weights. "
    note += f"{'' if runs['plain'] else 'Plain torch was not measured. '}{dtype}. {machine(result)}"
    figure, axes = new_figure(title, note, columns=2, height=4.2)
    speeds, memories = [], []
    for side, of_side in runs.items():
        if of_side:
            rates = [(count, count / run["seconds"]) for count, run in sorted(of_side.items())]
            peaks = [(count, run["memory_above_weights_bytes"]) for count, run in sorted(of_side.items())]
            # the name of transformers' class is in the title
            name = SIDES[side].name.removesuffix("' own class")
            speeds.append((draw_line(axes[0, 0], SIDES[side], rates), name))
            memories.append((draw_line(axes[0, 1], SIDES[side], peaks), name))
    for each in axes[0]:
        token_axis(each, [run["tokens"] for run in result["runs"]], "tokens read")
    axes[0, 0].set_ylabel("tokens per second")
    from_zero(axes[0, 0])
    axes[0, 1].set_ylabel("memory above the weights")
    log_axis(axes[0, 1].yaxis, size)
    name_lines(axes[0, 0], speeds)
    name_lines(axes[0, 1], memories)
    return figure
