"""The rows of benchmarks.compression: measured, merged into a file, plotted."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from deepseek_latent.whole_files import save_text, whole_file

LABELS = {"ours": "deepseek-latent", "transmla": "recipe of TransMLA", "mha2mla": "recipe of MHA2MLA"}


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
    order = list(LABELS)
    rows = sorted([*rows, row], key=lambda x: (order.index(x["method"]), -x["cached"]))
    with whole_file(out) as place:
        save_text(place, json.dumps(result | {"rows": rows}, indent=2) + "\n")
    plot(result | {"rows": rows}, out.with_suffix(".png"))


def plot(result: dict, path: Path) -> None:
    texts = result["setting"]["evaluation"]
    figure, all_axes = plt.subplots(1, len(texts), figsize=(5.5 * len(texts), 4.2), sharey=True, squeeze=False)
    for axes, text in zip(all_axes[0], texts):
        for method, label in LABELS.items():
            rows = [row for row in result["rows"] if row["method"] == method]
            ratios = [row["texts"][text]["ratio"] for row in rows]
            errors = [row["texts"][text]["standard_error"] for row in rows]
            if rows:
                axes.errorbar([row["fraction"] for row in rows], ratios, errors, marker="o", capsize=2, label=label)
        axes.axhline(1, linestyle="--", color="gray")
        axes.set(yscale="log", xlabel="fraction of the source's cache", title=text)
        axes.grid(True, which="both", alpha=0.3)
    all_axes[0][0].set_ylabel("perplexity over the source's")
    all_axes[0][0].legend()
    figure.savefig(path, bbox_inches="tight", dpi=130, metadata={"Software": None})
    plt.close(figure)
