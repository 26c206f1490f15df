"""LoRA on routed experts computes what stock peft computes, without adding adapters to whole weights."""

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
def calls_with_adapters(monkeypatch):
    """The calls that multiply experts by our own products, with adapters beside them."""
    calls = []

    def count(*arguments):
        calls.append(arguments)
        return compute(*arguments)

    compute = ExpertWeights.forward_with
    monkeypatch.setattr(ExpertWeights, "forward_with", count)
    return calls


def leave_adapters_to_peft(monkeypatch) -> None:
    monkeypatch.setattr(moe, "with_adapters", lambda experts, used_by_all: experts)


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
def test_loss_and_gradients_equal_those_of_stock_peft(monkeypatch, calls_with_adapters, operation, parameters):
    model, ids = adapted(config=lora(*parameters)).train(), random_ids(3, 30)
    torch.manual_seed(6)
    operation(model)
    loss, gradients = loss_and_gradients(model, ids)
    # with checkpointing, the backward pass calls them again
    assert len(calls_with_adapters) == (4 if model.is_gradient_checkpointing else 2)
    leave_adapters_to_peft(monkeypatch)
    expected_loss, expected = loss_and_gradients(model, ids)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert sum("experts" in name and "lora" in name for name in gradients) == 4 * len(parameters) * (
        2 if operation is OPERATIONS["two at once"] else 1
    )
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"experts.down_proj": 7}}], ids=str)
def test_scaling_and_ranks_equal_those_of_stock_peft(monkeypatch, calls_with_adapters, options):
    model, ids = adapted(config=lora(**options)), random_ids(2, 20)
    loss, _ = loss_and_gradients(model, ids)
    assert len(calls_with_adapters) == 2
    leave_adapters_to_peft(monkeypatch)
    assert loss == pytest.approx(loss_and_gradients(model, ids)[0], rel=1e-6)


def test_the_product_of_factors_is_what_peft_adds_to_the_weights():
    """All axes have different lengths, so that none can be taken for another."""
    model = adapted()
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    _, factors = unwrapped(wrapper)
    for layer in (wrapper, wrapper.base_layer):
        assert isinstance(layer, ParamWrapper)
        [(a, b, scaling)] = factors[layer.parameter_name]
        torch.testing.assert_close(b @ a * scaling, layer.get_delta_weight("default"))


@torch.no_grad()
def test_disabled_adapters_add_nothing_and_merged_ones_act_once(calls_with_adapters):
    model, ids = adapted(), random_ids(2, 20)
    with_adapters = model(ids).logits
    with model.disable_adapter():
        assert relative_error(model(ids).logits, tiny_model()(ids).logits) < 1e-6
    count = len(calls_with_adapters)
    model.merge_adapter()
    assert relative_error(model(ids).logits, with_adapters) < 1e-5
    assert len(calls_with_adapters) == count
    model.unmerge_adapter()
    assert relative_error(model(ids).logits, with_adapters) < 1e-5
    assert relative_error(model.merge_and_unload()(ids).logits, with_adapters) < 1e-5


@torch.no_grad()
def test_saved_adapters_load_on_transformers_own_class_and_back(tmp_path):
    # with this config, our class does not normalize gates; transformers' class never does
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
def test_an_adapter_can_be_loaded_with_low_memory_and_hotswapped(tmp_path, calls_with_adapters):
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
def test_two_adapters_of_different_dtypes_can_decode_together(tmp_path):
    model, ids = adapted(torch.bfloat16), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "b", autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "b"])
    assert len({x.dtype for name, x in model.named_parameters() if "experts" in name and "lora_" in name}) == 2
    model.generate(input_ids=ids, **GREEDY)


@torch.no_grad()
def test_generation_after_a_training_step_uses_the_new_factors(calls_with_adapters):
    model, ids = adapted(), random_ids(2, 20)
    first = model.generate(input_ids=ids, **GREEDY)
    with torch.enable_grad():
        optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=5.0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    second = model.generate(input_ids=ids, **GREEDY)
    assert not torch.equal(first, second)
    assert torch.equal(second, copy.deepcopy(model).merge_and_unload().generate(ids, **GREEDY))
    assert calls_with_adapters


@torch.no_grad()
def test_other_implementations_and_hooked_experts_are_left_to_peft(calls_with_adapters):
    model, ids = adapted(), random_ids(2, 20)
    expected = model(ids).logits
    count = len(calls_with_adapters)
    model.base_model.model.set_experts_implementation("eager")
    assert relative_error(model(ids).logits, expected) < 1e-5
    model.base_model.model.set_experts_implementation("grouped_mm")
    seen = []
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    wrapper.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert relative_error(model(ids).logits, expected) < 1e-5
    # peft computes the layer with the hook, we compute the other
    assert len(seen) == 1
    assert len(calls_with_adapters) == count + 1


@torch.no_grad()
def test_a_mixed_batch_raises_the_error_of_peft():
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        adapted()(input_ids=random_ids(2, 9), adapter_names=["default", "__base__"])


def test_what_peft_does_not_support_for_parameters_raises_its_error():
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        adapted(config=lora(lora_dropout=0.1))
    model = adapted()
    model.add_adapter("b", lora(r=5))
    with pytest.raises(ValueError, match=r"add_weighted_adapter does not support targeting nn\.Parameter"):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "both", combination_type="linear")


def test_checkpointing_works_where_recomputation_routes_tokens_differently():
    """No size in the graph of autograd depends on how many tokens an expert got."""
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
def test_adapters_act_on_experts_that_kernels_multiply(calls_with_adapters):
    model, ids = adapted(), random_ids(2, 9)
    expected = model.generate(input_ids=ids, **GREEDY)
    optimize_for_inference(model.base_model.model)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), tiny_model().generate(ids, **GREEDY))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_on_16_bit_experts_are_trained_in_float32(dtype, calls_with_adapters):
    model, ids = adapted(dtype).train(), random_ids(2, 20)
    _, gradients = loss_and_gradients(model, ids)
    assert len(calls_with_adapters) == 2
    assert {x.dtype for name, x in gradients.items() if "experts" in name} == {torch.float32}
    assert all(x.isfinite().all() for x in gradients.values())


@pytest.mark.slow
@needs_compiler
def test_inductor_gives_the_same_results_and_gradients_in_bfloat16():
    """Without our cast, it gives the factors a layout that torch's grouped products refuse."""
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
def test_all_active_adapters_act_on_a_single_token(monkeypatch):
    model, token = adapted(), random_ids(1, 1)
    model.add_adapter("b", lora(r=5))
    model.base_model.set_adapter(["default", "b"])
    ours = model(input_ids=token).logits
    leave_adapters_to_peft(monkeypatch)
    assert relative_error(ours, model(input_ids=token).logits) < 1e-5
