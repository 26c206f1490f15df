"""LoRA by Trainer on a model that processes may share: python trainer_program.py FOLDER RESULTS SIZES

FOLDER has a checkpoint and ids.pt [b s]. RESULTS gets the adapter and log.json, with losses and norms of gradients.
"""

import ast
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import deepseek_latent  # noqa: F401
from deepseek_latent import lora_config
from tests.parallel.launch import finish

BATCH = 4


def main() -> None:
    folder, results = map(Path, sys.argv[1:3])
    sizes = ast.literal_eval(sys.argv[3])
    given = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **given)
    model = get_peft_model(base, lora_config(base, r=8, routed_experts=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(sum(map(ord, name)))
            parameter.data.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    examples = [{"input_ids": ids, "labels": ids} for ids in torch.load(folder / "ids.pt")]
    arguments = TrainingArguments(
        str(results / "out"),
        max_steps=3,
        per_device_train_batch_size=BATCH // sizes.get("fsdp_size", 1),
        learning_rate=0.05,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    first = not dist.is_initialized() or dist.get_rank() == 0
    model.save_pretrained(results / "adapter", is_main_process=first)
    if first:
        (results / "log.json").write_text(json.dumps(trainer.state.log_history))
    finish()


if __name__ == "__main__":
    main()
