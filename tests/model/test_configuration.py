"""The configuration reads, writes and refuses what it should, and every field has an effect."""

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_latent import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
)
from deepseek_latent.attention.rotary import softmax_scale
from deepseek_latent.configuration import checks
from tests.support import LITE, NATIVE, V2, random_ids, tiny_model

PUBLISHED_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": PUBLISHED_YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V2_LITE = DEEPSEEK_V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}
DEEPSEEK_V2_5 = DEEPSEEK_V2 | {"rope_scaling": PUBLISHED_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}
ESFT_LITE = DEEPSEEK_V2_LITE | {"rope_scaling": None, "max_position_embeddings": 4096}
PUBLISHED = {"V2": DEEPSEEK_V2, "V2-Lite": DEEPSEEK_V2_LITE, "V2.5": DEEPSEEK_V2_5, "ESFT-lite": ESFT_LITE}

every_published = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED.keys())


@pytest.fixture
def write_config(tmp_path):
    """Writes a config.json and returns its folder."""

    def write(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


@pytest.fixture
def saved(tmp_path_factory):
    """Saves a configuration, and returns the config.json that it wrote and its folder."""

    def save(config: DeepseekV2Config) -> tuple[dict[str, Any], str]:
        folder = tmp_path_factory.mktemp("saved")
        config.save_pretrained(folder)
        return json.loads((folder / "config.json").read_text()), str(folder)

    return save


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    return str(folder)


# reading and writing


@every_published
def test_published_config_is_read_field_by_field(published, write_config):
    config = AutoConfig.from_pretrained(write_config(published))
    assert type(config) is DeepseekV2Config
    renamed = {"auto_map", "rope_scaling", "rope_theta", "torch_dtype", "transformers_version"}
    assert {name: getattr(config, name) for name in published.keys() - renamed} == {
        name: published[name] for name in published.keys() - renamed
    }
    assert config.dtype is torch.bfloat16
    scaling = dict(published["rope_scaling"] or {"type": "default"})
    assert config.rope_parameters == {"rope_theta": 10000, "rope_type": scaling.pop("type"), **scaling}


@every_published
def test_published_config_is_written_as_it_was_read(published, write_config, saved):
    written, _ = saved(AutoConfig.from_pretrained(write_config(published)))
    ours = {"rope_parameters", "dtype", "pad_token_id", "output_router_logits", "classifier_dropout"}
    # with a rope_scaling and without rope_theta, every client takes 10000
    left_out = {"rope_theta"} if published["rope_scaling"] else set()
    assert {name: value for name, value in written.items() if name not in ours | {"transformers_version"}} == {
        name: value for name, value in published.items() if name not in left_out | {"auto_map", "transformers_version"}
    }
    assert ours <= written.keys()


@pytest.mark.parametrize("scaling", [PUBLISHED_YARN, None], ids=["yarn", "plain"])
def test_another_theta_is_always_written(scaling, saved):
    written, _ = saved(DeepseekV2Config(rope_theta=50000.0, rope_scaling=scaling))
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 50000.0


@every_published
def test_trainer_can_read_a_checkpoint_it_resumes_from(published, write_config, saved, tmp_path):
    written, _ = saved(AutoConfig.from_pretrained(write_config(published)))
    (tmp_path / "resumed.json").write_text(json.dumps(written))
    assert transformers.PreTrainedConfig.from_json_file(tmp_path / "resumed.json").transformers_version


CHANGED_IN_MEMORY = {
    "another router": (lambda c: setattr(c, "topk_method", "noaux_tc"), "topk_method must be 'greedy'"),
    "more heads": (lambda c: setattr(c, "num_attention_heads", 4), "num_key_value_heads must equal"),
    "too many experts": (lambda c: setattr(c, "num_experts_per_tok", 30), "between 1 and n_routed_experts"),
    "rope without theta": (
        lambda c: setattr(c, "rope_parameters", {"rope_type": "linear", "factor": 2.0}),
        "linear needs a positive rope_theta",
    ),
    "rope without type": (lambda c: setattr(c, "rope_parameters", {"rope_theta": 9.0}), "a dict with rope_type"),
    "no rope": (
        lambda c: setattr(c, "rope_parameters", None),
        "dict with rope_type and rope_theta, got None",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGED_IN_MEMORY.values(), ids=CHANGED_IN_MEMORY.keys())
def test_a_config_changed_in_memory_is_checked_when_a_model_is_built_from_it(change, message):
    config = DeepseekV2Config(**V2)
    change(config)
    with pytest.raises(ValueError, match=message):
        DeepseekV2ForCausalLM(config)


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


def test_written_config_has_what_other_clients_require(saved):
    written, _ = saved(DeepseekV2Config(**V2 | {"n_group": None, "topk_group": None, "topk_method": "greedy"}))
    assert written["model_type"] == "deepseek_v2"
    assert (written["n_group"], written["topk_group"]) == (1, 1)
    assert (written["scoring_func"], written["moe_layer_freq"], written["norm_topk_prob"]) == ("softmax", 1, False)
    assert written["rope_scaling"]["type"] == written["rope_parameters"]["rope_type"] == "yarn"
    assert "rope_type" not in written["rope_scaling"]
    assert "auto_map" not in written


def test_torch_dtype_is_written_beside_dtype(saved):
    written, _ = saved(DeepseekV2Config(dtype=torch.bfloat16))
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


def test_plain_rope_is_written_in_both_forms(saved):
    written, _ = saved(DeepseekV2Config(rope_theta=50000.0))
    assert written["rope_parameters"] == {"rope_theta": 50000.0, "rope_type": "default"}
    assert written["rope_theta"] == 50000.0
    assert written["rope_scaling"] is None


@every_published
def test_saved_config_loads_as_an_equal_one(published, write_config, saved):
    config = AutoConfig.from_pretrained(write_config(published))
    _, folder = saved(config)
    assert AutoConfig.from_pretrained(folder).to_diff_dict() == config.to_diff_dict()


@every_published
def test_transformers_own_class_reads_the_same(published, write_config, saved):
    config = AutoConfig.from_pretrained(write_config(published))
    _, folder = saved(config)
    native = NATIVE.DeepseekV2Config.from_pretrained(folder)
    # transformers' own class keeps the older key beside the newer one
    assert {name: value for name, value in native.rope_parameters.items() if name != "type"} == config.rope_parameters
    shared = {f.name for f in dataclasses.fields(native)} & {f.name for f in dataclasses.fields(config)}
    shared -= {"rope_parameters", "transformers_version"}
    assert {name: getattr(native, name) for name in shared} == {name: getattr(config, name) for name in shared}


def test_config_written_by_transformers_own_class_is_read(tmp_path):
    fields = V2 | {"rope_scaling": V2["rope_scaling"] | {"rope_type": "yarn"}}
    NATIVE.DeepseekV2Config(**copy.deepcopy(fields)).save_pretrained(tmp_path)
    assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == DeepseekV2Config(**V2).rope_parameters


@pytest.mark.parametrize(
    ("published", "scale"),
    [
        (DEEPSEEK_V2, 0.1147213868),
        (DEEPSEEK_V2_LITE, 0.1147213868),
        (DEEPSEEK_V2_5, 0.1352337789),
        (ESFT_LITE, 192**-0.5),
    ],
    ids=PUBLISHED.keys(),
)
def test_published_configs_have_the_published_softmax_scale(published, scale, write_config):
    assert softmax_scale(AutoConfig.from_pretrained(write_config(published))) == pytest.approx(scale, abs=1e-10, rel=0)


def test_defaults_are_those_of_deepseeks_own_class():
    config = DeepseekV2Config()
    assert {name: getattr(config, name) for name in DEEPSEEKS_DEFAULTS} == DEEPSEEKS_DEFAULTS


DEEPSEEKS_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "ep_size": 1,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": None,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "attention_dropout": 0.0,
}


def test_misspelt_default_of_deepseeks_class_is_greedy():
    assert DeepseekV2Config(topk_method="gready").topk_method == "greedy"


def test_omitted_fields_of_a_file_take_deepseeks_defaults(write_config):
    omitted = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "kv_lora_rank", "v_head_dim")
    folder = write_config({name: value for name, value in DEEPSEEK_V2.items() if name not in omitted})
    config = AutoConfig.from_pretrained(folder)
    assert [getattr(config, name) for name in omitted] == [30, 32, 32, 512, 128]


