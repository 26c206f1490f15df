"""The rows of benchmarks.compression: measured, merged into a file, plotted."""

import json
from pathlib import Path

from torch import Tensor

from deepseek_latent.whole_files import save_text, whole_file

from .plots import draw_beside
from .plots.losses import METHODS, draw_compression


def compared(changed: Tensor, before: Tensor) -> dict:
    """Perplexity, its ratio to the source's, and that ratio's standard error, from losses [b] of the same windows."""
    difference = changed - before
    ratio = difference.mean().exp().item()
    return {
        "perplexity": round(changed.mean().exp().item(), 4),
        "ratio": round(ratio, 5),
        "standard_error": round(ratio * difference.std().item() / len(difference) ** 0.5, 5),
    }


def add_row(result: dict, row: dict, out: Path) -> None:
    """Writes a row among those that the file has by now, in place of one of the same method and size, and plots all.

    Raises ValueError if the others were measured on another model or on other texts.
    """
    rows = []
    if out.exists():
        written = json.loads(out.read_text())
        if written["setting"] != result["setting"]:
            raise ValueError(f"expected rows of the same model and texts in {out}, got others; choose another file.")
        rows = [x for x in written["rows"] if (x["method"], x["cached"]) != (row["method"], row["cached"])]
    order = list(METHODS)
    rows = sorted([*rows, row], key=lambda x: (order.index(x["method"]), -x["cached"]))
    with whole_file(out) as place:
        save_text(place, json.dumps(result | {"rows": rows}, indent=2) + "\n")
    draw_beside(out, draw_compression)
