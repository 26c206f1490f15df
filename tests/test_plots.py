"""The plots of benchmarks/results: drawn from the figures beside them, true when these change, and readable."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from benchmarks.plots import PLOTS, RESULTS, draw_beside, source
from benchmarks.plots.__main__ import main
from deepseek_latent.commands.plot_style import COLORS, shades
from tests.test_readme import ROOT

MEASURED = sorted(path.stem for path in RESULTS.glob("*.json") if path.stem in PLOTS)
MACHINE = {"date": "2026-11-27", "threads": 2, "cpu": "AMD EPYC"}


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def healing(runs: dict[str, tuple[float, float]]) -> dict:
    """What examples/heal.py writes, with the perplexity over the source's before and after each run."""

    def point(minutes: float, ratio: float) -> dict:
        texts = {"wiki.txt": ratio, "pydoc.txt": ratio + 0.01}
        figures = {"perplexity": 20.0, "of_source": 18.0, "standard_error_of_ratio": 0.01}
        return {"seconds": 60 * minutes, "texts": {text: figures | {"ratio": x} for text, x in texts.items()}}

    evaluated = {name: [point(0, before), point(30, after)] for name, (before, after) in runs.items()}
    return {name: MACHINE | {"evaluated": points} for name, points in evaluated.items()}


def upcycled(differences: dict[str, float]) -> dict:
    """What benchmarks.upcycled_training writes, with the experts' loss minus the dense model's after 80 steps."""
    losses = {
        "dense": {text: {"0": 3.0, "40": 2.9, "80": 2.8} for text in differences},
        "experts": {text: {"0": 3.0, "40": 2.9 + x / 2, "80": 2.8 + x} for text, x in differences.items()},
    }
    rows = {name: {"active_parameters": 1.6e8, "held_out_nats": of_model} for name, of_model in losses.items()}
    final = {text: {"nats": x, "standard_error": 0.002} for text, x in differences.items()}
    return MACHINE | {"steps": 80, "training_tokens": 163840, "differences": final, "rows": rows}


def three_methods() -> dict:
    """Compression by all methods, measured at all sizes."""

    def row(method: str, loss: float, fraction: float) -> dict:
        ratio = math.exp(loss * (1 / fraction - 1))
        texts = {text: {"ratio": ratio, "standard_error": 0.01 * ratio} for text in ("wiki_eval", "pydoc_eval")}
        return {"method": method, "fraction": fraction, "cached": 384 * fraction, "texts": texts}

    losses = {"ours": 0.1, "transmla": 0.3, "mha2mla": 0.5}
    fractions = (0.75, 0.5, 0.3125, 0.25, 0.125)
    return read("compression") | {"rows": [row(*x, fraction) for x in losses.items() for fraction in fractions]}


MADE = {
    "healing of two": (
        "healing",
        healing({"48 + 144, attention, 30 minutes": (1.1, 1.03), "32 + 88, lora": (1.6, 1.2)}),
    ),
    "healing of much": ("healing", healing({"16 + 32, everything, 30 minutes": (9.0, 2.5)})),
    "experts far apart": ("upcycled_real", upcycled({"wiki": -0.03, "pydoc": 0.01, "code": -0.001})),
    "experts near each other": ("upcycled_real", upcycled({"wiki": 0.004, "pydoc": 0.0042, "code": 0.0039})),
    "three methods of compression": ("compression", three_methods()),
    "one method of others": ("compression", three_methods() | {"rows": three_methods()["rows"][5:10]}),
    "decoding without transformers": (
        "decode",
        read("decode") | {"rows": [row for row in read("decode")["rows"] if "native_milliseconds" not in row]},
    ),
}


