"""What expert-specialized fine-tuning learns of a new text, and keeps of the old: python examples/finetune_esft.py

The checkpoint in examples/pydoc-tiny learns source, the new text. Only the routed experts that source uses are trained,
chosen by share of tokens or by mean gate value as in the ESFT paper (arXiv:2407.01906). For comparison, everything is
trained. Held-out losses go to benchmarks/results/finetune.json, and with those of finetune_lora.py into a table and a
plot.
"""

import tempfile
from argparse import Namespace
from functools import partial

from finetuning import Texts, compare, read_options, training_options
from transformers import PreTrainedModel, Trainer, TrainingArguments

from deepseek_latent.finetuning.activity import activity_of
from deepseek_latent.finetuning.esft import train_experts
from deepseek_latent.finetuning.expert_selection import THRESHOLDS, ExpertSelection, expert_scores, select_experts

NUM_SCORING_WINDOWS = 64  # those on which experts are scored


def train(model: PreTrainedModel, texts: Texts, options: Namespace) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**training_options(folder, options))
        Trainer(model, args=arguments, train_dataset=texts.training).train()
    return model


def train_chosen_experts(model: PreTrainedModel, texts: Texts, options: Namespace, *, by: str) -> PreTrainedModel:
    windows = texts.training.rows()
    scores = expert_scores(activity_of(model.eval(), windows[:: len(windows) // NUM_SCORING_WINDOWS]), by)
    train_experts(model, ExpertSelection(select_experts(scores, THRESHOLDS[by])))
    return train(model, texts, options)


VARIANTS = {
    "ESFT, experts by share of tokens": partial(train_chosen_experts, by="token"),
    "ESFT, experts by gate value": partial(train_chosen_experts, by="gate"),
    "everything": train,
}

if __name__ == "__main__":
    compare(VARIANTS, read_options(__doc__, learning_rate=3e-3))
