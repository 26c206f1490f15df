"""A configuration that this architecture cannot have is refused with what was expected and what came."""

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM
from deepseek_latent.configuration import checks
from tests.model.published_configs import DEEPSEEK_V2, PUBLISHED_YARN
from tests.support import LITE, V2

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
    "unquantized channels": (
        {"num_unquantized_channels": 512},
        r"num_unquantized_channels must be even, 0 or more and below kv_lora_rank \(512\), got 512; leave it out",
    ),
    "cache of the source": ({"source_cached_width": 0}, r"source_cached_width must be at least 1, or null .* got 0"),
    "dense layers": ({"first_k_dense_replace": -1}, r"first_k_dense_replace must be 0 or more, got -1"),
    "q_lora_rank": ({"q_lora_rank": 0}, r"q_lora_rank must be at least 1, or null to leave it out, got 0"),
    "n_routed_experts": ({"n_routed_experts": 0}, r"n_routed_experts must be at least 1, or null .* got 0"),
    "n_shared_experts": ({"n_shared_experts": 0}, r"n_shared_experts must be at least 1, or null .* got 0"),
}
# what transformers' own classes would take, and fail or hang with later
REFUSED |= {
    "10^9 layers": ({"num_hidden_layers": 10**9}, r"num_hidden_layers must be at most 500, got 1000000000; correct"),
    "10^9 experts": ({"n_routed_experts": 10**9}, r"n_routed_experts must be at most 100,000, or null .* 1000000000"),
    "too many experts in all": (
        {"n_routed_experts": 10**4, "num_hidden_layers": 400},
        r"num_hidden_layers times n_routed_experts must be at most 100,000, got 4,000,000; correct one",
    ),
    "a width of 2^63": ({"kv_lora_rank": 2**63}, r"kv_lora_rank must be at most 1,000,000, got 9223372036854775808"),
    "a vocabulary of 10^30": (
        {"vocab_size": 10**30},
        r"vocab_size must be at most 100,000,000, got 10{30}; correct it",
    ),
    "dtype 16": ({"dtype": 16}, r"dtype must be a floating-point type of torch, such as 'bfloat16', got 16"),
    "dtype of a layer": ({"dtype": "nn"}, r"dtype must be a floating-point type of torch, .* got 'nn'"),
    "torch_dtype": ({"torch_dtype": "int64"}, r"torch_dtype must be a floating-point type of torch, .* got 'int64'"),
    "attention": ({"attn_implementation": False}, r"attn_implementation must be a name, or null, got False; corr"),
    "experts": ({"experts_implementation": {"": 5}}, r"experts_implementation must be a name, or null, got {'': 5}"),
    "10^9 labels": ({"num_labels": 10**9}, r"num_labels must be at most 1,000,000, got 1000000000"),
    "labels": ({"id2label": {"first": "a"}}, r"id2label must give a label for each number, got {'first': 'a'}"),
    "a method": ({"to_dict": 5}, r"to_dict is a name in the config's class, and no field of config.json; remove it"),
    "a property": ({"cached_width": 5}, r"cached_width is a name in the config's class"),
    "initializer": ({"initializer_range": -0.1}, r"initializer_range must be a number of 0 or more, got -0.1"),
    "pad below": ({"pad_token_id": -2}, r"pad_token_id must be a token, or -1 or null for none, got -2"),
    "eos": ({"eos_token_id": [1, 2**63]}, r"eos_token_id must be a token, got \[1, 9223372036854775808\]"),
    "rope as a list": ({"rope_scaling": [1]}, r"rope_scaling must be a dict or null, got \[1\]"),
    "theta of 1e-300": (
        {"rope_theta": 1e-300},
        r"rope_theta in rope_scaling must be above 1 and below 1e\+12, got 1e-300",
    ),
    "theta of 10^400": ({"rope_theta": 10**400}, r"yarn needs a positive rope_theta in rope_scaling, got 10+\.\.\.0+"),
    "huge mscale": (
        {"rope_scaling": PUBLISHED_YARN | {"mscale": 1e9}},
        r"mscale in rope_scaling must be at most 10,000",
    ),
    "truncate": (
        {"rope_scaling": PUBLISHED_YARN | {"truncate": 1}},
        r"truncate in rope_scaling must be true or false, got 1",
    ),
    "llama3": (
        {
            "rope_scaling": {
                "type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            }
        },
        r"low_freq_factor in rope_scaling must be below high_freq_factor \(4.0\), got 4.0",
    ),
    "longrope of another width": (
        {
            "rope_scaling": {
                "type": "longrope",
                "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0] * 4,
            }
        },
        r"short_factor in rope_scaling must have half as many numbers as qk_rope_head_dim \(64\), got 4",
    ),
    "longrope of text": (
        {
            "rope_scaling": {
                "type": "longrope",
                "original_max_position_embeddings": 64,
                "short_factor": ["1"] * 32,
                "long_factor": [1.0] * 32,
            }
        },
        r"short_factor in rope_scaling must be a list of positive numbers, got \['1', '1'",
    ),
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


WRONG_TYPES = {
    "architectures 7": ({"architectures": 7}, r"architectures must be a list of class names, or null, got 7"),
    "layer_types 64": ({"layer_types": 64}, "layer_types must be a list of names, or null, got 64"),
    "architectures [5]": ({"architectures": [5]}, r"architectures must be a list of class names, or null, got \[5\]"),
    "a wide model": ({"hidden_size": "wide"}, "'hidden_size' expected int, got str .* Correct the type of this field"),
    "100,000 letters": ({"topk_group": "x" * 10**5}, "'topk_group' with value 'x{400,500}[.]{3} Correct the type"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG_TYPES.values(), ids=WRONG_TYPES.keys())
def test_a_wrong_type_in_a_file_is_refused_like_a_wrong_value(wrong, message, write_config):
    folder = write_config(DEEPSEEK_V2 | wrong)
    for auto_class in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=message):
            auto_class.from_pretrained(folder)


def test_greedy_routing_accepts_any_groups():
    config = DeepseekV2Config(**V2 | {"topk_method": "greedy", "n_group": 5, "topk_group": 9})
    assert (config.n_group, config.topk_group) == (5, 9)


def test_a_config_that_became_wrong_is_not_saved(tmp_path):
    config = DeepseekV2Config(**V2)
    config.topk_group = 5
    with pytest.raises(StrictDataclassClassValidationError, match=r"topk_group must lie between 1 and n_group \(4\)"):
        config.save_pretrained(tmp_path)


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
