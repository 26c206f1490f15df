"""Draws each plot of benchmarks/results from the JSON file beside it; `python -m benchmarks.plots` draws all again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from deepseek_latent.commands.plot_style import save

from .losses import draw_compression, draw_finetuning, draw_healing, draw_upcycled_training, draw_upcycling
from .speed import draw_decoding, draw_gpu_decoding, draw_llama_cpp, draw_memory, draw_reading

RESULTS = Path(__file__).parents[1] / "results"
# from the name of a JSON file without its ending
PLOTS = {
    "compression": draw_compression,
    "decode": draw_decoding,
    "decode_float32": draw_decoding,
    "finetune": draw_finetuning,
    "gpu-decode": draw_gpu_decoding,
    "healing": draw_healing,
    "llama_cpp": draw_llama_cpp,
    "memory": draw_memory,
    "prefill": draw_reading,
    "prefill_float32": draw_reading,
    "upcycled_real": draw_upcycled_training,
    "upcycling": draw_upcycling,
}


def draw_beside(path: Path, draw: Callable[[dict], Figure]) -> Path:
    """Draws a JSON file of figures as the PNG of the same name, and returns its path."""
    plot = path.with_suffix(".png")
    save(draw(json.loads(path.read_text(encoding="utf-8"))), plot, source(path))
    return plot


def source(path: Path) -> str:
    """What a plot says of the file that it was drawn from. It tells a plot that is older than its figures."""
    return f"drawn from {path.name}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