def texts_of(figure: Figure) -> list[Text]:
    """The texts that a reader sees."""
    ticks, seen = set(), []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs()):
                ticks.add(label)
                if low <= place <= high:
                    seen.append(label)
    seen += [text for text in figure.findobj(Text) if text not in ticks]
    return [text for text in seen if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize(
    ("name", "result"),
    [*((name, read(name)) for name in MEASURED), *MADE.values()],
    ids=[*MEASURED, *MADE],
)
def test_no_text_of_a_plot_overlaps_another_or_leaves_the_plot(name, result):
    figure = PLOTS[name](result)
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = [(text.get_text(), text.get_window_extent().padded(-0.5)) for text in texts_of(figure)]
    assert len(boxes) > 8
    for text, box in boxes:
        assert 0 <= box.x0 <= box.x1 <= width, text
        assert 0 <= box.y0 <= box.y1 <= height, text
    for (one, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), f"{one!r} and {other!r}"


def test_every_plot_was_drawn_from_the_figures_beside_it():
    plots = sorted(RESULTS.glob("*.png"))
    assert {path.stem for path in plots} >= set(MEASURED)
    for path in plots:
        if path.stem in PLOTS:
            with Image.open(path) as image:
                stale = f"{path.name} is older than its figures; python -m benchmarks.plots draws it again"
                assert image.text["Comment"] == source(path.with_suffix(".json")), stale


def test_one_command_draws_all_plots_of_a_folder(tmp_path, monkeypatch, capsys):
    for name, result in (("healing", MADE["healing of two"][1]), ("upcycled_real", MADE["experts far apart"][1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / "something_else.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["plots", str(tmp_path)])
    main()
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["healing.png", "upcycled_real.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in drawn]
    before = (tmp_path / "healing.png").read_bytes()
    draw_beside(tmp_path / "healing.json", PLOTS["healing"])
    assert (tmp_path / "healing.png").read_bytes() == before


def test_pages_show_plots_that_are_there():
    shown = []
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"\]\(([^)]*benchmarks/results/[^)]*\.png)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / name).is_file(), f"{page.name}: {name}"
            shown.append(name)
    assert shown


@pytest.mark.parametrize("factor", [0.5, 3.0, 250.0])
def test_the_title_of_decoding_follows_the_figures(factor):
    result = read("decode")
    for row in result["rows"]:
        if "native_milliseconds" in row:
            row["native_milliseconds"] = factor * row["kernels_milliseconds"]
    assert f"kernels decode {factor:g} times as fast" in " ".join(PLOTS["decode"](result).get_suptitle().split())


@pytest.mark.parametrize(
    ("differences", "finding"),
    [
        ({"wiki": -0.03, "pydoc": -0.01}, "0.010 to 0.030 nats below"),
        ({"wiki": 0.03, "pydoc": 0.01}, "0.010 to 0.030 nats above"),
        ({"wiki": 0.0301, "pydoc": 0.0299}, "0.030 nats above"),
        ({"wiki": 0.03, "pydoc": -0.01}, "\N{MINUS SIGN}0.010 to +0.030 nats from"),
    ],
    ids=["better", "worse", "worse by the same", "both"],
)
def test_the_title_of_upcycling_says_which_side_learned_more(differences, finding):
    title = PLOTS["upcycled_real"](upcycled(differences)).get_suptitle()
    assert f"After 80 steps, the experts' loss is {finding} the dense parent's" == " ".join(title.split())


def test_a_side_that_was_not_measured_is_named():
    missing = "Plain torch was not measured."
    result = read("prefill")
    assert missing not in PLOTS["prefill"](result).get_supxlabel().replace("\n", " ")
    result["runs"] = [run for run in result["runs"] if run["side"] != "plain"]
    assert missing in PLOTS["prefill"](result).get_supxlabel().replace("\n", " ")


# colors

# what each color becomes for a reader without one kind of cone, in linear RGB (Machado et al. 2009, severity 1)
NO_RED = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
NO_GREEN = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
NO_BLUE = [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
TOGETHER = [
    ("transformers", "ours", "kernels", "int8", "floor"),
    ("transformers", "ours", "kernels", "replayed", "floor"),
    ("llama.cpp", "kernels", "floor"),
    ("ours", "transmla", "mha2mla", "reference"),
]


def linear(color: str) -> np.ndarray:
    x = np.array(to_rgb(color))
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB, in which a distance of 10 is seen at a glance."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ rgb.clip(0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", [np.eye(3), NO_RED, NO_GREEN, NO_BLUE], ids=["all", "no red", "no green", "no blue"])
def test_colors_of_one_plot_differ_for_every_reader(seen):
    for one, other in itertools.chain.from_iterable(itertools.combinations(names, 2) for names in TOGETHER):
        distance = np.linalg.norm(lab(seen @ linear(COLORS[one])) - lab(seen @ linear(COLORS[other])))
        assert distance > 10, f"{one} and {other}"


def test_colors_are_dark_enough_for_text():
    assert len(set(COLORS.values())) == len(COLORS)
    for color in (*COLORS.values(), *shades(COLORS["ours"], 4), *shades(COLORS["kernels"], 3)):
        luminance = linear(color) @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) > 3, color