def test_widths_are_derived_from_the_fields():
    config = DeepseekV2Config(qk_nope_head_dim=24, qk_rope_head_dim=10, kv_lora_rank=40)
    assert (config.qk_head_dim, config.head_dim, config.cached_width) == (34, 10, 50)


def test_changing_the_config_does_not_change_the_dict_that_was_passed():
    given = {"rope_type": "default", "rope_theta": 500.0}
    config = DeepseekV2Config(rope_parameters=given)
    config.rope_parameters["rope_theta"] = 1.0
    assert given == {"rope_type": "default", "rope_theta": 500.0}


# the two forms of RoPE's settings


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


# the first upload, and other architectures


FIRST_UPLOAD = V2 | {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"]}


def test_first_upload_is_read_as_deepseek_v2(write_config, saved):
    config = AutoConfig.from_pretrained(write_config(FIRST_UPLOAD))
    assert type(config) is DeepseekV2Config
    written, _ = saved(config)
    assert written["model_type"] == "deepseek_v2"
    assert config.rope_parameters == DeepseekV2Config(**V2).rope_parameters


def test_model_of_the_first_upload_is_loaded_and_saved_as_deepseek_v2(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "first/config.json").write_text(json.dumps(FIRST_UPLOAD))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(loaded) is DeepseekV2ForCausalLM
    assert torch.equal(loaded(random_ids(1, 5)).logits, model(random_ids(1, 5)).logits)
    loaded.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("deepseek_v2", ["DeepseekV2ForCausalLM"])


@pytest.mark.parametrize("given", [{}, {"kv_lora_rank": None}], ids=["absent", "null"])
@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForCausalLM])
def test_deepseek_moe_is_not_taken_for_the_first_upload(auto_class, given, write_config):
    fields = {name: value for name, value in FIRST_UPLOAD.items() if name != "kv_lora_rank"} | given
    with pytest.raises(ValueError, match=r"'deepseek' without kv_lora_rank is DeepSeek-MoE 16B.*expected a DeepSeek"):
        auto_class.from_pretrained(write_config(fields))


