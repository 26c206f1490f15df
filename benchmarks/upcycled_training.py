"""Trains a real model's upcycled form and the dense model on the same text: python -m benchmarks.upcycled_training

    python -m benchmarks.upcycled_training SOURCE FOLDER --texts A B C --evaluate D E F \
        --out benchmarks/results/upcycled_real.json

SOURCE is a Llama, Mistral or Qwen2. Its exact form with latent attention is the dense parent; the same cut into experts
is trained for as many steps, on the same windows in the same order. Measured are the losses on the texts of
`--evaluate`, load and entropy of the router, and whether texts use different experts. Plots of the difference of the
losses and of the experts that are chosen are written beside the JSON file. The default steps take about half an hour
for the experts and a third less for the dense model, on two cores for a model of 135 million parameters.

FOLDER keeps the converted models, the trained ones, and everything that an interrupted training needs to go on, up to
12 GB for that model. The same command continues from the last of eight points, with the same options. Remove FOLDER to
start over.
"""

import argparse
import contextlib
import io
import itertools
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from deepseek_latent import RouterStatistics
from deepseek_latent.commands.__main__ import main as command
from deepseek_latent.conversion.loading import load_model
from deepseek_latent.conversion.size import idle_parameters
from deepseek_latent.conversion.text import load_tokenizer, read_text

from .llama import Rows
from .machine import described
from .plots import draw_beside
from .plots.losses import draw_upcycled_training

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from healing import mix, nats, read_windows

DENSE, EXPERTS = "dense", "experts"
# an expert has an eighth of the MLP's neurons; those that are chosen add half of it to the MLP, which stays whole
SCHEME = "--scheme M0 --shared-experts 8 --routed-experts 16 --top-k 4"
BATCH = 8
EVALUATIONS = 8
# of each text, to compare the experts that it uses: about 16,000 tokens
CHARACTERS = 64_000


def convert(options: argparse.Namespace) -> None:
    """Writes the two models that are trained into FOLDER, unless they are there."""
    dense, experts = options.folder / DENSE, options.folder / EXPERTS
    if not dense.exists():
        assert command(["convert", "gqa-to-mla", str(options.source), str(dense)]) == 0
    if not experts.exists():
        assert command(["convert", "upcycle", str(dense), str(experts), *options.scheme.split()]) == 0


def train(name: str, windows: Tensor, held_out: dict[str, Tensor], options: argparse.Namespace) -> dict:
    """Trains one of the models, writes it to FOLDER/NAME-trained, and returns its figures, also if that is done."""
    done = options.folder / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    set_seed(0)
    model = load_model(options.folder / name, dtype=torch.float32)
    tokenizer, runs = load_tokenizer(options.folder / name), options.folder / f"{name}-runs"
    interval = max(options.steps // EVALUATIONS, 1)
    arguments = TrainingArguments(
        output_dir=str(runs),
        max_steps=options.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=BATCH,
        per_device_eval_batch_size=1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.05,
        adam_beta2=0.95,
        logging_steps=interval,
        eval_strategy="steps",
        eval_steps=interval,
        eval_on_start=True,
        bf16=options.bfloat16,
        # without it, transformers refuses bf16 where there is no GPU
        use_cpu=not torch.cuda.is_available(),
        prediction_loss_only=True,
        save_steps=interval,
        save_total_limit=1,
        dataloader_pin_memory=False,
        report_to="none",
    )
    rows = {text: Rows(of_text) for text, of_text in held_out.items()}
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(windows), eval_dataset=rows)
    if name == EXPERTS:
        trainer.add_callback(RouterStatistics(trainer))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(runs)) if runs.exists() else None)
    model.eval()
    model.save_pretrained(options.folder / f"{name}-trained")
    tokenizer.save_pretrained(options.folder / f"{name}-trained")
    history = trainer.state.log_history
    figures = {
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters() - idle_parameters(model.config),
        "held_out_nats": {text: of_steps(history, f"eval_{text}_loss") for text in held_out},
        "router": [entry for entry in history if "router/load" in entry],
        "nats_of_windows": {text: nats(model, of_text).tolist() for text, of_text in held_out.items()},
    }
    done.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(runs)
    return figures


def of_steps(history: list[dict], key: str) -> dict[str, float]:
    """A figure of a trainer's log, by step."""
    found = {}
    for entry in history:
        if key in entry:
            # a training that goes on evaluates its step once more
            found.setdefault(str(entry["step"]), entry[key])
    return found


def final_differences(rows: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Experts minus dense after the training: nats per token, with the standard error over windows."""
    found = {}
    for text, of_experts in rows[EXPERTS]["nats_of_windows"].items():
        difference = torch.tensor(of_experts) - torch.tensor(rows[DENSE]["nats_of_windows"][text])
        error = difference.std() / len(difference) ** 0.5
        found[text] = {"nats": difference.mean().item(), "standard_error": error.item()}
    return found


def beginnings(files: list[Path], folder: Path) -> list[Path]:
    """The first characters of each text, in files of the same names; enough to tell texts apart by their experts."""
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file.name).write_text(read_text(file)[:CHARACTERS], encoding="utf-8")
    return [folder / file.name for file in files]


def specialization(model: Path, files: list[Path], plot: Path | None = None) -> list[dict]:
    """What `deepseek-latent experts` says about each pair of texts: distances between texts and between halves."""
    options = ["--text", str(files[0]), "--against", *map(str, files[1:]), "--json"]
    options += ["--plot", str(plot)] if plot else []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert command(["experts", str(model), *options]) == 0
    return json.loads(printed.getvalue())["comparisons"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--texts", nargs="+", type=Path, required=True, metavar="FILE", help="texts to train on")
    parser.add_argument("--evaluate", nargs="+", type=Path, required=True, metavar="FILE", help="other texts")
    parser.add_argument("--scheme", default=SCHEME, help=f"options of convert upcycle (default: {SCHEME})")
    parser.add_argument("--steps", type=int, default=80, help="of 8 windows of 256 tokens (default: 80)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--bfloat16", action="store_true", help="train in mixed precision")
    parser.add_argument("--windows", type=int, default=32, help="windows to evaluate of each text (default: 32)")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file, and plots beside it")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    convert(options)
    set_seed(0)
    texts = mix([read_windows(options.source, file) for file in options.texts])
    windows = torch.stack(list(itertools.islice(texts, options.steps * BATCH)))
    held_out = {}
    for file in options.evaluate:
        of_file = read_windows(options.source, file)
        held_out[file.stem] = of_file[:: max(len(of_file) // options.windows, 1)][: options.windows]
    texts_to_compare = beginnings(options.evaluate, options.folder / "texts")
    rows = {name: train(name, windows, held_out, options) for name in (EXPERTS, DENSE)}
    result = described("python -m benchmarks.upcycled_training") | {
        "scheme": options.scheme,
        "steps": options.steps,
        "training_tokens": windows.numel(),
        "learning_rate": options.learning_rate,
        "bfloat16": options.bfloat16,
        "differences": final_differences(rows),
        "texts_before": specialization(options.folder / EXPERTS, texts_to_compare),
        "texts_after": specialization(
            options.folder / f"{EXPERTS}-trained",
            texts_to_compare,
            options.out.with_name(f"{options.out.stem}_experts.png") if options.out else None,
        ),
        "rows": rows,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        draw_beside(options.out, draw_upcycled_training)


if __name__ == "__main__":
    main()
