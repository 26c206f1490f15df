"""Experts are scored and selected as in the ESFT paper, and the selection is the file of DeepSeek's code."""

import json
from pathlib import Path

import pytest
import torch

from deepseek_latent.finetuning.activity import activity_of
from deepseek_latent.finetuning.expert_selection import ExpertSelection, expert_scores, select_experts
from tests.support import V2, random_ids, tiny_model

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "esft_scores.json").read_text())


@pytest.mark.parametrize("domain", ["law", "translation"])
def test_select_experts_finds_the_experts_that_deepseek_published(domain):
    scores = {layer: [x / 10_000 for x in row] for layer, row in enumerate(PUBLISHED[domain]["scores"], start=1)}
    published = {int(layer): experts for layer, experts in PUBLISHED[domain]["experts"].items()}
    assert len(published) == 26
    assert select_experts(scores, 0.2) == published


def test_no_expert_is_selected_once_the_scores_reach_the_threshold():
    # numbers that add up without rounding
    scores = {1: [0.125, 0.5, 0.125, 0.25], 2: [0.25, 0.25, 0.25, 0.25]}
    assert select_experts(scores, 0.5) == {1: [1], 2: [0, 1]}
    assert select_experts(scores, 0.75) == {1: [1, 3], 2: [0, 1, 2]}
    assert select_experts(scores, 1) == {1: [1, 3, 0, 2], 2: [0, 1, 2, 3]}


@pytest.mark.parametrize("variant", [{}, {"norm_topk_prob": True}], ids=str)
def test_scores_are_shares_of_choices_and_mean_gate_values(variant):
    model, ids = tiny_model(**variant), random_ids(2, 30)
    seen = []
    gate = model.model.layers[1].mlp.gate
    handle = gate.register_forward_hook(lambda gate, inputs, output: seen.append(output))
    activity = activity_of(model, ids)
    handle.remove()
    logits, weights, experts = seen[0]
    values = weights if variant else logits.softmax(dim=-1).gather(-1, experts)
    for expert in range(V2["n_routed_experts"]):
        is_chosen = experts == expert
        token, gated = (expert_scores(activity, by)[1][expert] for by in ("token", "gate"))
        assert token == pytest.approx(is_chosen.sum().item() / experts.numel())
        assert gated == pytest.approx((values * is_chosen).sum().item() / 60, rel=1e-5)
    with pytest.raises(ValueError, match="by 'token' or by 'gate', got 'loss'"):
        expert_scores(activity, "loss")


@pytest.mark.parametrize("threshold", [0, -1, float("nan"), 5])
def test_a_threshold_that_is_no_fraction_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be above 0 and at most 1"):
        select_experts({1: [0.5, 0.5]}, threshold)


def test_selecting_from_activity_instead_of_scores_is_refused():
    with pytest.raises(TypeError, match=r"from expert_scores\(activity\), got Activity"):
        select_experts(activity_of(tiny_model(), random_ids(1, 8)), 0.2)


def test_the_file_of_a_selection_is_the_one_that_deepseeks_code_reads(tmp_path):
    ExpertSelection({1: [4, 2]}, shared_experts=True).save(tmp_path)
    written = json.loads((tmp_path / "expert_cfg.json").read_text())
    assert written == {"experts": {"1": [4, 2]}, "shared_experts": True, "non_expert_modules": False}
    assert ExpertSelection.load(tmp_path / "expert_cfg.json") == ExpertSelection({1: [4, 2]}, shared_experts=True)
    # DeepSeek's code takes a missing flag for false
    (tmp_path / "expert_cfg.json").write_text('{"experts": {"1": [4, 2]}}')
    assert ExpertSelection.load(tmp_path) == ExpertSelection({"1": torch.tensor([4, 2])})


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"experts": {"one": [1]}}', '{"experts": [3]}'])
def test_a_file_that_holds_no_selection_is_refused(tmp_path, text):
    (tmp_path / "expert_cfg.json").write_text(text)
    with pytest.raises(ValueError, match=r'expected {"experts": {layer: \[ids\]}'):
        ExpertSelection.load(tmp_path)


@pytest.mark.parametrize("experts", [[1, 2], None, {1: 0}, {"a": [0]}, {1: [1.5]}, {1: "01"}], ids=str)
def test_experts_that_are_not_numbers_by_layer_are_refused(experts):
    with pytest.raises(ValueError, match=r"expected experts by layer, {layer: \[numbers\]}, got"):
        ExpertSelection(experts)
