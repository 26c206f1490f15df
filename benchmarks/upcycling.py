"""Trains upcycled experts and their dense parent on the same text: python -m benchmarks.upcycling FOLDER

FOLDER is a Llama made by `python -m benchmarks.llama FOLDER`. It is converted to latent attention and experts in one
step by several schemes. All models are trained on another text, the documentation inside Python, for the same number of
steps. Measured are the held-out loss during training, and how evenly the experts are chosen before and after.
`--out benchmarks/results/upcycling.json` writes the result there, with a plot beside it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging

import deepseek_latent  # noqa: F401  registers deepseek_v2
from deepseek_latent.commands.__main__ import main as command
from deepseek_latent.conversion.size import idle_parameters
from deepseek_latent.finetuning.activity import activity_of

from .llama import WINDOW, trained
from .machine import described
from .plots import draw_beside
from .plots.losses import draw_upcycling

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from pydoc_text import encode, split_topics

# row name: options of the command; an expert has at least 88 neurons, the parent's MLP has 704
SCHEMES = {
    "M0, 8 experts beside the MLP, 2 taken": "--scheme M0 --shared-experts 1 --routed-experts 8 --top-k 2",
    "M0, 50 % drawn anew": "--scheme M0 --shared-experts 1 --routed-experts 8 --top-k 2 --reinitialize 0.5",
    "M5, 4 groups, 1 taken": "--scheme M5 --shared-experts 2 --routed-experts 24 --groups 4 --top-k 6",
    "M5, 4 groups, 1 taken, router noise": "--scheme M5 --shared-experts 2 --routed-experts 24 --groups 4 --top-k 6 "
    "--router-noise 0.01",
}


def train_and_measure(model: PreTrainedModel, windows: Tensor, held_out: Tensor, options: argparse.Namespace) -> dict:
    set_seed(0)
    before = largest_share(model, held_out)
    losses = trained(model, windows, held_out, steps=options.steps, learning_rate=options.learning_rate)
    idle = idle_parameters(model.config) if model.config.model_type == "deepseek_v2" else 0
    return {
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters() - idle,
        "losses": losses,
        "busiest_share_before": before,
        "busiest_share_after": largest_share(model, held_out),
    }


def largest_share(model: PreTrainedModel, windows: Tensor) -> float | None:
    """The largest share of a layer's choices that one expert has. It is 1/e if e experts are chosen evenly."""
    if model.config.model_type != "deepseek_v2":
        return None
    return activity_of(model, windows).shares.max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file, and a plot beside it")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    windows, held_out = (
        tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
        for tokens in (encode(tokenizer, documents) for documents in split_topics())
    )
    result = described("python -m benchmarks.upcycling") | {"steps": options.steps, "tokens": windows.numel()}
    result["rows"] = {}
    for name, scheme in track({"dense parent": None, **SCHEMES}.items(), "training"):
        with tempfile.TemporaryDirectory() as folder:
            place = options.folder
            if scheme is not None:
                place = Path(folder, "experts")
                assert command(["convert", "upcycle", str(options.folder), str(place), *scheme.split()]) == 0
            model = AutoModelForCausalLM.from_pretrained(place)
        result["rows"][name] = train_and_measure(model, windows, held_out, options)
        print(json.dumps({name: result["rows"][name]}), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        draw_beside(options.out, draw_upcycling)


if __name__ == "__main__":
    main()
