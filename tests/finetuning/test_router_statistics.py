"""Trainer logs what routers choose in training; padding and evaluation are not counted."""

import re

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from deepseek_latent import lora_config
from deepseek_latent.finetuning.activity import RouterCounts, activity_of
from deepseek_latent.finetuning.router_callback import RouterStatistics
from tests.support import LITE, V2, random_ids, tiny_model

NAMES = {"load", "load_of_worst_layer", "device_load", "device_traffic", "devices_per_token", "entropy", "unused"}
KEYS = {f"router/{name}" for name in NAMES | {"dropped"}}


def rows(num: int, length: int = 16, padded: int = 0) -> list[dict]:
    mask = (torch.arange(length) >= padded).long()
    return [{"input_ids": ids, "labels": ids, "attention_mask": mask} for ids in random_ids(num, length)]


def trainer(folder, model=None, data=None, **options) -> Trainer:
    options = {"max_steps": 4, "logging_steps": 2, "learning_rate": 0.0} | options
    arguments = TrainingArguments(
        str(folder), report_to="none", save_strategy="no", per_device_train_batch_size=2, disable_tqdm=True, **options
    )
    made = Trainer(model or tiny_model(), arguments, train_dataset=data or rows(8), eval_dataset=rows(2))
    made.add_callback(RouterStatistics(made))
    return made


