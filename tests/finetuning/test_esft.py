"""Expert-specialized fine-tuning trains what the selection names and touches nothing else."""

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from deepseek_latent import lora_config
from deepseek_latent.finetuning.esft import finish_training, save_experts, train_experts
from deepseek_latent.finetuning.expert_selection import ExpertSelection
from deepseek_latent.finetuning.packing import pack_experts
from deepseek_latent.kernels import optimize_for_inference
from tests.finetuning.support import CHOSEN, model_in_training, step
from tests.support import (
    NATIVE,
    needs_compiler,
    needs_its_peft,
    official_state_dict,
    random_ids,
    relative_error,
    tiny_model,
)


def test_gradients_equal_those_of_training_the_whole_model():
    ids, whole, model = random_ids(3, 40), tiny_model().train(), model_in_training()
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
    before, model = official_state_dict(tiny_model()), model_in_training()
    losses = [step(model) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    parts = ("gate_proj", "up_proj", "down_proj")
    expected_names = {
        f"model.layers.{i}.mlp.experts.{e}.{p}.weight" for i, chosen in CHOSEN.items() for e in chosen for p in parts
    }
    assert changed == expected_names
    ids, expected = random_ids(2, 20), model.eval()(random_ids(2, 20)).logits
    native = NATIVE.DeepseekV2ForCausalLM.from_pretrained(tmp_path).eval()
    assert relative_error(native(ids).logits, expected) < 1e-5


def test_adapters_on_experts_in_training_are_refused():
    model, ids = model_in_training(), random_ids(2, 9)
    model = get_peft_model(model, lora_config(model, routed_experts=True))
    with pytest.raises(
        ValueError, match=r"take no adapters while they are in training by ESFT; end the training with finish"
    ):
        model(input_ids=ids)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_over_two_passes(use_reentrant):
    ids, others = random_ids(3, 20), random_ids(3, 20, seed=8)

    def gradients(model):
        (model(ids, labels=ids).loss + model(others, labels=others).loss).backward()
        return [x.grad for x in model.parameters() if x.requires_grad]

    expected, model = gradients(model_in_training()), model_in_training()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert all(relative_error(*pair) < 1e-5 for pair in zip(gradients(model), expected, strict=True))


@pytest.mark.parametrize(
    ("options", "part"),
    [({"shared_experts": True}, "shared_experts"), ({"non_expert_modules": True}, "self_attn")],
    ids=["shared", "no experts"],
)
def test_other_modules_that_the_selection_names_are_trained(options, part):
    model = model_in_training(selection=ExpertSelection(CHOSEN, **options))
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
        model = model_in_training()
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


REFUSED = {
    "dense layer": ({0: [1]}, r"expected layers with experts \(1 to 2\), got layer 0"),
    "expert": ({1: [12]}, r"distinct experts from 0 to 11 in layer 1, got \[12\]"),
    "twice": ({1: [3, 3]}, r"distinct experts from 0 to 11 in layer 1, got \[3, 3\]"),
}


@pytest.mark.parametrize(("experts", "message"), REFUSED.values(), ids=REFUSED)
def test_selecting_experts_that_the_model_does_not_have_is_refused(experts, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        train_experts(model, ExpertSelection(CHOSEN | experts))
    assert all(x.requires_grad for x in model.parameters())


@needs_compiler
def test_training_experts_of_a_model_in_another_state_is_refused():
    with pytest.raises(ValueError, match="got a selection of nothing"):
        train_experts(tiny_model(), ExpertSelection({1: []}))
    with pytest.raises(ValueError, match="expected a model with experts"):
        train_experts(tiny_model(n_routed_experts=None), ExpertSelection(CHOSEN))
    with pytest.raises(TypeError, match="without adapters around it, got PeftModel"):
        train_experts(get_peft_model(tiny_model(), lora_config(tiny_model())), ExpertSelection(CHOSEN))
    packed = tiny_model()
    pack_experts(packed)
    with pytest.raises(ValueError, match=r"they are packed in 4 bits; unpack_experts\(model\) makes them plain"):
        train_experts(packed, ExpertSelection(CHOSEN))
    with pytest.raises(ValueError, match=r"they are in training by ESFT; finish_training\(model\) makes them plain"):
        train_experts(model_in_training(selection=ExpertSelection({1: [3]})), ExpertSelection({2: [3]}))
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
    with pytest.raises(TypeError, match="expected an ExpertSelection, got dict"):
        train_experts(tiny_model(), CHOSEN)


def added_by_peft(model):
    return get_peft_model(model, lora_config(model, routed_experts=True))


def added_by_transformers(model):
    model.add_adapter(lora_config(model, routed_experts=True))
    return model


def injected(model):
    return inject_adapter_in_model(lora_config(model), model)


@pytest.mark.parametrize("add", [added_by_peft, injected, pytest.param(added_by_transformers, marks=needs_its_peft)])
def test_training_can_be_finished_after_adapters_were_added(add):
    """Only the adapters take gradients after that."""
    model = model_in_training()
    adapted = add(model)
    for use in (train_experts, lambda *given: save_experts(*given, "nowhere")):
        with pytest.raises(TypeError, match="without adapters"):
            use(adapted, ExpertSelection(CHOSEN))
    finish_training(adapted)
    adapted(input_ids=random_ids(1, 5))
    learning = [name for name, x in adapted.named_parameters() if x.requires_grad]
    assert learning
    assert all(".lora_" in name for name in learning)
