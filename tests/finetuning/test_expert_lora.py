"""LoRA on routed experts: what stock peft computes with whole weights, without making them."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM

import deepseek_latent.experts.moe as moe
from deepseek_latent.experts.adapters import unwrapped
from deepseek_latent.experts.weights import ExpertWeights
from deepseek_latent.kernels import optimize_for_inference
from tests.support import NATIVE, needs_compiler, random_ids, relative_error, tiny_model

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def lora(*parameters: str, r: int = 3, **options) -> LoraConfig:
    options = {"lora_alpha": 5, "target_modules": ["o_proj"], "init_lora_weights": False} | options
    return LoraConfig(r=r, target_parameters=list(parameters or BOTH), **options)


def adapted(dtype=torch.float32, config: LoraConfig | None = None, **variant) -> PeftModel:
    model = tiny_model(dtype, **variant)
    torch.manual_seed(5)
    return get_peft_model(model, config or lora()).eval()


@pytest.fixture
def counted(monkeypatch):
    """Calls of our own products."""
    calls = []

    def count(*arguments):
        calls.append(arguments)
        return compute(*arguments)

    compute = ExpertWeights.forward_with
    monkeypatch.setattr(ExpertWeights, "forward_with", count)
    return calls


def by_peft(monkeypatch) -> None:
    monkeypatch.setattr(moe, "with_adapters", lambda experts: experts)


def loss_and_gradients(model: PeftModel, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


OPERATIONS = {
    "as it is": lambda model: None,
    "gradient checkpointing": lambda model: (
        model.gradient_checkpointing_enable({"use_reentrant": False}),
        model.enable_input_require_grads(),
    ),
    "another adapter": lambda model: (model.add_adapter("b", lora(r=5)), model.set_adapter("b")),
    "two at once": lambda model: (model.add_adapter("b", lora(r=5)), model.base_model.set_adapter(["default", "b"])),
    "one deleted": lambda model: (
        model.add_adapter("b", lora(r=5)),
        model.set_adapter("b"),
        model.delete_adapter("default"),
    ),
    "base trained too": lambda model: [x.requires_grad_() for x in model.parameters()],
}


CASES = {name: (operation, BOTH) for name, operation in OPERATIONS.items()}
CASES |= {"gate_up alone": (OPERATIONS["as it is"], BOTH[:1]), "down alone": (OPERATIONS["as it is"], BOTH[1:])}


@pytest.mark.parametrize(("operation", "parameters"), CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_stock_peft(monkeypatch, counted, operation, parameters):
    model, ids = adapted(config=lora(*parameters)).train(), random_ids(3, 30)
    torch.manual_seed(6)
    operation(model)
    loss, gradients = loss_and_gradients(model, ids)
    # again in the backward pass where activations were not kept
    assert len(counted) == (4 if model.is_gradient_checkpointing else 2)
    by_peft(monkeypatch)
    expected_loss, expected = loss_and_gradients(model, ids)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert sum("experts" in name and "lora" in name for name in gradients) == 4 * len(parameters) * (
        2 if operation is OPERATIONS["two at once"] else 1
    )
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"experts.down_proj": 7}}], ids=str)
def test_scaling_and_ranks_are_pefts(monkeypatch, counted, options):
    model, ids = adapted(config=lora(**options)), random_ids(2, 20)
    loss, _ = loss_and_gradients(model, ids)
    assert len(counted) == 2
    by_peft(monkeypatch)
    assert loss == pytest.approx(loss_and_gradients(model, ids)[0], rel=1e-6)


def test_factors_are_those_whose_product_peft_adds():
    """Experts, rank, input and output pairwise different, so that no axis is taken for another."""
    model = adapted()
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    _, factors = unwrapped(wrapper)
    for layer in (wrapper, wrapper.base_layer):
        assert isinstance(layer, ParamWrapper)
        [(a, b, scaling)] = factors[layer.parameter_name]
        torch.testing.assert_close(b @ a * scaling, layer.get_delta_weight("default"))


@torch.no_grad()
def test_adapters_that_are_off_or_merged_add_nothing_twice(counted):
    model, ids = adapted(), random_ids(2, 20)
    with_adapters = model(ids).logits
    with model.disable_adapter():
        assert relative_error(model(ids).logits, tiny_model()(ids).logits) < 1e-6
    count = len(counted)
    model.merge_adapter()
    assert relative_error(model(ids).logits, with_adapters) < 1e-5
    assert len(counted) == count
    model.unmerge_adapter()
    assert relative_error(model(ids).logits, with_adapters) < 1e-5
    assert relative_error(model.merge_and_unload()(ids).logits, with_adapters) < 1e-5


@torch.no_grad()
def test_files_are_pefts_and_open_on_transformers_own_class(tmp_path):
    # transformers' class does not normalise shares, and ours does not here
    model, ids = adapted(), random_ids(2, 20)
    model.save_pretrained(tmp_path / "adapter")
    tiny_model().save_pretrained(tmp_path / "base")
    expected = model(ids).logits
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, expected)
    native = NATIVE.DeepseekV2ForCausalLM.from_pretrained(tmp_path / "base")
    native = PeftModel.from_pretrained(native, tmp_path / "adapter").eval()
    assert relative_error(native(ids).logits, expected) < 1e-5
    native.save_pretrained(tmp_path / "back")
    back = PeftModel.from_pretrained(tiny_model(), tmp_path / "back").eval()
    assert torch.equal(back(ids).logits, expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(loaded.eval()(ids).logits, expected)


@torch.no_grad()
def test_an_adapter_can_be_loaded_without_memory_and_put_in_place_of_another(tmp_path, counted):
    first, ids = adapted(), random_ids(2, 20)
    torch.manual_seed(9)
    second = get_peft_model(tiny_model(), lora()).eval()
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "first", low_cpu_mem_usage=True).eval()
    assert torch.equal(model(ids).logits, first(ids).logits)
    hotswap_adapter(model, str(tmp_path / "second"), adapter_name="default")
    assert torch.equal(model(ids).logits, second(ids).logits)
    assert relative_error(first(ids).logits, second(ids).logits) > 1e-2


@torch.no_grad()
def test_two_adapters_of_unlike_dtypes_decode(tmp_path):
    model, ids = adapted(torch.bfloat16), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "b", autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "b"])
    assert len({x.dtype for name, x in model.named_parameters() if "experts" in name and "lora_" in name}) == 2
    model.generate(input_ids=ids, **GREEDY)


@torch.no_grad()
def test_a_training_step_between_two_generations_is_seen(counted):
    model, ids = adapted(), random_ids(2, 20)
    first = model.generate(input_ids=ids, **GREEDY)
    with torch.enable_grad():
        optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=5.0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    second = model.generate(input_ids=ids, **GREEDY)
    assert not torch.equal(first, second)
    assert torch.equal(second, copy.deepcopy(model).merge_and_unload().generate(ids, **GREEDY))
    assert counted


@torch.no_grad()
def test_what_only_peft_can_do_is_left_to_it(counted):
    model, ids = adapted(), random_ids(2, 20)
    expected = model(ids).logits
    count = len(counted)
    # another way of multiplying experts was asked for
    model.base_model.model.set_experts_implementation("eager")
    assert relative_error(model(ids).logits, expected) < 1e-5
    model.base_model.model.set_experts_implementation("grouped_mm")
    seen = []
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    wrapper.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert relative_error(model(ids).logits, expected) < 1e-5
    # the layer that is watched is peft's, the other is ours
    assert len(seen) == 1
    assert len(counted) == count + 1


@torch.no_grad()
def test_a_mixed_batch_is_refused_in_pefts_words():
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        adapted()(input_ids=random_ids(2, 9), adapter_names=["default", "__base__"])


def test_what_peft_does_not_do_for_parameters_is_said_in_its_words():
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        adapted(config=lora(lora_dropout=0.1))
    model = adapted()
    model.add_adapter("b", lora(r=5))
    with pytest.raises(ValueError, match=r"add_weighted_adapter does not support targeting nn\.Parameter"):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "both", combination_type="linear")


def test_routing_that_flips_between_forward_and_recomputation_does_not_break_checkpointing():
    """Nothing on the tape has a size that depends on how many tokens an expert got."""
    model, ids = adapted().train(), random_ids(2, 20)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        for layer in model.base_model.model.model.layers[1:]:
            layer.mlp.gate.weight.add_(torch.randn_like(layer.mlp.gate.weight) * 0.3)
    loss.backward()


@needs_compiler
@torch.no_grad()
def test_adapters_act_beside_the_kernels(counted):
    model, ids = adapted(), random_ids(2, 9)
    expected = model.generate(input_ids=ids, **GREEDY)
    optimize_for_inference(model.base_model.model)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), tiny_model().generate(ids, **GREEDY))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_factors_are_trained_in_float32(dtype, counted):
    model, ids = adapted(dtype).train(), random_ids(2, 20)
    _, gradients = loss_and_gradients(model, ids)
    assert len(counted) == 2
    assert {x.dtype for name, x in gradients.items() if "experts" in name} == {torch.float32}
    assert all(x.isfinite().all() for x in gradients.values())


@pytest.mark.slow
@needs_compiler
def test_inductor_says_the_same_in_bfloat16():
    """It hands torch's grouped products the factors in an order that these refuse."""
    torch.compiler.reset()
    block = adapted(torch.bfloat16, lora(r=8)).base_model.model.model.layers[1].mlp
    hidden = torch.randn(2, 20, 72, dtype=torch.bfloat16)
    found = []
    for multiply in (block, torch.compile(block, fullgraph=True)):
        block.zero_grad()
        result = multiply(hidden)
        result.float().square().sum().backward()
        gradients = {name: x.grad.clone() for name, x in block.named_parameters() if x.grad is not None}
        found.append((result.detach(), gradients))
    (expected, gradients), (result, compiled) = found
    assert relative_error(result, expected) < 2**-6
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        assert relative_error(compiled[name], gradient) < 2**-6, name


@torch.no_grad()
def test_one_token_meets_all_active_adapters(monkeypatch):
    model, token = adapted(), random_ids(1, 1)
    model.add_adapter("b", lora(r=5))
    model.base_model.set_adapter(["default", "b"])
    ours = model(input_ids=token).logits
    by_peft(monkeypatch)
    assert relative_error(ours, model(input_ids=token).logits) < 1e-5
