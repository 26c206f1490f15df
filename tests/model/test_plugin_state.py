"""A user can ask which class a model is of, and is told in one sentence where it is transformers' own."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

import deepseek_latent
from deepseek_latent import (
    DeepseekV2ForCausalLM,
    ExpertSelection,
    activity_of,
    can_absorb,
    is_active,
    lora_config,
    optimize_for_inference,
    pack_experts,
    train_experts,
    unpack_experts,
)
from tests.model.official_checkpoints import every_class
from tests.support import NATIVE, V2, native_twin, random_ids, tiny_model


def native_config(**options) -> NATIVE.DeepseekV2Config:
    """A config of transformers' own class, as it is made where this package was not imported before."""
    return NATIVE.DeepseekV2Config(**deepcopy(V2), **options)


@pytest.fixture(scope="module")
def native() -> NATIVE.DeepseekV2ForCausalLM:
    return native_twin(tiny_model())


def test_models_of_this_package_are_active_also_inside_wrappers():
    model = tiny_model()
    assert is_active(model)
    assert is_active(model.model)
    assert is_active(nn.Sequential(get_peft_model(model, lora_config(model, r=4))))


def test_models_of_other_classes_are_not_active(native):
    assert not is_active(native)
    assert not can_absorb(native)
    assert not is_active(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a model, got DeepseekV2Config; of a pipeline, pass pipeline\.model"):
        is_active(tiny_model().config)


def test_lora_on_kv_b_proj_can_be_absorbed_and_dora_cannot():
    model = tiny_model()
    assert can_absorb(model)
    lora = LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False)
    assert can_absorb(get_peft_model(tiny_model(), lora).eval())
    dora = LoraConfig(target_modules=["kv_b_proj"], use_dora=True)
    assert not can_absorb(get_peft_model(model, dora).eval())
    assert is_active(model)


CALLS = {
    "lora_config": lora_config,
    "pack_experts": pack_experts,
    "unpack_experts": unpack_experts,
    "optimize_for_inference": optimize_for_inference,
    "activity_of": lambda model: activity_of(model, random_ids(1, 4)),
    "train_experts": lambda model: train_experts(model, ExpertSelection({1: [0]})),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_transformers_own_class_is_named_with_what_to_do(call, native):
    message = r"this is transformers' own DeepseekV2\w+: import deepseek_latent before from_pretrained\."
    with pytest.raises(TypeError, match=message):
        call(native)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_code_beside_a_checkpoint_is_named_with_what_to_do(call):
    members = {"__module__": "transformers_modules.a.modeling", "get_input_embeddings": None}
    remote = type("DeepseekV2Model", (nn.Module,), members)
    with pytest.raises(TypeError, match=r"DeepseekV2Model of the code beside a checkpoint.*without trust_remote_code"):
        call(remote())


def test_a_config_of_transformers_own_class_is_named_with_what_to_do():
    message = "this is transformers' own DeepseekV2Config: import deepseek_latent before you make the config"
    with pytest.raises(TypeError, match=message):
        lora_config(native_config())


@every_class
def test_a_config_made_before_the_import_loads_a_model_of_this_package(auto_class, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    given = native_config(attn_implementation="eager")
    model, expected = (auto_class.from_pretrained(tmp_path, config=config).eval() for config in (given, None))
    assert type(model) is type(expected)
    assert is_active(model)
    assert isinstance(model.config, deepseek_latent.DeepseekV2Config)
    assert (model.config._attn_implementation, expected.config._attn_implementation) == ("eager", "sdpa")
    assert type(given) is NATIVE.DeepseekV2Config
    if auto_class in (AutoModel, AutoModelForCausalLM):
        ids = random_ids(1, 9)
        torch.testing.assert_close(model(ids)[0], expected(ids)[0])
    direct = type(expected).from_pretrained(tmp_path, config=given)
    assert isinstance(direct.config, deepseek_latent.DeepseekV2Config)


def test_a_config_made_before_the_import_makes_a_new_model_of_this_package():
    for make in (AutoModelForCausalLM.from_config, DeepseekV2ForCausalLM):
        model = make(native_config())
        assert (type(model), type(model.config)) == (DeepseekV2ForCausalLM, deepseek_latent.DeepseekV2Config)


def test_heads_of_transformers_own_class_keep_their_backbone():
    model = NATIVE.DeepseekV2ForSequenceClassification(native_config())
    assert type(model.model) is NATIVE.DeepseekV2Model


def test_other_architectures_are_refused_as_before():
    with pytest.raises(TypeError, match="expected a DeepSeek-V2 or its config, got LlamaConfig"):
        lora_config(LlamaConfig())