def by_hand(model, ids: torch.Tensor) -> dict[str, float]:
    """The same figures, as means over layers, counted choice by choice."""
    figures = dict.fromkeys(NAMES - {"load_of_worst_layer"}, 0.0)
    e, k, devices = V2["n_routed_experts"], V2["num_experts_per_tok"], V2["n_group"]
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    chosen = []
    handles = [gate.register_forward_hook(lambda gate, inputs, output: chosen.append(output[2])) for gate in gates]
    model(ids)
    for handle in handles:
        handle.remove()
    for experts in chosen:
        counts = [0] * e
        sent = [0] * devices
        for token in experts.tolist():
            for expert in token:
                counts[expert] += 1
            for device in {expert // (e // devices) for expert in token}:
                sent[device] += 1
        total = len(experts) * k
        shares = torch.tensor(counts).double() / total
        on_devices = [sum(counts[i : i + e // devices]) for i in range(0, e, e // devices)]
        figures["load"] += max(counts) * e / total
        figures["device_load"] += max(on_devices) * devices / total
        figures["device_traffic"] += max(sent) * devices / sum(sent)
        figures["devices_per_token"] += sum(sent) / len(experts)
        figures["entropy"] += torch.distributions.Categorical(shares).entropy().item() / torch.tensor(e).log().item()
        figures["unused"] += counts.count(0)
    return {f"router/{name}": figure / len(chosen) for name, figure in figures.items()}


@torch.no_grad()
def test_logged_figures_equal_those_counted_by_hand(tmp_path):
    model = tiny_model()
    made = trainer(tmp_path, model, logging_steps=4)
    with torch.enable_grad():
        made.train()
    logged = [entry for entry in made.state.log_history if entry.keys() >= KEYS]
    assert [entry["step"] for entry in logged] == [4]
    # one epoch of the data, at a learning rate of 0
    expected = by_hand(model, random_ids(8, 16))
    assert {name: logged[0][name] for name in expected} == pytest.approx(expected)
    assert logged[0]["router/dropped"] == 0
    assert logged[0]["router/load_of_worst_layer"] >= logged[0]["router/load"]


def test_figures_are_logged_with_each_loss_and_then_reset(tmp_path):
    made = trainer(tmp_path, data=rows(4) + rows(4, padded=7))
    made.train()
    history = made.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4]
    logged = [entry for entry in history if entry.keys() >= KEYS]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert logged[0]["router/load"] != logged[1]["router/load"]
    assert made.callback_handler.callbacks[-1].counts.sums.sum() == 0
    # no hook is left in the model
    assert not any(gate._forward_hooks for gate in made.callback_handler.callbacks[-1].counts._gates)


def test_dropped_choices_are_logged(tmp_path):
    options = {"device_capacity_factor": 0.5, "no_drop_fraction": 0.0}
    made = trainer(tmp_path, tiny_model(**options))
    made.train()
    shares = [entry["router/dropped"] for entry in made.state.log_history if entry.keys() >= KEYS]
    # half of the choices fit where a device has too many
    assert all(0.4 < share <= 0.6 for share in shares)


def test_padding_and_evaluation_are_not_counted(tmp_path):
    model, ids = tiny_model(), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    counts = RouterCounts(model)
    with counts.watching():
        model(ids, attention_mask=mask)
    k = V2["num_experts_per_tok"]
    assert counts.choices.sum(dim=1).tolist() == [19 * k, 19 * k]
    made = trainer(tmp_path, eval_strategy="steps", eval_steps=1, logging_steps=100)
    made.train()
    assert made.callback_handler.callbacks[-1].counts.choices.sum(dim=1).tolist() == [8 * 16 * k] * 2


def test_traffic_and_dropped_choices_of_padding_do_not_count():
    options = {"device_capacity_factor": 0.5, "no_drop_fraction": 0.0}
    model, ids = tiny_model(**options).train(), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    counts, seen = RouterCounts(model), []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda gate, inputs, output: seen.append(output))
    with counts.watching():
        model(ids, attention_mask=mask)
    _, weights, experts = (x.detach()[mask.flatten().bool()] for x in seen[0])
    devices = [set(row.tolist()) for row in experts // (V2["n_routed_experts"] // V2["n_group"])]
    assert counts.dropped[0] == (weights == 0).sum()
    assert counts.sent[0].tolist() == [sum(device in row for row in devices) for device in range(V2["n_group"])]


@pytest.mark.parametrize("is_training", [False, True])
def test_activity_of_leaves_a_model_in_its_mode(is_training):
    model = tiny_model().train(is_training)
    activity_of(model, random_ids(1, 5))
    assert model.training == is_training
    with pytest.raises(ValueError, match="expected ids from 0 to"):
        activity_of(model, torch.tensor([[V2["vocab_size"]]]))
    assert model.training == is_training


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_activations_are_not_counted_again(use_reentrant):
    model, ids, others = tiny_model().train(), random_ids(2, 10), random_ids(2, 16)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    counts = RouterCounts(model)
    with counts.watching():
        (model(ids, labels=ids).loss + model(others, labels=others).loss).backward()
    assert counts.choices.sum(dim=1).tolist() == [(20 + 32) * V2["num_experts_per_tok"]] * 2


def test_a_router_in_modules_to_save_is_counted_once(tmp_path):
    model, ids = tiny_model(), random_ids(2, 10)
    expected = activity_of(model, ids)
    model = get_peft_model(model, lora_config(model, modules_to_save=["mlp.gate"]))
    found = activity_of(model.base_model.model, ids)
    assert found.layers == expected.layers
    assert torch.equal(found.shares, expected.shares)


def test_a_training_that_starts_after_one_that_failed_leaves_one_hook_on_each_router(tmp_path):
    made = trainer(tmp_path)
    statistics = next(x for x in made.callback_handler.callbacks if isinstance(x, RouterStatistics))
    gates = [layer.mlp.gate for layer in made.model.model.layers[1:]]
    for _ in range(2):
        statistics.on_train_begin(made.args, made.state, made.control, model=made.model)
        assert [len(gate._forward_hooks) for gate in gates] == [1, 1]
    statistics.on_train_end(made.args, made.state, made.control)
    assert [len(gate._forward_hooks) for gate in gates] == [0, 0]


def test_a_model_made_by_model_init_is_counted(tmp_path):
    made = trainer(tmp_path, tiny_model())
    made.model_init = lambda: tiny_model()  # Trainer counts the arguments of this function
    made.train()
    assert all(entry["router/load"] >= 1 for entry in made.state.log_history if entry.keys() >= KEYS)


def test_a_number_of_groups_that_does_not_divide_the_experts_counts_as_one_device():
    counts = RouterCounts(tiny_model(**LITE | {"n_group": 5}))
    assert counts.sent.shape == (2, 1)


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="expected a model with experts"):
        RouterCounts(tiny_model(n_routed_experts=None))


def test_arguments_of_another_type_or_shape_are_refused():
    with pytest.raises(TypeError, match="expected the Trainer that is to log these values, got DeepseekV2ForCausalLM"):
        RouterStatistics(tiny_model())
    cases = (
        (random_ids(1, 4)[0], "shape [4]"),
        (torch.zeros(1, 0), "shape [1, 0]"),
        ("a text", "str"),
        ([[1, 2]], "list"),
    )
    for ids, given in cases:
        with pytest.raises(ValueError, match=r"expected token ids as a tensor \[b s\] .*, got " + re.escape(given)):
            activity_of(tiny_model(), ids)
