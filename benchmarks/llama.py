"""Trains the source model of the conversion benchmarks: python -m benchmarks.llama FOLDER

It is a Llama with grouped-query attention and 4 million parameters, trained on the source code of Python's standard
library, which is large enough that the model does not memorize it. Whole files are held out, chosen by their names.
Training takes about five minutes.
"""

import argparse
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

TOKENIZER = Path(__file__).parent.parent / "examples" / "pydoc-tiny"
CONFIG = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
WINDOW, BATCH = 256, 8


def texts() -> tuple[str, str]:
    """The modules of the standard library, joined: training text, and a tenth of the files as held-out text."""
    folder = Path(sysconfig.get_path("stdlib"))
    sides: tuple[list[str], list[str]] = [], []
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
        if path.parent.name in ("test", "tests", "idlelib", "site-packages", "lib2to3", "pydoc_data"):
            continue
        is_held_out = zlib.crc32(path.relative_to(folder).as_posix().encode()) % 10 == 1
        sides[is_held_out].append(path.read_text(encoding="utf-8", errors="replace"))
    return "\n\n".join(sides[0]), "\n\n".join(sides[1])


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Encodes a text as consecutive windows [b WINDOW]."""
    ids = torch.tensor(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


class Rows(Dataset):
    def __init__(self, windows: Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def trained(
    model: PreTrainedModel, windows: Tensor, held_out: Tensor, *, steps: int, learning_rate: float
) -> list[dict]:
    """Trains the model in place, and returns step and held-out loss at ten points."""
    arguments = TrainingArguments(
        output_dir="runs",
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(steps // 10, 1),
        eval_strategy="steps",
        eval_steps=max(steps // 10, 1),
        eval_on_start=True,
        prediction_loss_only=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        report_to="none",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(windows), eval_dataset=Rows(held_out))
    trainer.train()
    model.config.use_cache = True
    model.eval()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return [{"step": entry["step"], "loss": entry["eval_loss"]} for entry in evaluated]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, **special))
    training, held_out = texts()
    held_out_windows = encoded(tokenizer, held_out)[:32]
    trained(model, encoded(tokenizer, training), held_out_windows, steps=options.steps, learning_rate=3e-3)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "held_out.txt").write_text(held_out, encoding="utf-8")


if __name__ == "__main__":
    main()
