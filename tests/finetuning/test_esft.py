"""Expert-specialised fine-tuning: DeepSeek's choice of experts, and training that touches nothing else."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from deepseek_latent import lora_config
from deepseek_latent.experts.routed import DeepseekV2Experts
from deepseek_latent.experts.trained import TrainedWeights
from deepseek_latent.finetuning.activity import activity_of
from deepseek_latent.finetuning.esft import finish_training, load_experts, save_experts, train_experts
from deepseek_latent.finetuning.expert_selection import ExpertSelection, expert_scores, select_experts
from deepseek_latent.finetuning.packing import pack_experts
from deepseek_latent.kernels import optimize_for_inference
from tests.support import (
    NATIVE,
    V2,
    needs_compiler,
    needs_its_peft,
    official_state_dict,
    random_ids,
    relative_error,
    tiny_model,
)

CHOSEN = {1: [7, 2, 5], 2: [0]}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "esft_scores.json").read_text())


def in_training(dtype=torch.float32, selection: ExpertSelection | None = None, **variant):
    model = tiny_model(dtype, **variant).train()
    train_experts(model, selection or ExpertSelection(CHOSEN))
    return model


def step(model, lr: float = 0.5, seed: int = 1) -> float:
    """One step of plain gradient descent; the loss before it."""
    ids = random_ids(3, 40, seed)
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=lr)
    optimizer.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("domain", ["law", "translation"])
def test_the_selector_finds_the_experts_that_deepseek_published(domain):
    scores = {layer: [x / 10_000 for x in row] for layer, row in enumerate(PUBLISHED[domain]["scores"], start=1)}
    published = {int(layer): experts for layer, experts in PUBLISHED[domain]["experts"].items()}
    assert len(published) == 26
    assert select_experts(scores, 0.2) == published


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


def test_gradients_are_those_of_training_everything():
    ids, whole, model = random_ids(3, 40), tiny_model().train(), in_training()
    whole(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    with_gradient = {name for name, x in model.named_parameters() if x.grad is not None}
    assert len(with_gradient) == 4
    assert with_gradient == {name for name, x in model.named_parameters() if x.requires_grad}
    for layer, chosen in CHOSEN.items():
        ours, theirs = (x.model.layers[layer].mlp.experts for x in (model, whole))
        for name in ("gate_up_proj", "down_proj"):
            expected = getattr(theirs, name).grad[chosen]
            assert relative_error(getattr(ours, f"trained_{name}").grad, expected) < 1e-5


def test_training_changes_the_chosen_experts_and_nothing_else(tmp_path):
    before, model = official_state_dict(tiny_model()), in_training()
    losses = [step(model) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    parts = ("gate_proj", "up_proj", "down_proj")
    names = {
        f"model.layers.{i}.mlp.experts.{e}.{p}.weight" for i, chosen in CHOSEN.items() for e in chosen for p in parts
    }
    assert changed == names
    ids, expected = random_ids(2, 20), model.eval()(random_ids(2, 20)).logits
    native = NATIVE.DeepseekV2ForCausalLM.from_pretrained(tmp_path).eval()
    assert relative_error(native(ids).logits, expected) < 1e-5


@torch.no_grad()
def test_generation_sees_every_step_and_merging_changes_nothing():
    model, ids = in_training(), random_ids(2, 9)
    before = model.eval().generate(ids, **GREEDY)
    assert torch.equal(before, tiny_model().generate(ids, **GREEDY))
    with torch.enable_grad():
        step(model, lr=20.0)
    # the mode has not changed, the weights have
    after, logits = model.generate(ids, **GREEDY), model(ids).logits
    assert not torch.equal(before, after)
    finish_training(model)
    assert torch.equal(model.generate(ids, **GREEDY), after)
    assert torch.equal(model(ids).logits, logits)
    assert {type(layer.mlp.experts) for layer in model.model.layers[1:]} == {DeepseekV2Experts}
    assert dict(model.named_parameters()).keys() == dict(tiny_model().named_parameters()).keys()
    assert all(x.requires_grad for x in model.parameters())


@pytest.mark.parametrize("stays_in_training", [True, False])
def test_an_optimiser_that_counts_no_version_is_seen(stays_in_training):
    """As Trainer's own, a fused one."""
    model, ids = in_training(), random_ids(2, 9)
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


def test_evaluation_between_steps_judges_the_step_before_it(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(4, 16)]
    model = in_training()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"max_steps": 3, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    judged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    ids = random_ids(4, 16)
    for step_number, loss in enumerate(judged, start=1):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step_number}").eval()
        assert saved(ids, labels=ids).loss.item() == pytest.approx(loss, rel=1e-5)