def test_deepseek_v3_is_left_to_transformers(write_config):
    config = AutoConfig.from_pretrained(write_config({"model_type": "deepseek_v3"}))
    assert type(config) is transformers.DeepseekV3Config


def test_deepseek_v3_is_refused_by_name(write_config):
    fields = DEEPSEEK_V2 | {"model_type": "deepseek_v3"}
    message = "model_type must be 'deepseek_v2', got 'deepseek_v3', another architecture; load it with"
    with pytest.raises(ValueError, match=message):
        DeepseekV2Config(**fields)
    with pytest.raises(ValueError, match=message):
        DeepseekV2Config.from_pretrained(write_config(fields))


# refusals

VL2_TINY = {
    "use_mla": False,
    "kv_lora_rank": None,
    "q_lora_rank": None,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "v_head_dim": 0,
    "hidden_size": 1280,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}
REFUSED = {
    "topk_method": ({"topk_method": "noaux_tc"}, r"'greedy' or 'group_limited_greedy', got 'noaux_tc'; .* DeepSeek-V3"),
    "scoring_func": ({"scoring_func": "sigmoid"}, r"must be 'softmax', got 'sigmoid'; .* DeepSeek-V3"),
    "n_group": ({"n_group": 7}, r"divide n_routed_experts \(160\) .* got 7; use a divisor, or topk_method='greedy'"),
    "eps": ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number, got -1.0"),
    "scaling nan": (
        {"routed_scaling_factor": float("nan")},
        "routed_scaling_factor must be a positive .* got nan",
    ),
    "pad": ({"pad_token_id": 102400}, r"pad_token_id must be below vocab_size \(102400\), got 102400"),
    "n_group 0": ({"n_group": 0}, r"n_group must divide n_routed_experts \(160\) .* got 0"),
    "topk_group above": ({"topk_group": 9}, r"topk_group must lie between 1 and n_group \(8\), got 9"),
    "topk_group below": ({"topk_group": 0}, r"topk_group must lie between 1 and n_group \(8\), got 0"),
    "k above groups": (
        {"topk_group": 1, "num_experts_per_tok": 21},
        r"num_experts_per_tok \(21\) is above .* topk_group \(1\) x 20 .* = 20; lower it or raise topk_group",
    ),
    "k above experts": ({"num_experts_per_tok": 161}, r"between 1 and n_routed_experts \(160\), got 161"),
    "k 0": ({"num_experts_per_tok": 0}, r"between 1 and n_routed_experts \(160\), got 0"),
    "k null": ({"num_experts_per_tok": None}, r"between 1 and n_routed_experts \(160\), got None"),
    "odd rope width": ({"qk_rope_head_dim": 63}, r"must be even, .* got 63; use 64 or 62"),
    "VL2-Tiny": (VL2_TINY, r"use_mla must be true, got false: .*VL2-Tiny.* load it with DeepSeek's own code"),
    "use_mla": ({"use_mla": False}, r"use_mla must be true, got false"),
    "no latent": ({"kv_lora_rank": None}, r"kv_lora_rank must be the width .* got null: .* load it with its own code"),
    "mlp_bias": ({"mlp_bias": True}, r"mlp_bias must be false, got true"),
    "rope_type": ({"rope_scaling": {"type": "spiral"}}, r"rope_type must be one of default, .*yarn.*, got 'spiral'"),
    "types disagree": (
        {"rope_scaling": PUBLISHED_YARN | {"rope_type": "linear"}},
        r"rope_type and the older type must agree, got 'linear' and 'yarn'; leave one out",
    ),
    "yarn factor": (
        {"rope_scaling": PUBLISHED_YARN | {"factor": None}},
        r"yarn needs a positive factor in rope_scaling, got None",
    ),
    "yarn factor 0": ({"rope_scaling": PUBLISHED_YARN | {"factor": 0}}, r"yarn needs a positive factor .* got 0"),
    "yarn original length": (
        {"rope_scaling": {"type": "yarn", "factor": 40}},
        r"yarn needs a positive original_max_position_embeddings in rope_scaling, got None",
    ),
    "linear factor": ({"rope_scaling": {"type": "linear"}}, r"linear needs a positive factor .* got None"),
    "dynamic factor": ({"rope_scaling": {"type": "dynamic"}}, r"dynamic needs a positive factor .* got None"),
    "partial rotary": (
        {"partial_rotary_factor": 0.5},
        r"partial_rotary_factor must be 1, got 0.5; set qk_rope_head_dim",
    ),
    "grouped heads": (
        {"num_key_value_heads": 8},
        r"num_key_value_heads must equal num_attention_heads \(128\), .* got 8; give both the same number",
    ),
    "activation": ({"hidden_act": "sigh"}, r"hidden_act must be an activation of transformers, got 'sigh'; .* 'silu'"),
    "dropout": ({"attention_dropout": 1.5}, r"attention_dropout must be a probability between 0 and 1, got 1.5"),
    "head dropout": ({"classifier_dropout": -0.1}, r"classifier_dropout must be a probability .* got -0.1"),
    "no drops": ({"no_drop_fraction": 1.5}, r"no_drop_fraction must be a probability .* got 1.5"),
    "capacity": ({"device_capacity_factor": 0.0}, r"device_capacity_factor must be a positive number, got 0.0; None"),
    "devices": (
        {"topk_method": "greedy", "n_group": 7, "device_capacity_factor": 1.0},
        r"n_group must divide n_routed_experts \(160\) into groups of equal size, got 7",
    ),
    "dense layers": ({"first_k_dense_replace": -1}, r"first_k_dense_replace must be 0 or more, got -1"),
    "q_lora_rank": ({"q_lora_rank": 0}, r"q_lora_rank must be at least 1, or null to leave it out, got 0"),
    "n_routed_experts": ({"n_routed_experts": 0}, r"n_routed_experts must be at least 1, or null .* got 0"),
    "n_shared_experts": ({"n_shared_experts": 0}, r"n_shared_experts must be at least 1, or null .* got 0"),
}
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("intermediate_size", "moe_intermediate_size", "moe_layer_freq"),
)
REFUSED |= {f"{name} 0": ({name: 0}, f"{name} must be at least 1, got 0") for name in SIZES}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_names_what_was_expected_and_what_came(wrong, message, write_config):
    fields = DEEPSEEK_V2 | wrong
    with pytest.raises(ValueError, match=message):
        DeepseekV2Config(**fields)
    folder = write_config(fields)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_greedy_routing_accepts_any_groups():
    config = DeepseekV2Config(**V2 | {"topk_method": "greedy", "n_group": 5, "topk_group": 9})
    assert (config.n_group, config.topk_group) == (5, 9)


