"""The config of DeepSeek's inference code, which has other names and defaults, and the official one made of it.

Source: github.com/deepseek-ai/DeepSeek-V3, inference/model.py.
"""

import reprlib
from pathlib import Path

from ..configuration.checks import MAX_LENGTH, check_size
from ..configuration_deepseek_v2 import DeepseekV2Config

# config field of DeepSeek's code: config field here
CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
# defaults of DeepSeek's code for fields that its config leaves out
CONFIG_DEFAULTS = {
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "q_lora_rank": 0,
    "rope_theta": 10000.0,
    "rope_factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "original_seq_len": 4096,
    "max_seq_len": 16384,
}


def config_from_deepseek(stored: dict, file: Path, generation_config: dict | None = None) -> DeepseekV2Config:
    missing = [name for name in CONFIG_FIELDS if name not in stored and name not in CONFIG_DEFAULTS]
    if missing:
        raise ValueError(f"expected {missing[0]} in {file}, as DeepSeek's inference code has it; name its config.")
    if stored.get("dtype", "bf16") != "bf16" or stored.get("score_func", "softmax") != "softmax":
        raise ValueError(f"expected dtype bf16 and score_func softmax in {file}, got another; it cannot be imported.")
    given = CONFIG_DEFAULTS | stored
    try:
        return DeepseekV2Config.from_dict(_official_fields(given) | _token_ids(given, generation_config or {}))
    except ValueError as error:
        raise ValueError(f"expected the config of DeepSeek's inference code in {file}, got: {error}") from error


def _official_fields(given: dict) -> dict:
    """The fields of the official config.json, from all fields of DeepSeek's own."""
    for name in ("max_seq_len", "original_seq_len", "n_expert_groups"):
        check_size(name, given[name], MAX_LENGTH)
    for name in ("rope_factor", "mscale", "beta_fast", "beta_slow"):
        if not isinstance(given[name], (int, float)) or not 0 <= given[name] <= MAX_LENGTH:
            raise ValueError(f"{name} must be a number of 0 or more, got {reprlib.repr(given[name])}.")
    fields = {name: given[stored_name] for stored_name, name in CONFIG_FIELDS.items()}
    rope, length = {"rope_type": "default", "rope_theta": given["rope_theta"]}, given["max_seq_len"]
    if length > given["original_seq_len"]:
        rope |= {"rope_type": "yarn", "factor": given["rope_factor"]}
        rope |= {name: given[name] for name in ("beta_fast", "beta_slow")}
        rope |= {"original_max_position_embeddings": given["original_seq_len"]}
        rope |= {"mscale": given["mscale"], "mscale_all_dim": given["mscale"]}
        # DeepSeek's code limits the length to max_seq_len; the model with YaRN supports the extended length
        length = max(length, int(given["rope_factor"] * given["original_seq_len"]))
    return fields | {
        "num_key_value_heads": fields["num_attention_heads"],
        "q_lora_rank": given["q_lora_rank"] or None,
        "topk_method": "group_limited_greedy" if fields["n_group"] > 1 else "greedy",
        "rope_parameters": rope,
        "max_position_embeddings": length,
        "architectures": ["DeepseekV2ForCausalLM"],
        "tie_word_embeddings": False,
    }


def _token_ids(given: dict, generation_config: dict) -> dict:
    """DeepSeek's config has no token ids, and the defaults here are those of the published models."""
    defaults = DeepseekV2Config if given["vocab_size"] == DeepseekV2Config.vocab_size else None
    names = [f"{kind}_token_id" for kind in ("bos", "eos", "pad")]
    return {name: generation_config.get(name, getattr(defaults, name, None)) for name in names}
