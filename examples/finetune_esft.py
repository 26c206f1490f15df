"""Compares what expert-specialized fine-tuning learns and what it forgets: python examples/finetune_esft.py

The small checkpoint of this repository knows documentation and learns source code. Only the routed experts that receive
most tokens of source code are trained. They are chosen by their share of tokens or by their mean gate value, as in the
ESFT paper (arXiv:2407.01906). For comparison, everything is trained. Held-out losses are written to
benchmarks/results/finetune.json, and shown with those of finetune_lora.py in a table and a plot.
"""

import tempfile
from argparse import Namespace
from functools import partial

from finetuning import Texts, compare, read_options, training_options
from transformers import PreTrainedModel, Trainer, TrainingArguments

from deepseek_latent.finetuning.activity import activity_of
from deepseek_latent.finetuning.esft import train_experts
from deepseek_latent.finetuning.expert_selection import THRESHOLDS, ExpertSelection, expert_scores, select_experts

SELECTION_WINDOWS = 64


def train_all(model: PreTrainedModel, texts: Texts, options: Namespace) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**training_options(folder, options))
        Trainer(model, args=arguments, train_dataset=texts.training).train()
    return model


def train_selected(model: PreTrainedModel, texts: Texts, options: Namespace, *, by: str) -> PreTrainedModel:
    windows = texts.training.rows()
    scores = expert_scores(activity_of(model.eval(), windows[:: len(windows) // SELECTION_WINDOWS]), by)
    train_experts(model, ExpertSelection(select_experts(scores, THRESHOLDS[by])))
    return train_all(model, texts, options)


VARIANTS = {
    "ESFT, experts by share of tokens": partial(train_selected, by="token"),
    "ESFT, experts by gate value": partial(train_selected, by="gate"),
    "everything": train_all,
}

if __name__ == "__main__":
    compare(VARIANTS, read_options(__doc__, learning_rate=3e-3))