def test_originals_stay_in_float32_and_outlive_other_weights():
    model = in_training(torch.bfloat16)
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.trained_down_proj += 1e-5
    kept = experts.trained_down_proj.detach().clone()
    model.load_state_dict({"lm_head.weight": model.lm_head.weight.detach() * 2}, strict=False)
    model.to(torch.bfloat16)
    assert torch.equal(experts.trained_down_proj, kept)
    assert experts.trained_down_proj.dtype == torch.float32
    assert dict(model.named_parameters())["model.layers.1.mlp.experts.trained_down_proj"] is experts.trained_down_proj


def test_adapters_on_experts_in_training_are_refused():
    model, ids = in_training(), random_ids(2, 9)
    model = get_peft_model(model, lora_config(model, routed_experts=True))
    with pytest.raises(ValueError, match=r"take no adapters while they are in training by ESFT; end that with finish"):
        model(input_ids=ids)


def test_in_bfloat16_small_steps_add_up():
    """A weight around 0.1 does not move in bfloat16 by 1e-5; its float32 original does."""
    model = in_training(torch.bfloat16)
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


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_and_two_passes_before_one_step(use_reentrant):
    ids, others = random_ids(3, 20), random_ids(3, 20, seed=8)

    def gradients(model):
        (model(ids, labels=ids).loss + model(others, labels=others).loss).backward()
        return [x.grad for x in model.parameters() if x.requires_grad]

    expected, model = gradients(in_training()), in_training()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert all(relative_error(*pair) < 1e-5 for pair in zip(gradients(model), expected, strict=True))


@pytest.mark.parametrize(
    ("options", "part"),
    [({"shared_experts": True}, "shared_experts"), ({"non_expert_modules": True}, "self_attn")],
    ids=["shared", "no experts"],
)
def test_what_else_is_named_is_trained(options, part):
    model = in_training(selection=ExpertSelection(CHOSEN, **options))
    trained = {name for name, x in model.named_parameters() if x.requires_grad and "trained_" not in name}
    assert any(part in name for name in trained)
    assert all(("shared_experts" in name) == options.get("shared_experts", False) for name in trained)
    assert not any(".experts." in name for name in trained)
    step(model)


def test_trainer_resumes_where_it_stopped(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"input_ids": random_ids(1, 16, seed=index)[0], "labels": random_ids(1, 16, seed=index)[0]}

    def train(folder, **options):
        model = in_training()
        arguments = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, report_to="none", learning_rate=1e-2, disable_tqdm=True
        )
        Trainer(model, arguments, train_dataset=Rows()).train(**options)
        return model

    whole = train(tmp_path)
    resumed = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, expected), (_, got) in zip(whole.named_parameters(), resumed.named_parameters()):
        assert torch.allclose(got, expected, atol=1e-6), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4") is not None


@pytest.mark.parametrize(
    "selection",
    [
        ExpertSelection(CHOSEN),
        ExpertSelection(CHOSEN, shared_experts=True),
        ExpertSelection({2: [3]}, shared_experts=True, non_expert_modules=True),
    ],
    ids=["experts", "shared too", "all else too"],
)
@torch.no_grad()
def test_what_was_trained_can_be_saved_alone_and_put_back(tmp_path, selection):
    model, ids = in_training(selection=selection), random_ids(2, 20)
    with torch.enable_grad():
        step(model)
    expected = model.eval()(ids).logits
    save_experts(model, selection, tmp_path)
    again = tiny_model()
    # DeepSeek's code asks for every layer
    assert load_experts(again, tmp_path).experts == {layer: selection.experts.get(layer, []) for layer in (1, 2)}
    assert torch.equal(again(ids).logits, expected)
    # DeepSeek's code names tensors from the backbone on
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    again = tiny_model()
    load_experts(again, tmp_path)
    assert torch.equal(again(ids).logits, expected)


