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
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import described
from deepseek_latent import DeepseekV2ForCausalLM, lora_config
from deepseek_latent.conversion.loading import load_model
from deepseek_latent.conversion.text import WINDOW_LENGTH, load_tokenizer, read_text, tokenize
from deepseek_latent.whole_files import whole_file, whole_folder

PROJECTIONS = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
LEARNING_RATES = {"attention": 2e-4, "lora": 2e-4, "everything": 1e-4}
WARM_UP = 0.05  # of the training
LORA_RANK = 32


# what is trained


def choose_parameters(student: DeepseekV2ForCausalLM, trained: str) -> nn.Module:
    """Makes only the parameters trainable that `--train` names. Returns the model, with adapters for "lora"."""
    attention = [layer.self_attn for layer in student.model.layers]
    student.requires_grad_(trained == "everything")
    if trained == "lora":
        targets = [name for name in PROJECTIONS if hasattr(attention[0], name)]
        model = get_peft_model(student, lora_config(student, r=LORA_RANK, target_modules=targets))
    else:
        model = student
        for module in attention:
            module.requires_grad_(True)
    for module in attention:
        freeze_constants(module)
    return model


def freeze_constants(attention: nn.Module) -> None:
    """Keeps the constant channel of a latent as `gqa-to-mla` made it, and the norm's weight, which is exact with it.

    The channel is a row of zeros in the projection to the latent, and a large bias. AdamW divides a gradient by its own
    size, so it would move this row as fast as any other, though hardly anything depends on it.
    """
    for name, norm in (("q_a_proj", "q_a_layernorm"), ("kv_a_proj_with_mqa", "kv_a_layernorm")):
        projection = getattr(attention, name, None)
        if projection is None or projection.bias is None:
            continue
        getattr(attention, norm).requires_grad_(False)
        row = projection.bias.abs().argmax()
        # the rows of a LoRA's second factor are those of the weight
        adapters = projection.lora_B.values() if hasattr(projection, "lora_B") else ()
        for parameter in (projection.weight, projection.bias, *(factor.weight for factor in adapters)):
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, row=row: gradient.index_fill(0, row, 0))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# training


def read_windows(folder: Path, file: Path) -> Tensor:
    """A text as windows [b WINDOW_LENGTH] of tokens, by the tokenizer in `folder`."""
    ids = tokenize(folder, read_text(file))[0]
    if len(ids) < WINDOW_LENGTH:
        raise ValueError(f"expected a text of at least {WINDOW_LENGTH} tokens, got {len(ids)} in {file}.")
    return ids[: len(ids) // WINDOW_LENGTH * WINDOW_LENGTH].view(-1, WINDOW_LENGTH)


def mix(texts: list[Tensor]) -> Iterator[Tensor]:
    """Endless windows: the texts take turns, whatever their lengths, each in random order."""

    def shuffled(windows: Tensor) -> Iterator[Tensor]:
        while True:
            yield from windows[torch.randperm(len(windows))]

    yield from itertools.chain.from_iterable(zip(*map(shuffled, texts)))


def divergence(student: nn.Module, teacher: PreTrainedModel, windows: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of the student's next token from the teacher's, in nats, mean over all tokens."""
    with torch.no_grad():
        expected = teacher(input_ids=windows, use_cache=False).logits.float().log_softmax(dim=-1)
    found = student(input_ids=windows, use_cache=False).logits.float().log_softmax(dim=-1)
    return F.kl_div(found, expected, log_target=True, reduction="sum") / windows.numel()


def processor_seconds() -> float:
    """Processor time of this process per thread of torch. Other programs on the machine hardly change it."""
    return time.process_time() / torch.get_num_threads()


def schedule(progress: float) -> float:
    """The factor on the learning rate: a linear warm-up from a tenth, then a linear decay to zero."""
    return min(0.1 + 0.9 * progress / WARM_UP, 1 - progress)


def heal(
    student: nn.Module,
    teacher: PreTrainedModel,
    windows: Iterator[Tensor],  # [WINDOW_LENGTH] each
    *,
    learning_rate: float,
    batch: int,
    seconds: float,
    bfloat16: bool = False,
) -> Iterator[dict]:
    """Trains the student's trainable parameters in place, and yields seconds, tokens and loss after every step.

    Seconds are those of `processor_seconds`, without what is done between steps. The learning rate follows them. With
    `bfloat16`, both models multiply matrices in that dtype, while weights and optimizer stay in float32.
    """
    parameters = trainable(student)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    spent, tokens = 0.0, 0
    while spent < seconds:
        start = processor_seconds()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(spent / seconds)
        loss = 0.0
        # one window at a time, so that only its logits are in memory
        for window in itertools.islice(windows, batch):
            with torch.autocast(window.device.type, torch.bfloat16, enabled=bfloat16):
                part = divergence(student, teacher, window[None]) / batch
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent, tokens = spent + processor_seconds() - start, tokens + batch * WINDOW_LENGTH
        yield {"seconds": spent, "tokens": tokens, "divergence": loss}


# evaluation


@torch.no_grad()
def nats(model: nn.Module, windows: Tensor) -> Tensor:
    """[b]: the mean cross-entropy of every token but the first of a window."""

    def of_window(window: Tensor) -> Tensor:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        return F.cross_entropy(logits, window[1:]).double()

    return torch.stack([of_window(window) for window in windows])


def compare(of_student: Tensor, of_source: Tensor) -> dict[str, float]:
    """Perplexities, and their ratio with the standard error that the choice of windows leaves."""
    excess = of_student - of_source
    ratio = math.exp(excess.mean())
    return {
        "perplexity": math.exp(of_student.mean()),
        "of_source": math.exp(of_source.mean()),
        "ratio": ratio,
        "standard_error_of_ratio": ratio * excess.std().item() / math.sqrt(len(excess)),
    }


# the command


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
    if options.windows < 2 or options.batch < 1:
        parser.error("--windows must be at least 2 and --batch at least 1.")
    return options


def write(student: DeepseekV2ForCausalLM, options: argparse.Namespace, figures: list[dict]) -> None:
    """Writes OUT: the weights, the tokenizer, and the card of COMPRESSED with the new perplexities."""
    with whole_folder(options.out) as folder:
        student.save_pretrained(folder)
        load_tokenizer(options.compressed).save_pretrained(folder)
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
        windows = read_windows(options.compressed, file)
        held_out[file.name] = windows[:: max(len(windows) // options.windows, 1)][: options.windows]
    teacher = load_model(options.source, dtype=torch.float32).requires_grad_(False)
    student = load_model(options.compressed, dtype="auto")
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
