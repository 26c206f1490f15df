"""The heat map of `deepseek-latent experts --plot`."""

import math
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..finetuning.activity import Activity
from .plot_style import UNEVENNESS, new_figure, outlined, save, styled

NOTE = (
    "The load of an expert is its share of the choices of its layer over an even share. White: 1, as if all were "
    "chosen evenly. Purple: less. Orange: more. Black: never chosen."
)
LAYER_NAMES = 12  # at most so many beside a map


def save_loads(path: Path, texts: list[tuple[str, Activity]]) -> None:
    save(draw_loads(texts), path)


@styled
def draw_loads(texts: list[tuple[str, Activity]]) -> Figure:
    """Draws one heat map per named text: rows are layers, columns are experts."""
    num_layers, e = texts[0][1].shares.shape
    loads = [activity.shares * e for _, activity in texts]
    height = min(max(1.5, 0.14 * num_layers + 0.7), 3.6) * len(texts) + 0.9
    figure, axes = new_figure("Which experts a text is routed to", NOTE, rows=len(texts), height=height)
    # a load of 1/2 is as far from 1 as a load of 2; all that is lower than 1/highest has one color
    highest = max(4.0, *(load.max().item() for load in loads))
    norm = LogNorm(1 / highest, highest)
    for (name, activity), load, ax in zip(texts, loads, axes[:, 0]):
        chosen = np.ma.masked_equal(load.numpy(), 0)
        image = ax.imshow(chosen, aspect="auto", cmap=UNEVENNESS, norm=norm, interpolation="nearest")
        unused = int(activity.unused().sum())
        ax.set_title(
            f"{name}: the highest load is {load.max():.1f}, {unused:,} of {load.numel():,} experts are never chosen"
        )
        step = -(-num_layers // LAYER_NAMES)
        ax.set_yticks(range(0, num_layers, step), activity.layers[::step])
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylabel("layer")
        outlined(ax)
    axes[-1, 0].set_xlabel("expert")
    bar = figure.colorbar(image, ax=axes[:, 0].tolist(), label="load", aspect=30, extend="min")
    furthest = math.floor(math.log2(highest))
    bar.set_ticks([2.0**x for x in range(-furthest, furthest + 1)])
    bar.ax.yaxis.set_major_formatter(lambda load, _: f"{load:g}" if load >= 1 else f"1/{1 / load:g}")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return figure