def test_a_config_that_became_wrong_is_not_saved(tmp_path):
    config = DeepseekV2Config(**V2)
    config.topk_group = 5
    with pytest.raises(StrictDataclassClassValidationError, match=r"topk_group must lie between 1 and n_group \(4\)"):
        config.save_pretrained(tmp_path)


# every field has an effect


def logits(fields: dict[str, Any]) -> Tensor:
    return tiny_model(**fields)(random_ids(2, 24)).logits


def train_logits(fields: dict[str, Any]) -> Tensor:
    model = tiny_model(**fields).train()
    torch.manual_seed(3)
    return model(random_ids(2, 9)).logits


def balanced_loss(fields: dict[str, Any]) -> Tensor:
    ids = random_ids(2, 9)
    return tiny_model(**fields).train()(ids, labels=ids, output_router_logits=True).loss


def shapes(fields: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tiny_model(**fields).state_dict().items()}


def is_accepted(fields: dict[str, Any]) -> bool:
    try:
        DeepseekV2Config(**V2 | fields)
    except ValueError:
        return False
    return True


def initial_spread(fields: dict[str, Any]) -> dict[str, float]:
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**V2 | fields))
    return {name: round(tensor.std().item(), 1) for name, tensor in model.named_parameters() if tensor.dim() > 1}


