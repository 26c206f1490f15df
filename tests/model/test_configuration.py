"""The configuration reads and writes every field as DeepSeek's own files and other clients have it."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM
from deepseek_latent.attention.rotary import softmax_scale
from tests.model.published_configs import (
    DEEPSEEK_V2,
    DEEPSEEK_V2_5,
    DEEPSEEK_V2_LITE,
    ESFT_LITE,
    PUBLISHED,
    PUBLISHED_YARN,
    every_published,
)
from tests.support import NATIVE, V2, random_ids, tiny_model


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
def test_transformers_own_base_class_reads_what_is_written(published, write_config, saved):
    written, _ = saved(AutoConfig.from_pretrained(write_config(published)))
    assert transformers.PreTrainedConfig(**written).transformers_version


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


def test_without_a_word_about_devices_none_is_balanced_and_a_tenth_of_sequences_keeps_its_tokens():
    # DeepSeek's class has no such fields; 2.2.4 of the paper exempts about a tenth of the sequences
    config = DeepseekV2Config()
    assert (config.device_aux_loss_alpha, config.communication_aux_loss_alpha) == (0.0, 0.0)
    assert (config.device_capacity_factor, config.no_drop_fraction) == (None, 0.1)


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


def test_every_field_of_transformers_own_config_can_be_read(write_config):
    native = NATIVE.DeepseekV2Config(**copy.deepcopy(V2))
    config = AutoConfig.from_pretrained(write_config(V2 | {"model_type": "deepseek_v2"}))
    missing = [name for name in vars(native) if not name.startswith("_") and not hasattr(config, name)]
    assert missing == []
    for name in ("mlp_bias", "head_dim", "qk_head_dim"):
        assert getattr(config, name) == getattr(native, name)


def test_fields_that_deepseeks_files_do_not_have_are_read_from_a_file_and_not_written(write_config, saved):
    derived = {"mlp_bias": False, "head_dim": 8, "qk_head_dim": 24}
    folder = write_config(V2 | {"model_type": "deepseek_v2"} | derived)
    for config in (AutoConfig.from_pretrained(folder), AutoConfig.from_pretrained(folder, **derived)):
        written, _ = saved(config)
        assert written.keys().isdisjoint(derived)
        assert {name: getattr(config, name) for name in derived} == derived


def test_changing_the_config_does_not_change_the_dict_that_was_passed():
    given = {"rope_type": "default", "rope_theta": 500.0}
    config = DeepseekV2Config(rope_parameters=given)
    config.rope_parameters["rope_theta"] = 1.0
    assert given == {"rope_type": "default", "rope_theta": 500.0}


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
