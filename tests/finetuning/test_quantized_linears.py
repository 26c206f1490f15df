"""QLoRA trains on projections that bitsandbytes or torchao packs, and leaves routed experts as they are.

None of our code may read a packed weight.
"""

import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from deepseek_latent import lora_config
from deepseek_latent.attention import attention as latent_attention
from deepseek_latent.kernels import optimize_for_inference
from tests.support import needs_compiler, random_ids, relative_error, tiny_model

# how far rounding moves an element, relative to the largest element of the weight
ROUNDING = {"bitsandbytes-nf4": 0.2, "bitsandbytes-int8": 0.01, "torchao-int8": 0.01}
each_kind = pytest.mark.parametrize("kind", ROUNDING)
CACHED, NEW = 9, 4
IDS = random_ids(2, CACHED + NEW)
KV_B, OUT = "model.layers.1.self_attn.kv_b_proj", "model.layers.1.self_attn.o_proj"


@pytest.fixture(autouse=True)
def _pack_the_same_way_on_every_cpu(monkeypatch):
    """On a CPU with AVX512-BF16, bitsandbytes repacks NF4 in bfloat16 by 32 rows, which do not divide ours."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


def quantized(kind: str, folder, dtype: torch.dtype = torch.float32, unpacked: list[str] | None = None):
    package = kind.split("-")[0]
    pytest.importorskip(package, reason=f"{package} is not installed")
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        how = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=unpacked)
    else:
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        # with a threshold, outliers of one token would decide how the other tokens of the call are rounded
        bits = bits if kind.endswith("nf4") else {"load_in_8bit": True, "llm_int8_threshold": 0.0}
        how = BitsAndBytesConfig(**bits, llm_int8_skip_modules=unpacked)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=dtype).eval()


def with_lora(model, **options) -> PeftModel:
    return get_peft_model(model, lora_config(model, r=4, **{"routed_experts": True} | options)).eval()


@torch.no_grad()
def weight_by_calling(linear: nn.Module) -> Tensor:
    return linear(torch.eye(linear.in_features)).T


@torch.no_grad()
def logits(model) -> Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def decode(model) -> Tensor:
    cache = model(input_ids=IDS[:, :CACHED], use_cache=True).cache
    return torch.cat([model(input_ids=x, cache=cache).logits for x in IDS[:, CACHED:].split(1, dim=1)], dim=1)


def count_absorptions_while_decoding(model, monkeypatch) -> int:
    """Also checks that decoding gives the logits of a pass over the whole sequence."""
    calls, absorb = [], latent_attention.absorbed_attention
    with monkeypatch.context() as patch:
        patch.setattr(latent_attention, "absorbed_attention", lambda *x, **kw: calls.append(1) or absorb(*x, **kw))
        assert relative_error(decode(model), logits(model)[:, CACHED:]) < 1e-5
    return len(calls)


@each_kind
def test_projections_are_packed_and_all_other_weights_are_those_of_the_file(kind, folder):
    model, plain = quantized(kind, folder, torch.bfloat16), tiny_model(torch.bfloat16)
    for name, expected in plain.named_parameters():
        actual, owner = model.get_parameter(name), name.rpartition(".")[0]
        if type(plain.get_submodule(owner)) is nn.Linear and owner != "lm_head":
            assert type(actual) is not nn.Parameter, name
        else:
            assert type(actual) is nn.Parameter, name
            # routers keep the float32 of the file
            assert torch.equal(actual.to(expected.dtype), expected), name


# torchao matches these patterns with names of parameters; a list replaces the default, which is the head
@pytest.mark.parametrize("unpacked", [None, [".*kv_b_proj", "lm_head"]], ids=["kv_b packed", "kv_b unpacked"])
@each_kind
def test_only_a_kv_b_proj_that_was_left_unpacked_is_absorbed(kind, unpacked, folder, monkeypatch):
    model = quantized(kind, folder, unpacked=unpacked)
    expected = NEW * len(model.model.layers) if unpacked else 0
    assert count_absorptions_while_decoding(model, monkeypatch) == expected
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS), "eos_token_id": None}
    texts = [model.generate(IDS, use_cache=use_cache, pad_token_id=0, **options) for use_cache in (True, False)]
    assert torch.equal(*texts)
    assert count_absorptions_while_decoding(with_lora(model, init_lora_weights=False), monkeypatch) == expected


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "unprepared"])
@each_kind
def test_qlora_trains_every_factor_and_nothing_else(kind, prepared, folder):
    model = quantized(kind, folder, torch.bfloat16)
    if prepared:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    # peft's preparation turns all weights that bitsandbytes left unpacked into float32, routed experts as well
    is_widened = prepared and kind.startswith("bitsandbytes")
    experts = model.model.layers[1].mlp.experts.gate_up_proj
    assert experts.dtype == (torch.float32 if is_widened else torch.bfloat16)
    model = with_lora(model).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses
    assert not [name for name, parameter in trained.items() if not parameter.grad.abs().sum() > 0]


@each_kind
def test_a_packed_model_and_its_adapter_survive_saving_and_loading(kind, folder, tmp_path):
    model = quantized(kind, folder)
    model.save_pretrained(tmp_path / "packed")
    plain, adapted = logits(model), with_lora(model, init_lora_weights=False)
    adapted.save_pretrained(tmp_path / "adapter")
    assert relative_error(logits(adapted), plain) > 1e-2, "the adapter has no effect, so this test cannot fail"
    for base in (quantized(kind, folder), AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()):
        assert type(base.get_submodule(KV_B).weight) is not nn.Parameter
        assert torch.equal(logits(base), plain)
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert relative_error(logits(loaded), logits(adapted)) < 1e-5


@each_kind
def test_merging_rounds_projections_again_and_routed_experts_not_at_all(kind, folder):
    model = with_lora(quantized(kind, folder), init_lora_weights=False)
    adapted = model.base_model.model.get_submodule(KV_B)
    before, projection = weight_by_calling(adapted.base_layer), weight_by_calling(adapted)
    # peft puts one wrapper around the other, the first parameter inside
    down = model.base_model.model.model.layers[1].mlp.experts
    added = {wrapper.parameter_name: wrapper.get_delta_weight("default") for wrapper in (down, down.base_layer)}
    expected = {name: getattr(down.get_base_layer(), name) + delta for name, delta in added.items()}
    merged = model.merge_and_unload()
    assert relative_error(before, projection) > 2 * ROUNDING[kind]
    assert relative_error(weight_by_calling(merged.get_submodule(KV_B)), projection) < ROUNDING[kind]
    for name, weight in expected.items():
        assert torch.equal(getattr(merged.model.layers[1].mlp.experts, name), weight)


@needs_compiler
@pytest.mark.parametrize("weights", [None, "int8"])
@each_kind
def test_operators_leave_packed_projections_as_they_are_under_adapters(kind, weights, folder):
    # with int8 weights, adapters on routed experts are refused
    model = with_lora(quantized(kind, folder), init_lora_weights=False, routed_experts=weights is None)
    packed = model.base_model.model.get_submodule(OUT).base_layer
    before, expected = weight_by_calling(packed), decode(model)
    optimize_for_inference(model, weights=weights)
    assert torch.equal(weight_by_calling(packed), before)
    # bitsandbytes also rounds inputs to 8 bits, and the last bit of a float32 may decide which way
    budget = ROUNDING[kind] if kind == "bitsandbytes-int8" else 1e-5
    # with int8 weights, the experts and the head are rounded
    assert relative_error(decode(model), expected) < (budget if weights is None else 0.1)
