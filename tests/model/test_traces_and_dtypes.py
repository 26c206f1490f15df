"""Traces, float64 and activated LoRA give the right numbers, or are refused by one sentence."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from deepseek_latent import lora_config
from deepseek_latent.finetuning.packing import pack_experts
from deepseek_latent.kernels import optimize_for_inference
from tests.support import LITE, V2, needs_compiler, random_ids, relative_error, tiny_model

IDS = random_ids(2, 9)
OTHERS = [random_ids(2, 9, seed=7), random_ids(1, 14, seed=8), random_ids(1, 1, seed=3)]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LATENT = {"backend": "latent", "cache_dtype": "int8"}


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def assert_traced(model):
    traced = torch.jit.trace(Logits(model), (IDS,))
    for ids in (IDS, *OTHERS):
        with torch.no_grad():
            assert relative_error(traced(ids), model(input_ids=ids).logits) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("experts", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("variant", [V2, LITE], ids=["V2", "Lite"])
def test_a_trace_equals_the_model_on_other_tokens(variant, experts, grad):
    model = tiny_model(**variant)
    model.set_experts_implementation(experts)
    with torch.set_grad_enabled(grad):
        assert_traced(model)


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_adapters_is_traced():
    model = tiny_model()
    assert_traced(get_peft_model(model, lora_config(model, routed_experts=True, init_lora_weights=False)).eval())


@needs_compiler
@pytest.mark.filterwarnings("ignore")
def test_an_optimized_model_is_traced():
    model = tiny_model()
    optimize_for_inference(model)
    assert_traced(model)


def adapted(model):
    torch.manual_seed(0)
    return get_peft_model(model, lora_config(model, routed_experts=True, init_lora_weights=False)).eval()


def packed(model):
    pack_experts(model, 8)
    return model


def optimized(model):
    optimize_for_inference(model)
    return model


MADE = {"as it is": lambda model: model, "adapted": adapted, "packed": packed}
MADE["optimized"] = pytest.param(optimized, marks=needs_compiler)


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_model_generates_the_same_in_float64(make):
    model = make(tiny_model())
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        generated = model.generate(input_ids=IDS, **GREEDY)
        actual = model.double()(input_ids=IDS).logits
    assert actual.dtype == torch.float64
    assert relative_error(expected, actual) < 1e-5
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(input_ids=IDS, **GREEDY, **options), generated)


def test_hooks_on_experts_run_in_float64():
    model, seen = tiny_model().double(), []
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        model.model.layers[1].mlp.experts.register_forward_hook(lambda *given: seen.append(given))
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert seen


def test_a_model_generates_the_same_in_float64_from_a_cache_in_8_bits():
    options = {**GREEDY, "cache_implementation": "quantized", "cache_config": LATENT}
    assert torch.equal(tiny_model().double().generate(IDS, **options), tiny_model().generate(IDS, **options))


def test_gradients_in_float64_equal_those_of_eager_experts():
    gradients = []
    for experts in ("grouped_mm", "eager"):
        model = tiny_model(torch.float64)
        model.set_experts_implementation(experts)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters()})
    assert all(relative_error(gradients[0][name], x) < 1e-6 for name, x in gradients[1].items())


INVOCATION = [5, 6]
# the start of each row's invocation, counted from the end
OFFSETS = [6, 9]


def activated(targets):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, init_lora_weights=False, target_modules=targets, alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM"
    )
    return get_peft_model(tiny_model(**LITE), config).eval()


def invoked():
    ids = random_ids(2, 12)
    for row, offset in zip(ids, OFFSETS):
        row[-offset : 2 - offset] = torch.tensor(INVOCATION)
    return ids


def test_an_activated_lora_on_kv_b_proj_acts_after_its_invocation():
    model, ids = activated(["kv_b_proj"]), invoked()
    attention = model.base_model.model.model.layers[0].self_attn
    seen = []
    attention.kv_b_proj.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        with_cache, without = model(input_ids=ids).logits, model(input_ids=ids, use_cache=False).logits
    assert torch.equal(with_cache, without)
    layer, (latent, output) = attention.kv_b_proj, seen[0]
    plain = layer.base_layer.weight
    both = plain + layer.get_delta_weight("default")
    for row, offset in enumerate(OFFSETS):
        torch.testing.assert_close(output[row, :-offset], latent[row, :-offset] @ plain.T)
        torch.testing.assert_close(output[row, -offset:], latent[row, -offset:] @ both.T)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
def test_an_activated_lora_on_kv_b_proj_is_refused_over_cached_latents(rows, options):
    with pytest.raises(ValueError, match="leave kv_b_proj out of its target_modules"):
        activated(["kv_b_proj"]).generate(input_ids=invoked()[:rows], **GREEDY, **options)


def test_an_activated_lora_on_other_layers_generates_and_a_disabled_one_does_nothing():
    model, ids = activated(["q_proj", "kv_a_proj_with_mqa", "o_proj"]), invoked()
    tokens = ids
    for new in range(4):
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False, alora_offsets=[x + new for x in OFFSETS]).logits
        tokens = torch.cat((tokens, logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), tokens)
    model = activated(["kv_b_proj"])
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), tiny_model(**LITE).generate(ids, **GREEDY))
