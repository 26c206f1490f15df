"""What experts made of a dense model learn, and its dense parent: python -m benchmarks.upcycling FOLDER

FOLDER is a Llama made by `python -m benchmarks.llama FOLDER`. It becomes latent attention and experts in one go by
several schemes, and it and they learn another text, the documentation inside Python, for the same steps: held-out loss
on the way, and how even the experts are chosen before and after. `--out benchmarks/results/upcycling.json` keeps the
result, with a plot beside it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from pydoc_text import encode, split_topics

# by what they are called below; an expert is 88 neurons wide or more, the parent's MLP 704
SCHEMES = {
    "M0, 8 experts beside the MLP, 2 taken": "--scheme M0 --shared-experts 1 --routed-experts 8 --top-k 2",
    "M0, 50 % drawn anew": "--scheme M0 --shared-experts 1 --routed-experts 8 --top-k 2 --reinitialize 0.5",
    "M5, 4 groups, 1 taken": "--scheme M5 --shared-experts 2 --routed-experts 24 --groups 4 --top-k 6",
    "M5, 4 groups, 1 taken, router noise": "--scheme M5 --shared-experts 2 --routed-experts 24 --groups 4 --top-k 6 "
    "--router-noise 0.01",
}


def learnt(model: PreTrainedModel, windows: Tensor, judging: Tensor, options: argparse.Namespace) -> dict:
    set_seed(0)
    before = busiest(model, judging)
    losses = trained(model, windows, judging, steps=options.steps, learning_rate=options.learning_rate)
    idle = idle_parameters(model.config) if model.config.model_type == "deepseek_v2" else 0
    return {
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters() - idle,
        "losses": losses,
        "busiest_share_before": before,
        "busiest_share_after": busiest(model, judging),
    }


def busiest(model: PreTrainedModel, windows: Tensor) -> float | None:
    """The largest share of a layer's choices that one expert takes; of e experts, evenly chosen, it is 1/e."""
    if model.config.model_type != "deepseek_v2":
        return None
    return activity_of(model, windows).shares.max().item()


def plot(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, row in result["rows"].items():
        style = "k--" if name == "dense parent" else "-"
        axes.plot([x["step"] for x in row["losses"]], [x["loss"] for x in row["losses"]], style, label=name)
    axes.set(xlabel="steps", ylabel="held-out nats per token")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight", dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="write the result here as JSON, and a plot beside it")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    windows, judging = (
        tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
        for tokens in (encode(tokenizer, documents) for documents in split_topics())
    )
    result = described("python -m benchmarks.upcycling") | {"steps": options.steps, "tokens": windows.numel()}
    result["rows"] = {}
    for name, scheme in track({"dense parent": None, **SCHEMES}.items(), "learning"):
        with tempfile.TemporaryDirectory() as folder:
            place = options.folder
            if scheme is not None:
                place = Path(folder, "experts")
                assert command(["convert", "upcycle", str(options.folder), str(place), *scheme.split()]) == 0
            model = AutoModelForCausalLM.from_pretrained(place)
        result["rows"][name] = learnt(model, windows, judging, options)
        print(json.dumps({name: result["rows"][name]}), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        plot(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
