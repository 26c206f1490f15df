"""Stacked weights follow the trained parameters after every step, in training and in evaluation."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from deepseek_latent.experts.routed import DeepseekV2Experts
from deepseek_latent.experts.trained import TrainedWeights
from deepseek_latent.finetuning.esft import finish_training
from tests.finetuning.support import CHOSEN, model_in_training, step
from tests.support import official_state_dict, random_ids, relative_error, tiny_model

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def test_generation_uses_the_latest_step_and_finishing_changes_nothing():
    model, ids = model_in_training(), random_ids(2, 9)
    before = model.eval().generate(ids, **GREEDY)
    assert torch.equal(before, tiny_model().generate(ids, **GREEDY))
    with torch.enable_grad():
        step(model, lr=20.0)
    # the model stays in evaluation mode, only its weights change
    after, logits = model.generate(ids, **GREEDY), model(ids).logits
    assert not torch.equal(before, after)
    finish_training(model)
    assert torch.equal(model.generate(ids, **GREEDY), after)
    assert torch.equal(model(ids).logits, logits)
    assert {type(layer.mlp.experts) for layer in model.model.layers[1:]} == {DeepseekV2Experts}
    assert dict(model.named_parameters()).keys() == dict(tiny_model().named_parameters()).keys()
    assert all(x.requires_grad for x in model.parameters())


@pytest.mark.parametrize("stays_in_training", [True, False])
def test_a_step_of_a_fused_optimizer_is_noticed(stays_in_training):
    """It does not raise the version of a parameter. Trainer's default optimizer is a fused one."""
    model, ids = model_in_training(), random_ids(2, 9)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.1, fused=True)
    with torch.no_grad():
        model.train(stays_in_training)
        before = model(ids).logits
    model.train(stays_in_training)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(ids).logits
        assert relative_error(after, before) > 1e-3
        finish_training(model)
        assert torch.equal(model(ids).logits, after)


@pytest.mark.parametrize("change", ["fused", "data"])
def test_changes_that_raise_no_version_are_noticed_in_evaluation(change):
    """The change comes after a backward pass through one evaluation, and after another evaluation."""
    model, ids = model_in_training().eval(), random_ids(2, 9)
    loss = model(ids, labels=ids).loss
    with torch.no_grad():
        before = model(ids).logits
    loss.backward()
    trained = [x for x in model.parameters() if x.requires_grad]
    if change == "fused":
        torch.optim.AdamW(trained, lr=0.1, fused=True).step()
    for parameter in trained if change == "data" else ():
        parameter.data.mul_(3)
    with torch.no_grad():
        after = model(ids).logits
        finish_training(model)
        assert torch.equal(after, model(ids).logits)
    assert relative_error(after, before) > 1e-2


def test_evaluation_between_steps_uses_the_latest_step(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(4, 16)]
    model = model_in_training()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"max_steps": 3, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    ids = random_ids(4, 16)
    for step_number, expected in enumerate(losses, start=1):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step_number}").eval()
        assert saved(ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)


def test_trained_parameters_keep_float32_when_other_weights_are_loaded_or_cast():
    model = model_in_training(torch.bfloat16)
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.trained_down_proj += 1e-5
    kept = experts.trained_down_proj.detach().clone()
    model.load_state_dict({"lm_head.weight": model.lm_head.weight.detach() * 2}, strict=False)
    model.to(torch.bfloat16)
    assert torch.equal(experts.trained_down_proj, kept)
    assert experts.trained_down_proj.dtype == torch.float32
    assert dict(model.named_parameters())["model.layers.1.mlp.experts.trained_down_proj"] is experts.trained_down_proj


@torch.no_grad()
def test_a_model_that_is_cast_to_float32_computes_with_all_digits_of_the_trained_parameters():
    model, ids = model_in_training(torch.bfloat16).eval(), random_ids(2, 9)
    experts = model.model.layers[1].mlp.experts
    # values that bfloat16 rounds
    experts.trained_down_proj *= 1 + 2**-9
    model(ids)
    model.float()
    after = model(ids).logits
    assert torch.equal(experts.down_proj[CHOSEN[1]], experts.trained_down_proj)
    finish_training(model)
    assert torch.equal(model(ids).logits, after)


@torch.no_grad()
def test_a_shard_with_one_stacked_weight_leaves_the_digits_of_the_other_trained_parameter():
    model = model_in_training(torch.bfloat16)
    experts = model.model.layers[1].mlp.experts
    # values that bfloat16 rounds
    experts.trained_gate_up_proj *= 1 + 2**-9
    kept, loaded = experts.trained_gate_up_proj.clone(), experts.down_proj.detach() * 2
    model.load_state_dict({"model.layers.1.mlp.experts.down_proj": loaded}, strict=False)
    assert torch.equal(experts.trained_gate_up_proj, kept)
    assert torch.equal(experts.trained_down_proj, loaded[CHOSEN[1]].float())


def test_steps_that_bfloat16_would_round_away_add_up():
    """A weight around 0.1 does not change by 1e-5 in bfloat16; the trained parameter in float32 does."""
    model = model_in_training(torch.bfloat16)
    experts = model.model.layers[1].mlp.experts
    assert (experts.gate_up_proj.dtype, experts.trained_gate_up_proj.dtype) == (torch.bfloat16, torch.float32)
    ids = random_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    assert experts.trained_gate_up_proj.grad.dtype == torch.float32
    before = experts.trained_down_proj.detach().clone()
    with torch.no_grad():
        for _ in range(1000):
            experts.trained_down_proj += 1e-5
    stacked = experts.down_proj.detach()[CHOSEN[1]]
    model(ids)
    assert relative_error(experts.down_proj[CHOSEN[1]].float(), before + 0.01) < 2**-8
    assert relative_error(experts.down_proj[CHOSEN[1]], stacked) > 1e-2


def test_the_last_step_is_kept_by_loading_other_experts_and_by_finishing():
    model = model_in_training()
    step(model)
    trained = model.model.layers[1].mlp.experts.trained_down_proj.detach().clone()
    # a file that holds a single expert, which is not in training
    shard = {
        name: x for name, x in official_state_dict(tiny_model(seed=4)).items() if "layers.1.mlp.experts.9." in name
    }
    model.load_state_dict(shard, strict=False)
    assert torch.equal(model.model.layers[1].mlp.experts.trained_down_proj, trained)
    step(model)
    trained = model.model.layers[1].mlp.experts.trained_down_proj.detach().clone()
    finish_training(model)
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj[CHOSEN[1]], trained)


def test_training_a_model_leaves_its_copy_unchanged():
    model = model_in_training()
    other = copy.deepcopy(model)
    step(model)
    assert isinstance(other.model.layers[1].mlp.experts.weights, TrainedWeights)
    expected = tiny_model().model.layers[1].mlp.experts.down_proj
    assert torch.equal(other.state_dict()["model.layers.1.mlp.experts.down_proj"], expected)
