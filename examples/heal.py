"""Trains a compressed model to predict what its source predicts.

    python examples/heal.py COMPRESSED SOURCE OUT --texts wiki.txt news.txt --evaluate other.txt --minutes 30

COMPRESSED is a folder that `deepseek-latent convert gqa-to-mla --kv-lora-rank C --qk-rope-head-dim R` wrote, SOURCE the
model that it was made from, OUT the folder to write. Compression changes keys and values, and the projections of
attention can make up for some of that. The loss is the Kullback-Leibler divergence of the distributions over the next
token, from the source's, at every token of the texts. It needs no labels.

The perplexity on each text of `--evaluate` is measured before, along the way and after, in both models on the same
windows. These texts should not be among those trained on. `--figures benchmarks/results/healing.json` adds the figures
to that file.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))

from healing import LEARNING_RATES, choose_parameters, compare, heal, mix, nats, read_windows, trainable

from benchmarks.machine import described
from deepseek_latent import DeepseekV2ForCausalLM
from deepseek_latent.conversion.loading import load_model
from deepseek_latent.conversion.source import companion_files
from deepseek_latent.conversion.text import check_vocabulary
from deepseek_latent.whole_files import whole_file, whole_folder


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed", metavar="COMPRESSED", type=Path)
    parser.add_argument("source", metavar="SOURCE", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--texts", nargs="+", type=Path, required=True, metavar="FILE", help="texts to train on")
    parser.add_argument("--evaluate", nargs="+", type=Path, required=True, metavar="FILE", help="other texts")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="processor time per thread, without evaluation (default: 30)"
    )
    parser.add_argument(
        "--train", choices=LEARNING_RATES, default="attention", help="which parameters (default: attention)"
    )
    parser.add_argument("--learning-rate", type=float, help=f"the highest of the schedule (default: {LEARNING_RATES})")
    parser.add_argument("--batch", type=int, default=4, help="windows per step (default: 4)")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="multiply matrices in bfloat16: twice as many tokens per minute on processors with AVX512_BF16 or AMX",
    )
    parser.add_argument("--windows", type=int, default=64, help="windows to evaluate of each text (default: 64)")
    parser.add_argument("--figures", type=Path, metavar="JSON", help="add the figures of this run to this file")
    options = parser.parse_args()
    # what would lose the result of the training is refused before it
    if options.out.exists():
        parser.error(f"{options.out} exists; name another folder.")
    for place in filter(None, (options.out, options.figures)):
        if not place.parent.is_dir():
            parser.error(f"expected a folder to write into, got {place.parent}, which does not exist.")
    if not (options.compressed / "README.md").exists():
        parser.error(
            f"expected a folder written by deepseek-latent convert, got {options.compressed} without README.md."
        )
    if len({file.name for file in options.evaluate}) < len(options.evaluate):
        parser.error("expected texts of different names in --evaluate, since figures are kept by name; rename one.")
    if options.windows < 2 or options.batch < 1:
        parser.error("--windows must be at least 2 and --batch at least 1.")
    return options


def write(student: DeepseekV2ForCausalLM, options: argparse.Namespace, figures: list[dict]) -> None:
    """Writes OUT: the weights, the other files of COMPRESSED, and its card with the new perplexities."""
    with whole_folder(options.out) as folder:
        student.save_pretrained(folder)
        for file in companion_files(options.compressed):
            shutil.copyfile(file, folder / file.name)
        card = (options.compressed / "README.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(f"{card}\n{card_section(figures)}", encoding="utf-8")


def card_section(figures: list[dict]) -> str:
    lines = ["## Trained after the conversion", ""]
    lines += ["It was trained to predict what its source predicts. Perplexity on texts that it was not trained on:", ""]
    lines += ["| text | source | before the training | after |", "|---|---|---|---|"]
    for name, after in figures[-1]["texts"].items():
        before = figures[0]["texts"][name]["perplexity"]
        lines.append(f"| {name} | {after['of_source']:.2f} | {before:.2f} | {after['perplexity']:.2f} |")
    return "\n".join(lines) + "\n"


def add_figures(path: Path, name: str, run: dict) -> None:
    """Adds a run to a JSON file, in place of an earlier run with the same name."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with whole_file(path) as place:
        place.write_text(json.dumps(results | {name: run}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    options = read_options()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(0)
    texts = [read_windows(options.compressed, file) for file in options.texts]
    held_out = {}
    for file in options.evaluate:
        windows = read_windows(options.compressed, file, at_least=2)
        held_out[file.name] = windows[:: max(len(windows) // options.windows, 1)][: options.windows]
    teacher = load_model(options.source, dtype=torch.float32).requires_grad_(False)
    student = load_model(options.compressed, dtype="auto")
    for windows in (*texts, *held_out.values()):
        check_vocabulary(windows, student.config.vocab_size)
    dtype, rate = student.dtype, options.learning_rate or LEARNING_RATES[options.train]
    model = choose_parameters(student.float(), options.train)
    num_trained = sum(parameter.numel() for parameter in trainable(model))
    of_source = {name: nats(teacher, windows) for name, windows in held_out.items()}

    def evaluated(step: dict) -> dict:
        found = {name: compare(nats(model, windows), of_source[name]) for name, windows in held_out.items()}
        ratios = ", ".join(f"{name} {x['ratio']:.3f}" for name, x in found.items())
        tqdm.write(f"after {step['seconds'] / 60:.1f} minutes, perplexity over the source's: {ratios}")
        return step | {"texts": found}

    figures, divergences = [evaluated({"seconds": 0.0, "tokens": 0})], []
    seconds = 60 * options.minutes
    steps = heal(
        model,
        teacher,
        mix(texts),
        learning_rate=rate,
        batch=options.batch,
        seconds=seconds,
        bfloat16=options.bfloat16,
    )
    with tqdm(total=1.0, desc="healing", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        for step in steps:
            divergences.append(round(step["divergence"], 4))
            bar.n = min(step["seconds"] / seconds, 1.0)
            bar.set_postfix(tokens=step["tokens"], divergence=f"{step['divergence']:.3f}")
            # at every quarter
            if 4 * bar.n >= len(figures):
                figures.append(evaluated(step))
    if options.train == "lora":
        student = model.merge_and_unload()
    write(student.to(dtype), options, figures)
    if options.figures:
        config = student.config
        name = f"{config.qk_rope_head_dim} + {config.kv_lora_rank}, {options.train}, {options.minutes:g} minutes"
        facts = described("python examples/heal.py") | {"trained_parameters": num_trained, "learning_rate": rate}
        facts |= {"batch": options.batch, "bfloat16": options.bfloat16, "texts": [file.name for file in options.texts]}
        add_figures(options.figures, name, facts | {"evaluated": figures, "divergence_of_steps": divergences})


if __name__ == "__main__":
    main()
