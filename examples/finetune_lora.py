"""What LoRA learns of a new text, and keeps of the old: python examples/finetune_lora.py

The embedded checkpoint, which knows documentation, learns source by adapters on attention's projections, then on the
dense and shared MLPs as well, then on the routed experts as well; these last also by TRL's SFTTrainer. Held-out losses
go to benchmarks/results/finetune.json, and with those of finetune_esft.py into a table and a plot.
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


def by_trainer(model: PreTrainedModel, texts: Texts, options: Namespace, *, adapter: Adapter) -> PeftModel:
    model = get_peft_model(model, adapter(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**training_options(folder, options))
        Trainer(model, args=arguments, train_dataset=texts.training).train()
    return model


def by_sft_trainer(model: PreTrainedModel, texts: Texts, options: Namespace, *, adapter: Adapter) -> PeftModel:
    """As above, but for a balance loss: TRL adds its own, Mixtral's, with the factor `aux_loss_alpha` of our config.

    The model itself leaves balance out of the loss as long as its router is frozen. `router_aux_loss_coef=0.0` in
    `SFTConfig` would do the same there.
    """
    with tempfile.TemporaryDirectory() as folder:
        # SFTConfig would turn these two on; neither makes two cores faster
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
    "LoRA on attention": partial(by_trainer, adapter=attention),
    "LoRA, + dense and shared MLPs": partial(by_trainer, adapter=lora_config),
    "LoRA, + routed experts": partial(by_trainer, adapter=routed),
    "LoRA, + routed experts, by TRL": partial(by_sft_trainer, adapter=routed),
}

if __name__ == "__main__":
    compare(VARIANTS, read_options(__doc__, learning_rate=4e-3))
