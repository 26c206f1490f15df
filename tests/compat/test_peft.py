"""Canaries: what compat/peft.py and its siblings use of peft is still as it expects.

A test here fails with what changed and which code uses it. It passes on all versions that pyproject.toml admits.
"""

import inspect
import warnings

import peft
import pytest
import torch
from packaging import version
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as peft_lora
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import transformers_weight_conversion
from torch import nn

from deepseek_latent.compat import peft as compat
from deepseek_latent.compat import peft_config, peft_warnings
from tests.compat.helpers import linear, takes


def adapted(**options) -> nn.Module:
    model = nn.Sequential(linear())
    options = {"target_modules": ["0"], "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(r=2, **options)).base_model.model[0]


def test_lora_layers_have_the_class_names_that_are_checked():
    assert compat.is_lora_linear(adapted()), "used by attention/read_linear"
    assert peft_lora.ParamWrapper.__module__ == "peft.tuners.lora.layer", "used by experts/adapters"
    assert not compat.is_lora_linear(linear())
    assert compat.is_adapted(adapted()), "used by fingerprints and by ESFT"


def test_lora_layers_have_the_attributes_that_are_read():
    layer = adapted().eval()
    for name in ("lora_A", "lora_B", "scaling", "lora_variant", "merged", "disable_adapters", "active_adapters"):
        assert hasattr(layer, name), f"LoRA layers have no {name}; used by acting_adapters"
    (adapter,) = compat.acting_adapters(layer)
    x = torch.randn(3, 4)
    added = adapter.b(adapter.a(x)) * adapter.scaling
    torch.testing.assert_close(layer(x), layer.base_layer(x) + added)
    assert compat.acting_adapters(adapted(use_dora=True)) is None, (
        "variants are no longer in lora_variant; used by acting_adapters"
    )
    for name in ("other_param_names", "active_adapter", "merged_adapters"):
        assert hasattr(layer, name), f"LoRA layers have no {name}; used by adapter_state"


def test_an_adapter_acts_also_if_one_before_it_is_on_other_layers_only():
    model = get_peft_model(nn.Sequential(linear(), nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["1"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model[0].eval()
    assert layer.active_adapters == ["default", "second"], "used by acting_adapters"
    (adapter,) = compat.acting_adapters(layer)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + adapter.b(adapter.a(x)) * adapter.scaling)


def test_stacked_factors_multiply_to_what_peft_adds():
    model = nn.Sequential(nn.Module())
    model[0].weight = nn.Parameter(torch.zeros(3, 5, 4))
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = get_peft_model(model, config).base_model.model[0]
    assert compat.is_lora_parameter(wrapper)
    assert wrapper.parameter_name == "weight", "used by experts/adapters"
    (adapter,) = compat.acting_adapters(wrapper)
    a, b = compat.stacked_factors(wrapper, adapter)
    torch.testing.assert_close(b @ a * adapter.scaling, wrapper.get_delta_weight("default"))


def test_peft_converts_targets_by_the_function_that_is_replaced():
    """If peft drops it, the tests of targets show whether `prevent_target_renaming` is still needed."""
    ours = transformers_weight_conversion._convert_peft_config_moe
    assert [*inspect.signature(ours).parameters] == ["peft_config", "model"], "used by prevent_target_renaming"
    assert ours.__wrapped__.__module__ == "peft.utils.transformers_weight_conversion"


def test_peft_attaches_and_merges_by_the_functions_that_are_wrapped():
    inject = BaseTuner.inject_adapter
    assert [*inspect.signature(inject).parameters][:3] == ["self", "model", "adapter_name"], (
        "used by support_offloading"
    )
    assert inject.__wrapped__.__module__ == "peft.tuners.tuners_utils"
    for method in (peft_lora.ParamWrapper.merge, peft_lora.ParamWrapper.unmerge):
        assert method.__wrapped__.__module__ == "peft.tuners.lora.layer", "used by support_offloading"
    assert hasattr(peft_lora.ParamWrapper, "get_param"), "used by support_offloading"
    for kind in (PeftModel, PeftMixedModel):
        load = kind.from_pretrained.__func__
        assert [*inspect.signature(load).parameters][:3] == ["cls", "model", "model_id"], "used by support_offloading"
        assert load.__wrapped__.__module__.startswith("peft."), "used by support_offloading"
    assert takes(PeftModel.load_adapter, "model_id", "adapter_name"), "used by support_offloading"
    config = LoraConfig()
    assert (config.peft_type, config.use_dora, config.init_lora_weights) == ("LORA", False, True), "support_offloading"


def test_peft_writes_cards_by_the_function_that_is_wrapped():
    write = PeftModel.create_or_update_model_card
    assert hasattr(write, "describes_targets"), "an import of this package no longer replaces it"
    assert takes(write, "output_dir"), "used by describe_targets"
    assert "create_or_update_model_card(save_directory)" in inspect.getsource(PeftModel.save_pretrained), (
        "cards are written elsewhere; used by describe_targets"
    )


def test_peft_warns_of_patterns_in_the_words_that_are_corrected():
    assert hasattr(BaseTuner.inject_adapter, "corrects_pattern_warnings"), (
        "an import of this package no longer replaces it"
    )
    # peft 0.20 does not warn of them
    if version.parse(peft.__version__) >= version.parse("0.21"):
        config = LoraConfig(target_modules=["0"], rank_pattern={"1": 3}, alpha_pattern={"1": 3})
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            tuner = get_peft_model(nn.Sequential(linear()), config).base_model
        prefixes = [str(warning.message).partition("['1']")[0] for warning in shown]
        assert [x for x in prefixes if x in peft_warnings._PREFIXES] == [*peft_warnings._PREFIXES], (
            "used by correct_pattern_warnings"
        )
        assert tuner.targeted_parameter_names == [], "used by correct_pattern_warnings"


def test_activated_adapters_have_a_variant_of_their_own():
    layer = adapted(alora_invocation_tokens=[1])
    assert compat.acts_on_some_tokens(layer), "aLoRA is stored otherwise; used by DeepseekV2Attention"
    assert not compat.acts_on_some_tokens(adapted())


def test_configs_are_read_as_peft_does():
    fields = {"r": 3, "target_modules": ["a.up"], "exclude_modules": ["1.a.up"], "an_option_of_later": 1}
    config = peft_config.lora_config_of(fields)
    assert [peft_config.is_target_module(config, f"{i}.a.up") for i in range(3)] == [True, False, True], (
        "conversion/adapter"
    )
    assert not peft_config.is_target_module(config, "0.aa.up")
    model = nn.Sequential(nn.Sequential(linear()), linear())
    config = LoraConfig(target_modules=[], target_parameters=["0.0.weight"], r=8, rank_pattern={"0.weight": 2})
    found = {
        name
        for name, layer in get_peft_model(model, config).named_modules()
        if isinstance(layer, peft_lora.ParamWrapper)
    }
    assert found == {"base_model.model.0.0"}
    assert [peft_config.is_target_parameter(config, name) for name in ("0.0.weight", "1.weight", "10.0.weight")] == [
        True,
        False,
        False,
    ], "used by conversion/adapter"
    assert peft_config.value_for("0.0.weight", {"1.weight": 5, "0.weight": 2, ".*": 3}, 8) == 2
    assert peft_config.value_for("0.0.bias", {"1.weight": 5}, 8) == 8


def test_adapters_are_made_as_wide_as_the_part_of_a_split_weight():
    source = inspect.getsource(tuners_utils._get_in_out_features)
    assert "weight.to_local().shape" in source, "factors have whole widths now; drop support_several_processes"
    assert "if _torch_supports_distributed and" in source, "used by support_several_processes"
    assert tuners_utils._torch_supports_distributed is True, "used by support_several_processes"


def test_an_adapter_that_is_refused_can_be_taken_off():
    assert hasattr(PeftModel.load_adapter, "removes_refused"), "an import of this package no longer replaces it"
    assert [*inspect.signature(PeftModel.from_pretrained).parameters][:3] == ["model", "model_id", "adapter_name"], (
        "used by remove_refused_adapters"
    )
    tuner = get_peft_model(nn.Sequential(linear()), LoraConfig(target_modules=["0"])).base_model
    assert isinstance(tuner, BaseTuner), "used by remove_refused_adapters"
    assert isinstance(tuner.unload()[0], nn.Linear), "used by remove_refused_adapters"


def test_an_adapter_that_matches_no_module_is_an_error_of_the_function_that_is_wrapped():
    assert hasattr(BaseTuner.inject_adapter, "refuses_single_experts"), (
        "an import of this package no longer replaces it"
    )
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(nn.Sequential(linear()), LoraConfig(target_modules=["1"]))
