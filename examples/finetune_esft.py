"""What expert-specialised fine-tuning learns of a new text, and keeps of the old: python examples/finetune_esft.py

Of the embedded checkpoint, only those routed experts are trained that source, the new text, is sent to, chosen by share
of tokens or by mean gate value as in the ESFT paper (arXiv:2407.01906). For comparison, everything is trained.
Held-out losses go to benchmarks/results/finetune.json, and with those of finetune_lora.py into a table and a plot.
"""

import tempfile
from argparse import Namespace
from functools import partial

from finetuning import Texts, compare, read_options, training_options
from transformers import PreTrainedModel, Trainer, TrainingArguments

from deepseek_latent.finetuning.activity import activity_of
from deepseek_latent.finetuning.esft import train_experts
from deepseek_latent.finetuning.expert_selection import THRESHOLDS, ExpertSelection, expert_scores, select_experts

CHOSEN_ON = 64  # windows


def trained(model: PreTrainedModel, texts: Texts, options: Namespace) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**training_options(folder, options))
        Trainer(model, args=arguments, train_dataset=texts.training).train()
    return model


def specialised(model: PreTrainedModel, texts: Texts, options: Namespace, *, by: str) -> PreTrainedModel:
    windows = texts.training.rows()
    scores = expert_scores(activity_of(model.eval(), windows[:: len(windows) // CHOSEN_ON]), by)
    train_experts(model, ExpertSelection(select_experts(scores, THRESHOLDS[by])))
    return trained(model, texts, options)


VARIANTS = {
    "ESFT, experts by share of tokens": partial(specialised, by="token"),
    "ESFT, experts by gate value": partial(specialised, by="gate"),
    "everything": trained,
}

if __name__ == "__main__":
    compare(VARIANTS, read_options(__doc__, learning_rate=3e-3))
