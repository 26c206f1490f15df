"""Compares what LoRA learns and what it forgets with different targets: python examples/finetune_lora.py

The small checkpoint of this repository knows documentation and learns source code. The adapters are on the projections
of attention, then also on the dense and shared MLPs, then also on the routed experts; the last variant is trained by
TRL's SFTTrainer too. Held-out losses are written to benchmarks/results/finetune.json, and shown with those of
finetune_esft.py in a table and a plot.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial

from datasets import Dataset
from finetuning import Texts, compare, read_options, training_options
from peft import LoraConfig, PeftModel, get_peft_model
from pydoc_text import WINDOW
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from deepseek_latent import lora_config

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]

Adapter = Callable[[PreTrainedModel], LoraConfig]
attention = partial(lora_config, target_modules=ATTENTION)
routed = partial(lora_config, routed_experts=True)


def train_with_trainer(model: PreTrainedModel, texts: Texts, options: Namespace, *, adapter: Adapter) -> PeftModel:
    model = get_peft_model(model, adapter(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**training_options(folder, options))
        Trainer(model, args=arguments, train_dataset=texts.training).train()
    return model


def train_with_trl(model: PreTrainedModel, texts: Texts, options: Namespace, *, adapter: Adapter) -> PeftModel:
    """Trains by TRL, which adds a balance loss of its own, Mixtral's, with the factor `aux_loss_alpha` of our config.

    The model itself adds no balance loss while its router is frozen. `router_aux_loss_coef=0.0` in `SFTConfig` would
    turn TRL's loss off.
    """
    with tempfile.TemporaryDirectory() as folder:
        # by default, SFTConfig turns these two on; neither helps on two cores
        arguments = SFTConfig(
            **training_options(folder, options), max_length=WINDOW, bf16=False, gradient_checkpointing=False
        )
        trainer = SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": texts.training.rows().tolist()}),
            processing_class=AutoTokenizer.from_pretrained(model.name_or_path),
            peft_config=adapter(model),
        )
        trainer.train()
    return trainer.model


VARIANTS = {
    "LoRA on attention": partial(train_with_trainer, adapter=attention),
    "LoRA, + dense and shared MLPs": partial(train_with_trainer, adapter=lora_config),
    "LoRA, + routed experts": partial(train_with_trainer, adapter=routed),
    "LoRA, + routed experts, by TRL": partial(train_with_trl, adapter=routed),
}

if __name__ == "__main__":
    compare(VARIANTS, read_options(__doc__, learning_rate=4e-3))
