"""What the benchmarks' plots share: numbers as people write them, axes, and names beside lines and points."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from matplotlib.transforms import Bbox

MARKERS = "osD^vPX"
# white around a name keeps it readable where it crosses a line
NAME = {"size": 9, "path_effects": [withStroke(linewidth=2.5, foreground="white")]}


# words and numbers


def machine(result: dict) -> str:
    if "gpu" in result:
        return f"One {result['gpu']}, {result['date']}."
    cpu = result["cpu"].replace("(R)", "")
    return f"{result['threads']} thread{'s' if result['threads'] > 1 else ''} of an {cpu}, {result['date']}."


def number(x: float) -> str:
    """Three digits, without an exponent."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def times(ratio: float) -> str:
    """Two digits, as befits a ratio of measured times."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def tokens(count: float) -> str:
    """16384 is 16K."""
    return f"{count / 1024:g}K" if count >= 1024 else f"{count:g}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def signed(x: float, digits: int = 3) -> str:
    return f"{x:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def size(num_bytes: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g}\N{NO-BREAK SPACE}{name}"
    return f"{num_bytes / 1e3:.3g}\N{NO-BREAK SPACE}kB"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# axes


def token_axis(axes: Axes, counts: Sequence[int], label: str) -> None:
    """A logarithmic axis with a tick at each count of tokens."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(counts))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda count, _: tokens(count))
    axes.set_xlabel(f"{label} (1K is 1,024)")


def from_zero(axes: Axes) -> None:
    """A vertical axis that shows how large values are, not only how they differ. Call it when everything is drawn."""
    axes.set_ylim(0, 1.04 * axes.get_ylim()[1])


def log_axis(axis: Axis, write: Callable[[float], str] = number) -> None:
    """A logarithmic axis whose ticks are written out. Call it when everything is drawn."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda x, _: write(x))


# names


def name_lines(axes: Axes, lines: Sequence[tuple[Line2D, str]]) -> None:
    """Writes each line's name to the right of its last point, in its color, and moves apart names that would overlap.

    Call it when everything else is drawn.
    """
    names = []
    for line, name in lines:
        end = line.get_xydata()[-1]
        style = {"va": "center", "color": line.get_color()} | NAME
        names.append(axes.annotate(name, end, (7, 0), textcoords="offset points", **style))
    # the axes have their final place only after the names have theirs
    axes.figure.draw_without_rendering()
    points_per_pixel = 72 / axes.figure.dpi
    boxes, bottom = [name.get_window_extent() for name in names], axes.get_window_extent().y0
    for name, pixels in zip(names, moves_apart(boxes, bottom)):
        name.xyann = (7, pixels * points_per_pixel)


def moves_apart(boxes: Sequence[Bbox], bottom: float) -> list[float]:
    """How far each box has to go up or down so that no two overlap and none is below the bottom, in pixels."""
    moves = [0.0] * len(boxes)
    order = sorted(range(len(boxes)), key=lambda i: boxes[i].y0 + boxes[i].y1)
    for _ in range(500):
        for low, high in itertools.combinations(order, 2):
            beside = boxes[low].x1 < boxes[high].x0 or boxes[high].x1 < boxes[low].x0
            overlap = boxes[low].y1 + moves[low] + 1 - boxes[high].y0 - moves[high]
            if overlap > 0 and not beside:
                moves[low], moves[high] = moves[low] - overlap / 2, moves[high] + overlap / 2
        moves = [max(move, bottom - box.y0) for move, box in zip(moves, boxes)]
    return moves


class Point(NamedTuple):
    x: float
    y: float
    name: str
    color: str


# where a name may stand beside its point: horizontal and vertical alignment
SIDES = [("left", "center"), ("right", "center"), ("center", "bottom"), ("center", "top")]
SIDES += list(itertools.product(("left", "right"), ("bottom", "top")))
OFFSETS = {"left": 8, "right": -8, "center": 0, "bottom": 8, "top": -8}


def name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Writes each point's name on that side of it where it hides least. Call it when everything else is drawn."""
    axes.figure.draw_without_rendering()
    places = axes.transData.transform([point[:2] for point in points])
    frame, taken = axes.get_window_extent(), boxes_along(axes.lines)
    for i, point in enumerate(points):
        candidates = [name_at(axes, point, *side) for side in SIDES]
        # a name near another point would seem to be that point's
        others = [box_around(place, 14) for k, place in enumerate(places) if k != i]
        costs = []
        for box in (candidate.get_window_extent() for candidate in candidates):
            outside = box.width * box.height - covered(box, [frame])
            costs.append(outside + covered(box, taken + others))
        best = candidates.pop(costs.index(min(costs)))
        taken.append(best.get_window_extent())
        for candidate in candidates:
            candidate.remove()


def boxes_along(lines: Sequence[Line2D]) -> list[Bbox]:
    """Small boxes along lines between their points, in pixels."""
    boxes = []
    for line in lines:
        places = line.get_transform().transform(line.get_xydata())
        for start, end in itertools.pairwise(places):
            count = int(np.abs(end - start).max() // 6) + 2
            boxes += [box_around(place, 3) for place in np.linspace(start, end, count)]
    return boxes


def box_around(place: np.ndarray, distance: float) -> Bbox:
    return Bbox([place - distance, place + distance])


def name_at(axes: Axes, point: Point, horizontal: str, vertical: str) -> Annotation:
    offset = (OFFSETS[horizontal], OFFSETS[vertical])
    style = {"ha": horizontal, "va": vertical, "color": point.color} | NAME
    return axes.annotate(point.name, point[:2], offset, textcoords="offset points", **style)


def covered(box: Bbox, others: Sequence[Bbox]) -> float:
    """The area of a box that others cover, in square pixels, counted for each of them."""
    x0, y0, x1, y1 = np.array([other.extents for other in others]).T
    widths = np.minimum(x1, box.x1) - np.maximum(x0, box.x0)
    heights = np.minimum(y1, box.y1) - np.maximum(y0, box.y0)
    return (widths.clip(0) * heights.clip(0)).sum()
