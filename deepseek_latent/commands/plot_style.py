"""The one style of every plot: its colors, a figure with a title and a note, and the file that is written."""

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure

from ..whole_files import whole_file

# A color means one thing in every plot. Each is dark enough for text on white, and color-blind readers can tell apart
# those that meet in one plot.
COLORS = {
    "ours": "#0072B2",  # this package, in plain torch where that matters
    "kernels": "#009E73",  # this package with its kernels
    "int8": "#CC4C99",  # this package with its kernels and int8 weights
    "replayed": "#332288",  # this package with its kernels, steps replayed from a CUDA graph
    "transformers": "#D55E00",  # transformers' own class
    "llama.cpp": "#997700",
    "floor": "#5C5C5C",  # what the memory's bandwidth allows
    "reference": "#222222",  # what a model was made from: its source, its parent, its checkpoint
    "transmla": "#882255",  # the recipe of TransMLA
    "mha2mla": "#CC6677",  # the recipe of MHA2MLA
}
# for a quantity that is 1 where nothing is uneven: purple below, white at 1, orange above, black where there is none
UNEVENNESS = ListedColormap(matplotlib.colormaps["PuOr_r"](np.linspace(0.1, 0.9, 255))).with_extremes(bad="black")
WIDTH = 8.0  # inches; a page of GitHub shows 100 pixels of each
PIXELS_PER_INCH = 160
# decorates a function that draws
styled = matplotlib.rc_context(
    {
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#666666",
        "axes.grid": True,
        "grid.color": "#E4E4E4",
        "xtick.color": "#444444",
        "ytick.color": "#444444",
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
        # a name of a file may have dollars
        "text.parse_math": False,
    }
)


def new_figure(
    title: str, note: str, *, rows: int = 1, columns: int = 1, height: float = 4.6, **options
) -> tuple[Figure, np.ndarray]:
    """A figure with a title above and a note below, and its axes [rows columns]; takes options of `subplots`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(in_lines(title, 82), x=0.01, ha="left", weight="bold", size=11.5)
    figure.supxlabel(in_lines(note, 124), x=0.01, ha="left", size=8.5, color="#555555")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def in_lines(text: str, width: int) -> str:
    """As few lines as possible, and these about equally long."""
    lines = textwrap.wrap(text, width, break_on_hyphens=False)
    while len(narrower := textwrap.wrap(text, width - 1, break_on_hyphens=False)) == len(lines):
        lines, width = narrower, width - 1
    return "\n".join(lines)


def shades(color: str, count: int) -> list[tuple[float, float, float]]:
    """Shades of one color, from dark to light, for variants of what it stands for; one shade is the color itself."""
    color, black, white = (np.array(to_rgb(each)) for each in (color, "black", "white"))
    mixed = np.linspace(-0.5, 0.1, count) if count > 1 else [0.0]
    return [tuple(color + abs(x) * ((black if x < 0 else white) - color)) for x in mixed]


def outlined(axes: Axes) -> None:
    """Shows the axes as a frame without a grid, for an image."""
    axes.grid(False)
    axes.spines[["top", "right"]].set_visible(True)


def save(figure: Figure, path: Path, comment: str | None = None) -> None:
    """Writes the figure as a PNG, with a comment in the file. The same figure and comment give the same bytes."""
    with whole_file(path) as place:
        figure.savefig(place, format="png", dpi=PIXELS_PER_INCH, metadata={"Software": None, "Comment": comment})
