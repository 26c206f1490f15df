"""RoPE's settings are read, overridden and written in both forms, and impossible ones are refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM
from tests.model.published_configs import DEEPSEEK_V2, PUBLISHED_YARN
from tests.support import V2


@pytest.mark.parametrize(
    "scaling",
    [{"type": "linear", "factor": 3.0}, None, {"type": "yarn", **PUBLISHED_YARN}],
    ids=["linear", "none", "yarn"],
)
def test_rope_scaling_set_in_memory_keeps_theta(scaling):
    config = DeepseekV2Config(**V2 | {"rope_theta": 77.0})
    config.rope_scaling = scaling
    expected = DeepseekV2Config(**V2 | {"rope_theta": 77.0, "rope_scaling": scaling})
    assert config.rope_parameters == expected.rope_parameters
    assert DeepseekV2ForCausalLM(config).model.rotary_emb.inv_freq.isfinite().all()


def test_rope_scaling_set_in_memory_may_have_a_theta():
    config = DeepseekV2Config(**V2)
    config.rope_scaling = {"type": "linear", "factor": 3.0, "rope_theta": 5.0}
    assert config.rope_parameters == {"rope_theta": 5.0, "rope_type": "linear", "factor": 3.0}


def test_two_thetas_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"rope_theta and the rope_theta inside rope_scaling .* 77.0 and 5.0"):
        DeepseekV2Config(rope_theta=77.0, rope_scaling={"type": "linear", "factor": 3.0, "rope_theta": 5.0})


def test_a_rope_scaling_that_the_user_passed_is_not_changed():
    given = {"type": "yarn", **PUBLISHED_YARN}
    before = dict(given)
    DeepseekV2Config(**V2 | {"rope_scaling": given})
    assert given == before


IMPOSSIBLE_ROPE = {
    "theta 0": ({"rope_theta": 0.0}, "positive rope_theta in rope_scaling, got 0.0"),
    "theta as text": ({"rope_theta": "1e4"}, "positive rope_theta in rope_scaling, got '1e4'"),
    "factor as text": ({"factor": "4"}, "positive factor in rope_scaling, got '4'"),
    "negative mscale": ({"mscale": -1.0}, "mscale in rope_scaling must be a number of 0 or more, got -1.0"),
    "longrope without lists": ({"rope_type": "longrope"}, "longrope needs the lists short_factor and long_factor"),
    "mscale without factor": (
        {"rope_type": "longrope", "factor": None, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        "mscale_all_dim needs a number as factor",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), IMPOSSIBLE_ROPE.values(), ids=IMPOSSIBLE_ROPE.keys())
def test_impossible_rope_numbers_are_refused(wrong, message):
    rope = {"rope_theta": 10000.0, **PUBLISHED_YARN, "rope_type": "yarn"} | wrong
    rope.pop("type", None)
    with pytest.raises(ValueError, match=message):
        DeepseekV2Config(**V2 | {"rope_theta": None, "rope_scaling": None, "rope_parameters": rope})


@pytest.mark.parametrize("name", ["mscale", "mscale_all_dim"])
def test_a_length_factor_may_be_switched_off_by_an_mscale_of_0(name, tiny_folder):
    rope = {"rope_theta": 10000.0, **PUBLISHED_YARN, name: 0.0}
    assert AutoConfig.from_pretrained(tiny_folder, rope_scaling=rope).rope_parameters[name] == 0.0


@pytest.mark.parametrize("extra", [{}, {"type": "yarn"}], ids=["rope_type", "rope_type and type"])
def test_rope_parameters_alone_are_enough(extra, write_config):
    rope = {name: value for name, value in PUBLISHED_YARN.items() if name != "type"}
    rope |= {"rope_type": "yarn", "rope_theta": 10000}
    fields = {name: value for name, value in DEEPSEEK_V2.items() if name not in ("rope_theta", "rope_scaling")}
    config = AutoConfig.from_pretrained(write_config(fields | {"rope_parameters": rope | extra}))
    assert config.rope_parameters == rope


@pytest.mark.parametrize(
    ("changed", "values"),
    [
        ({"factor": 20}, ("factor", "20", "40")),
        ({"rope_theta": 500000.0}, ("rope_theta", "500000.0", "10000")),
        ({"rope_type": "linear"}, ("rope_type", "'linear'", "'yarn'")),
        ({"type": "linear"}, ("rope_type", "'linear'", "'yarn'")),
    ],
    ids=["factor", "theta", "type", "old type key"],
)
def test_forms_that_disagree_are_refused(changed, values, write_config):
    rope = {"rope_type": "yarn", "rope_theta": 10000, **PUBLISHED_YARN}
    rope |= changed
    with pytest.raises(ValueError, match="must agree") as refusal:
        AutoConfig.from_pretrained(write_config(DEEPSEEK_V2 | {"rope_parameters": rope}))
    assert all(value in str(refusal.value) for value in values)


LINEAR = {"type": "linear", "factor": 3.0}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"rope_theta": 777.0}, DeepseekV2Config(**V2).rope_parameters | {"rope_theta": 777.0}),
        ({"rope_scaling": LINEAR}, {"rope_theta": 10000.0, "rope_type": "linear", "factor": 3.0}),
        ({"rope_scaling": None}, {"rope_theta": 10000.0, "rope_type": "default"}),
        ({"rope_scaling": LINEAR, "rope_theta": 9.0}, {"rope_theta": 9.0, "rope_type": "linear", "factor": 3.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, {"rope_theta": 5.0, "rope_type": "default"}),
    ],
    ids=["theta", "scaling", "no scaling", "scaling and theta", "parameters"],
)
@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForCausalLM])
def test_rope_is_overridden_at_loading(auto_class, override, expected, tiny_folder):
    loaded = auto_class.from_pretrained(tiny_folder, **override)
    assert getattr(loaded, "config", loaded).rope_parameters == expected


def test_rope_override_reaches_the_frequencies(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, rope_scaling=None, rope_theta=16.0)
    assert torch.equal(model.model.rotary_emb.inv_freq, 16.0 ** -torch.tensor([0, 0.25, 0.5, 0.75]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rms_norm_eps", 1e-3),
        ("norm_topk_prob", True),
        ("topk_group", 3),
        ("attention_dropout", 0.5),
        ("num_labels", 7),
    ],
)
@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForCausalLM])
def test_any_field_is_overridden_at_loading(auto_class, name, value, tiny_folder):
    loaded = auto_class.from_pretrained(tiny_folder, **{name: value})
    assert getattr(getattr(loaded, "config", loaded), name) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"topk_group": 5}, r"topk_group must lie between 1 and n_group \(4\), got 5"),
        ({"num_experts": 7}, r"n_group must divide n_routed_experts \(7\) .* got 4"),
        ({"topk_method": "noaux_tc"}, "topk_method must be .* got 'noaux_tc'"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn needs a positive factor"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type must be one of .* got 'spiral'"),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, "must agree, got rope_type"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForCausalLM])
def test_overrides_pass_the_same_checks(auto_class, override, message, tiny_folder):
    with pytest.raises(ValueError, match=message):
        auto_class.from_pretrained(tiny_folder, **override)
