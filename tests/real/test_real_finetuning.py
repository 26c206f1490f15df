"""Adapters and trained experts learn a real text on a real model, and merging them changes nothing."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_latent import (
    ExpertSelection,
    activity_of,
    expert_scores,
    finish_training,
    lora_config,
    select_experts,
    train_experts,
)
from tests.support import relative_error

from .conftest import MLA, TEXTS

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Rows [2 128] of Python code."""
    text = (TEXTS / "code.txt").read_text(encoding="utf-8")[:4000]
    return tokenizer(text, return_tensors="pt")["input_ids"][:, : 2 * 128].view(2, 128)


def losses(model, rows, steps: int, lr: float) -> list[float]:
    """The loss before each step, and after the last."""
    model.train()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=lr)
    found = []
    for step in range(steps + 1):
        loss = model(input_ids=rows, labels=rows).loss
        found.append(loss.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    return found


def test_lora_learns_and_is_merged_without_a_change(rows):
    model = AutoModelForCausalLM.from_pretrained(MLA)
    adapted = get_peft_model(model, lora_config(model, r=8))
    found = losses(adapted, rows, steps=4, lr=1e-3)
    assert found[-1] < found[0]
    with torch.no_grad():
        expected = adapted(rows).logits
        merged = adapted.merge_and_unload()(rows).logits
    assert relative_error(merged, expected) < 1e-4


def test_selected_experts_learn_and_the_others_stay(upcycled, rows):
    _, folder = upcycled
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: x.clone() for name, x in model.state_dict().items() if "gate_up_proj" in name}
    scores = expert_scores(activity_of(model, rows), by="token")
    selection = ExpertSelection(select_experts(scores, 0.2))
    train_experts(model, selection)
    found = losses(model, rows, steps=4, lr=3e-4)
    assert found[-1] < found[0]
    finish_training(model)
    after = model.state_dict()
    for layer, experts in selection.experts.items():
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        changed = [i for i, (x, y) in enumerate(zip(before[name], after[name])) if not torch.equal(x, y)]
        assert set(changed) <= set(experts)
    assert any(not torch.equal(before[name], after[name]) for name in before)