def test_the_file_is_the_one_deepseeks_code_reads(tmp_path):
    ExpertSelection({1: [4, 2]}, shared_experts=True).save(tmp_path)
    written = json.loads((tmp_path / "expert_cfg.json").read_text())
    assert written == {"experts": {"1": [4, 2]}, "shared_experts": True, "non_expert_modules": False}
    assert ExpertSelection.load(tmp_path / "expert_cfg.json") == ExpertSelection({1: [4, 2]}, shared_experts=True)
    # their code takes what is not there as false
    (tmp_path / "expert_cfg.json").write_text('{"experts": {"1": [4, 2]}}')
    assert ExpertSelection.load(tmp_path) == ExpertSelection({"1": torch.tensor([4, 2])})


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"experts": {"one": [1]}}', '{"experts": [3]}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "expert_cfg.json").write_text(text)
    with pytest.raises(ValueError, match=r'expected {"experts": {layer: \[ids\]}'):
        ExpertSelection.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.layers.2.mlp.experts.0.up_proj.weight"), "experts.0.up_proj.weight is missing"),
        (lambda x: x.update({"model.norm.weight": torch.ones(72)}), "model.norm.weight is one too many"),
        (lambda x: x.update({"model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(3, 4)}), r"\[3, 4\], expected"),
    ],
    ids=["missing", "too many", "shape"],
)
def test_files_that_do_not_hold_the_selection_change_nothing(tmp_path, change, message):
    model = tiny_model()
    save_experts(model, ExpertSelection(CHOSEN), tmp_path)
    tensors = {name: x + 1 for name, x in load_file(tmp_path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_experts(model, tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


REFUSED = {
    "dense layer": ({0: [1]}, r"expected layers with experts \(1 to 2\), got layer 0"),
    "expert": ({1: [12]}, r"different experts out of 0 to 11 in layer 1, got \[12\]"),
    "twice": ({1: [3, 3]}, r"different experts out of 0 to 11 in layer 1, got \[3, 3\]"),
}


@pytest.mark.parametrize(("experts", "message"), REFUSED.values(), ids=REFUSED)
def test_experts_that_are_not_there_are_refused(experts, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        train_experts(model, ExpertSelection(CHOSEN | experts))
    assert all(x.requires_grad for x in model.parameters())


@needs_compiler
def test_a_model_in_another_state_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got a selection of nothing"):
        train_experts(tiny_model(), ExpertSelection({1: []}))
    with pytest.raises(ValueError, match="expected a model with experts"):
        train_experts(tiny_model(n_routed_experts=None), ExpertSelection(CHOSEN))
    with pytest.raises(TypeError, match="without adapters around it, got PeftModel"):
        train_experts(get_peft_model(tiny_model(), lora_config(tiny_model())), ExpertSelection(CHOSEN))
    packed = tiny_model()
    pack_experts(packed)
    ExpertSelection(CHOSEN).save(tmp_path)
    for use in (
        train_experts,
        lambda model, selection: load_experts(model, tmp_path),
        lambda model, selection: save_experts(model, selection, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"they are packed in 4 bits; unpack_experts\(model\) makes them plain"):
            use(packed, ExpertSelection(CHOSEN))
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which holds a checkpoint"):
        save_experts(tiny_model(), ExpertSelection(CHOSEN), tmp_path)
    for threshold in (0, -1, float("nan"), 5):
        with pytest.raises(ValueError, match="threshold must be above 0 and at most 1"):
            select_experts({1: [0.5, 0.5]}, threshold)
    with pytest.raises(ValueError, match=r"they are in training by ESFT; finish_training\(model\) makes them plain"):
        train_experts(in_training(selection=ExpertSelection({1: [3]})), ExpertSelection({2: [3]}))
    eager = tiny_model()
    eager.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="'grouped_mm' multiplies, got 'eager'; call model"):
        train_experts(eager, ExpertSelection(CHOSEN))
    optimized = tiny_model()
    optimize_for_inference(optimized)
    with pytest.raises(ValueError, match=r"they are optimized for inference; undo\(\)"):
        train_experts(optimized, ExpertSelection(CHOSEN))
    with pytest.raises(TypeError, match="expected a DeepSeek-V2 without adapters around it, got Linear"):
        train_experts(torch.nn.Linear(2, 3), ExpertSelection(CHOSEN))


def test_what_is_saved_is_what_is_in_training(tmp_path):
    model = in_training()
    others = {layer: [*chosen, 9] for layer, chosen in CHOSEN.items()}
    for selection in (ExpertSelection(others), ExpertSelection({1: CHOSEN[1]})):
        with pytest.raises(ValueError, match=r"expected the selection that is in training, of layer \d experts"):
            save_experts(model, selection, tmp_path / "experts")
    for part in ("shared_experts", "non_expert_modules"):
        with pytest.raises(ValueError, match=f"and {part}, which it names, are frozen"):
            save_experts(model, ExpertSelection(CHOSEN, **{part: True}), tmp_path / "experts")
    one_layer = in_training(selection=ExpertSelection({1: CHOSEN[1]}))
    with pytest.raises(ValueError, match=r"of layer 2 experts \[\], got \["):
        save_experts(one_layer, ExpertSelection(CHOSEN), tmp_path / "experts")
    assert not (tmp_path / "experts").exists()
    # of what there is nothing, nothing is frozen
    selection = ExpertSelection(CHOSEN, shared_experts=True)
    save_experts(in_training(selection=selection, n_shared_experts=None), selection, tmp_path / "without shared")
    save_experts(model, ExpertSelection({layer: chosen[::-1] for layer, chosen in CHOSEN.items()}), tmp_path)


def test_values_of_another_type_are_refused(tmp_path):
    model = tiny_model()
    activity = activity_of(model, random_ids(1, 8))
    for use in (train_experts, lambda *given: save_experts(*given, tmp_path)):
        with pytest.raises(TypeError, match="expected an ExpertSelection, got dict"):
            use(model, CHOSEN)
    with pytest.raises(TypeError, match=r"from expert_scores\(activity\), got Activity"):
        select_experts(activity, 0.2)
    with pytest.raises(ValueError, match=r"expert_cfg.json, as save_experts .* it is not there; checkpoints load with"):
        load_experts(model, tmp_path)


@pytest.mark.parametrize("experts", [[1, 2], None, {1: 0}, {"a": [0]}, {1: [1.5]}, {1: "01"}], ids=str)
def test_what_is_no_selection_is_refused(experts):
    with pytest.raises(ValueError, match=r"expected experts by layer, {layer: \[numbers\]}, got"):
        ExpertSelection(experts)


def test_a_file_that_is_cut_off_or_no_folder_changes_nothing(tmp_path):
    model = tiny_model()
    save_experts(model, ExpertSelection(CHOSEN), tmp_path)
    with pytest.raises(ValueError, match="expected the folder that save_experts wrote, got the file"):
        load_experts(model, tmp_path / "expert_cfg.json")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off"):
        load_experts(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    training = in_training()
    with pytest.raises(ValueError, match="expected plain routed experts, and they are in training"):
        load_experts(training, tmp_path)


def added_by_peft(model):
    return get_peft_model(model, lora_config(model, routed_experts=True))


def added_by_transformers(model):
    model.add_adapter(lora_config(model, routed_experts=True))
    return model


@pytest.mark.parametrize("add", [added_by_peft, pytest.param(added_by_transformers, marks=needs_its_peft)])
def test_adapters_put_on_meanwhile_do_not_lock_training_in(add):
    """What is trained ends, and the adapters stay as they were."""
    model = in_training()
    adapted = add(model)
    for use in (train_experts, lambda *given: save_experts(*given, "nowhere")):
        with pytest.raises(TypeError, match="without adapters"):
            use(adapted, ExpertSelection(CHOSEN))
    finish_training(adapted)
    adapted(input_ids=random_ids(1, 5))
    learning = [name for name, x in adapted.named_parameters() if x.requires_grad]
    assert learning
    assert all(".lora_" in name for name in learning)


@pytest.mark.parametrize("change", ["fused", "data"])
def test_what_no_version_counts_is_seen_in_evaluation(change):
    """A backward pass through an evaluation, another evaluation, and the step or exchange of weights after it."""
    model, ids = in_training().eval(), random_ids(2, 9)
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


def test_the_last_step_is_merged_and_kept_by_other_weights():
    model = in_training()
    step(model)
    slot = model.model.layers[1].mlp.experts.trained_down_proj.detach().clone()
    # of a file with one expert alone, which is not among the trained ones
    shard = {
        name: x for name, x in official_state_dict(tiny_model(seed=4)).items() if "layers.1.mlp.experts.9." in name
    }
    model.load_state_dict(shard, strict=False)
    assert torch.equal(model.model.layers[1].mlp.experts.trained_down_proj, slot)
    step(model)
    slot = model.model.layers[1].mlp.experts.trained_down_proj.detach().clone()
    finish_training(model)
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj[CHOSEN[1]], slot)


def test_a_copy_trains_on_its_own():
    model = in_training()
    other = copy.deepcopy(model)
    step(model)
    assert isinstance(other.model.layers[1].mlp.experts.weights, TrainedWeights)
    expected = tiny_model().model.layers[1].mlp.experts.down_proj
    assert torch.equal(other.state_dict()["model.layers.1.mlp.experts.down_proj"], expected)
