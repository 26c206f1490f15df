"""The fine-tuning examples run, TRL trains adapters, and each example keeps the results of the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel

from deepseek_latent import lora_config
from tests.support import random_ids, tiny_model

ROOT = Path(__file__).parents[2]
trl = pytest.importorskip("trl", reason="trl is not installed; make test-tools installs it")


def test_examples_evaluate_every_variant_and_keep_each_others_rows(tmp_path):
    for program in ("finetune_lora.py", "finetune_esft.py"):
        command = [sys.executable, f"examples/{program}", "--steps", "3", "--out", str(tmp_path)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout
    written = json.loads((tmp_path / "finetune.json").read_text())
    rows = {name: row for program in written.values() for name, row in program["rows"].items()}
    assert len(rows) == 8
    # every variant starts from the same checkpoint, and three steps change its loss a little
    before = rows.pop("before")["new_nats_per_token"]
    assert all(0 < abs(row["new_nats_per_token"] - before) < 1 for row in rows.values())
    assert all(f"| {name} |" in done.stdout for name in rows)
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("coefficient", [None, 0.0], ids=["default of TRL", "no balance loss"])
def test_trl_trains_adapters_on_routed_experts(coefficient, tmp_path):
    from datasets import Dataset

    model, ids = tiny_model(), random_ids(8, 24)
    options = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=6,
        learning_rate=2e-2,
        logging_steps=1,
        bf16=False,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=8,
        **options,
    )
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        processing_class=_tokenizer(),
        peft_config=lora_config(model, r=6, routed_experts=True),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    trainer.save_model(tmp_path / "adapter")
    assert PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter") is not None


def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "examples" / "pydoc-tiny")
