"""What the fine-tuning examples share: the text to learn, the losses, and the files that they are written to.

The checkpoint examples/pydoc-tiny has learned documentation. Here it learns source code, the modules of Python's
standard library. It is evaluated on other modules and on the documentation that was held out when it was trained.
"""

import json
import platform
import sys
import sysconfig
import time
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from pydoc_text import BETWEEN_DOCUMENTS, WINDOW, Windows, encode
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

sys.path.insert(0, str(Path(__file__).parent.parent))

import deepseek_latent  # noqa: F401  registers deepseek_v2
from benchmarks.machine import described
from benchmarks.plots import draw_beside
from benchmarks.plots.losses import draw_finetuning

CHECKPOINT = Path(__file__).parent / "pydoc-tiny"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
BATCH = 8
EVALUATED = 96  # windows of new text
BEFORE = "before"


class Texts(NamedTuple):
    training: Windows
    new: Tensor  # [windows s]  source code of other modules
    old: Tensor  # [windows s]  documentation on topics that the checkpoint has not learned


# takes the checkpoint in float32 and returns it fine-tuned
Variant = Callable[[PreTrainedModel, Texts, Namespace], nn.Module]


def split_modules() -> tuple[list[str], list[str]]:
    """The standard library's single-file modules, split by their names into training and held-out text."""
    training, held_out = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.stem in sys.stdlib_module_names:
            side = held_out if zlib.crc32(path.name.encode()) % 10 == 1 else training
            side.append(path.read_text(encoding="utf-8"))
    return training, held_out


def read_texts() -> Texts:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    topics = (CHECKPOINT / "held_out.txt").read_text(encoding="utf-8").split(BETWEEN_DOCUMENTS)
    training, new, old = (
        Windows(tokens, torch.arange(0, len(tokens) - WINDOW + 1, WINDOW))
        for tokens in (encode(tokenizer, documents) for documents in (*split_modules(), topics))
    )
    # a sample of all new modules, so that an evaluation takes seconds
    return Texts(training, new.rows()[:: max(len(new) // EVALUATED, 1)][:EVALUATED], old.rows())


@torch.no_grad()
def nats_per_token(model: PreTrainedModel, windows: Tensor) -> float:
    model.eval()
    sums = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(BATCH)]
    return sum(sums) / len(windows)


def training_options(folder: str, options: Namespace) -> dict:
    """Options for any trainer's `TrainingArguments`, so that all variants see the same windows in the same order."""
    return {
        "output_dir": folder,
        "max_steps": options.steps,
        "seed": options.seed,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": max(options.steps // 10, 1),
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "report_to": "none",
    }


def read_options(description: str, *, learning_rate: float) -> Namespace:
    parser = ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of finetune.json (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=learning_rate, help="the highest of the schedule (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}.")
    return options


def row_of(variant: Variant, texts: Texts, options: Namespace) -> dict[str, float | int]:
    set_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    start = time.perf_counter()
    model = variant(model, texts, options)
    seconds = time.perf_counter() - start
    return {
        "learning_rate": options.learning_rate,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "new_nats_per_token": nats_per_token(model, texts.new),
        "old_nats_per_token": nats_per_token(model, texts.old),
        "seconds": round(seconds, 1),
    }


def compare(variants: dict[str, Variant], options: Namespace) -> None:
    """Evaluates the checkpoint and its variants, adds the results to finetune.json, and prints and plots that file.

    Results of other programs in finetune.json are kept.
    """
    texts, rows = read_texts(), {}
    for name, variant in {BEFORE: lambda model, *_: model.requires_grad_(False), **variants}.items():
        rows[name] = row_of(variant, texts, options)
        print(json.dumps({name: rows[name]}), flush=True)

    program, path = Path(sys.argv[0]).name, options.out / "finetune.json"
    facts = described(f"python examples/{program}") | {"peft": peft.__version__, "python": platform.python_version()}
    facts |= {name: getattr(options, name) for name in ("steps", "seed")}
    facts |= {"training_tokens": len(texts.training) * WINDOW, "epochs": options.steps * BATCH / len(texts.training)}
    facts |= {"new_tokens": texts.new.numel(), "old_tokens": texts.old.numel(), "rows": rows}
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results | {program: facts}, indent=2) + "\n", encoding="utf-8")
    rows = {name: row for each in (results | {program: facts}).values() for name, row in each["rows"].items()}
    print(table(rows))
    draw_beside(path, draw_finetuning)


def table(rows: dict[str, dict]) -> str:
    """Returns a Markdown table with losses in nats per token."""
    columns = (
        "what is trained",
        "trained parameters",
        "learning rate",
        "loss on source",
        "loss on documentation",
        "seconds",
    )
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, row in rows.items():
        losses = f"{row['new_nats_per_token']:.3f} | {row['old_nats_per_token']:.3f}"
        rate = f"{row['learning_rate']:g}" if row["trainable_parameters"] else ""
        lines.append(f"| {name} | {row['trainable_parameters']:,} | {rate} | {losses} | {row['seconds']:.0f} |")
    return "\n".join(lines)