def has_cache(fields: dict[str, Any]) -> bool:
    return tiny_model(**fields)(random_ids(1, 3)).cache is not None


def is_tied(fields: dict[str, Any]) -> bool:
    model = tiny_model(**fields)
    return model.lm_head.weight is model.model.embed_tokens.weight


def has_router_logits(fields: dict[str, Any]) -> bool:
    return tiny_model(**fields)(random_ids(1, 3)).router_logits is not None


def label_of_padded_sequence(fields: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    model = DeepseekV2ForSequenceClassification(DeepseekV2Config(**V2 | fields)).eval()
    return model(torch.tensor([[5, 6, 7, 3, 4, 4]])).logits


def train_labels(fields: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    model = DeepseekV2ForTokenClassification(DeepseekV2Config(**V2 | fields)).train()
    return model(random_ids(1, 5)).logits


def first_token_without_a_prompt(fields: dict[str, Any]) -> int:
    return tiny_model(**fields).generate(max_new_tokens=1, do_sample=False)[0, 0].item()


def generated_length(fields: dict[str, Any]) -> int:
    return tiny_model(**fields).generate(random_ids(1, 3), max_new_tokens=4, do_sample=False).shape[1]


def written(name: str) -> Callable[[dict[str, Any]], Any]:
    def read_back(fields: dict[str, Any]) -> Any:
        value = json.loads(DeepseekV2Config(**V2 | fields).to_json_string())[name]
        assert name not in fields or value == fields[name]
        return value

    return read_back


class Effect(NamedTuple):
    value: Any
    observe: Callable[[dict[str, Any]], Any]
    base: dict[str, Any] = {}  # other fields that make this one matter
    also: dict[str, Any] = {}  # other fields that must change with it


EFFECTS = {
    "vocab_size": Effect(104, shapes),
    "hidden_size": Effect(80, shapes),
    "num_hidden_layers": Effect(2, shapes),
    "num_attention_heads": Effect(2, shapes),
    "num_key_value_heads": Effect(1, is_accepted),
    "initializer_range": Effect(0.3, initial_spread),
    "rms_norm_eps": Effect(0.1, logits),
    "max_position_embeddings": Effect(16, logits, base={"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "rope_parameters": Effect(
        {"rope_type": "default", "rope_theta": 100.0}, logits, also={"rope_theta": None, "rope_scaling": None}
    ),
    "tie_word_embeddings": Effect(True, is_tied),
    "use_cache": Effect(False, has_cache),
    "pad_token_id": Effect(4, label_of_padded_sequence, base={"pad_token_id": 3}),
    "bos_token_id": Effect(5, first_token_without_a_prompt),
    "eos_token_id": Effect(list(range(96)), generated_length, base={"eos_token_id": None}),
    "q_lora_rank": Effect(None, shapes),
    "kv_lora_rank": Effect(48, shapes),
    "qk_nope_head_dim": Effect(32, shapes),
    "qk_rope_head_dim": Effect(16, shapes),
    "v_head_dim": Effect(16, shapes),
    "attention_bias": Effect(True, shapes),
    "attention_dropout": Effect(0.5, train_logits),
    "hidden_act": Effect("gelu", logits),
    "intermediate_size": Effect(96, shapes),
    "moe_intermediate_size": Effect(40, shapes),
    "n_routed_experts": Effect(16, shapes),
    "n_shared_experts": Effect(None, shapes),
    "num_experts_per_tok": Effect(2, logits),
    "first_k_dense_replace": Effect(2, shapes),
    "moe_layer_freq": Effect(2, shapes),
    "topk_method": Effect("greedy", logits),
    "scoring_func": Effect("sigmoid", is_accepted),
    "n_group": Effect(6, logits),
    "topk_group": Effect(1, logits),
    "norm_topk_prob": Effect(True, logits),
    "routed_scaling_factor": Effect(2.5, logits),
    "output_router_logits": Effect(True, has_router_logits),
    "classifier_dropout": Effect(0.5, train_labels),
    "aux_loss_alpha": Effect(0.25, balanced_loss),
    "device_aux_loss_alpha": Effect(0.25, balanced_loss),
    "communication_aux_loss_alpha": Effect(0.25, balanced_loss),
    "seq_aux": Effect(False, balanced_loss),
    "device_capacity_factor": Effect(0.5, train_logits, base={"no_drop_fraction": 0.0}),
    "no_drop_fraction": Effect(1.0, train_logits, base={"device_capacity_factor": 0.5, "no_drop_fraction": 0.0}),
    # kept for other programs, which read what was given
    "ep_size": Effect(8, written("ep_size")),
    "pretraining_tp": Effect(4, written("pretraining_tp")),
}


def is_same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("name", EFFECTS)
def test_changing_the_field_has_an_effect(name):
    effect = EFFECTS[name]
    before = effect.observe(effect.base)
    assert is_same(effect.observe(effect.base), before), "the observation is not reproducible"
    assert not is_same(effect.observe(effect.base | {name: effect.value} | effect.also), before)


def test_every_matrix_starts_with_the_initial_spread():
    assert set(initial_spread({"initializer_range": 0.3}).values()) == {0.3}


def test_the_table_of_effects_has_every_field():
    declared = inspect.get_annotations(DeepseekV2Config)
    assert EFFECTS.keys() == declared.keys()


def test_balancing_a_single_device_is_warned_of(monkeypatch):
    warned = []
    monkeypatch.setattr(checks.logger, "warning_once", warned.append)
    DeepseekV2Config(**V2 | {"device_capacity_factor": 1.0})
    DeepseekV2Config(**LITE)
    assert not warned
    DeepseekV2Config(**LITE | {"communication_aux_loss_alpha": 0.05})
    assert warned[-1].startswith("communication_aux_loss_alpha balance devices")
    DeepseekV2Config(**LITE | {"device_aux_loss_alpha": 0.05, "device_capacity_factor": 1.0})
    assert warned[-1].startswith("device_aux_loss_alpha and device_capacity_factor balance devices, but n_group is 1")
