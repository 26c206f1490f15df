"""What other programs would refuse or read otherwise in a checkpoint, by the field that is to blame.

As of vLLM 0.33, SGLang 0.5.23, llama.cpp 0c1e57098, mlx-lm d78bf58 and transformers 5.23, by reading them; those of
llama.cpp and transformers were also run.
"""

import json
from collections.abc import Collection

from ..configuration_deepseek_v2 import DeepseekV2Config

_LAYERS_WITHOUT_QUERY_LATENT = (26, 27)  # by which llama.cpp knows V2-Lite


def find_incompatibilities(config: DeepseekV2Config, written: dict, tensors: Collection[str]) -> list[str]:
    """One sentence per client and field; `written` is config.json as it stands, `tensors` the names in the files."""
    has_experts = any(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    rope = config.rope_parameters
    found = []

    def object_(clients: str, field: str, reason: str) -> None:
        value = written.get(field)
        # of a table, the reason says what matters
        said = "" if isinstance(value, dict) else f" {json.dumps(value)}" if field in written else " absent"
        found.append(f"{clients}: {field}{said}, {reason}")

    if "auto_map" in written:
        object_("vLLM, SGLang", "auto_map", "so they would ask for trust_remote_code")
    if config.attention_bias:
        object_("vLLM, SGLang", "attention_bias", "but their latent projections have no biases")
        object_("llama.cpp", "attention_bias", "which it refuses to load")
    if rope["rope_type"] not in ("default", "yarn"):
        object_(
            "vLLM, SGLang, llama.cpp, mlx-lm",
            "rope_scaling",
            f"of type {rope['rope_type']}, but they know default and yarn for this architecture",
        )
    if rope["rope_type"] == "yarn" and rope.get("attention_factor") is not None:
        object_("vLLM", "rope_scaling", "with an attention_factor, which it takes for another scaling")
    if rope["rope_type"] != "default" and not written.get("rope_scaling"):
        object_("mlx-lm", "rope_scaling", "but it reads no rope_parameters")
    for field in ("n_group", "topk_group"):
        if has_experts and written.get(field) is None:
            object_("vLLM, SGLang", field, "expected 1 for one group")
    for field in ("scoring_func", "moe_layer_freq"):
        if has_experts and field not in written:
            object_("SGLang", field, "and it reads it without a default")
    if has_experts and config.norm_topk_prob:
        object_("transformers", "norm_topk_prob", "which its class does not look at")
    if has_experts and config.n_shared_experts is None:
        object_("transformers, llama.cpp", "n_shared_experts", "but they have shared experts always")
    if has_experts and config.topk_method == "group_limited_greedy" and config.n_group > 1:
        object_("llama.cpp", "topk_method", "but it ranks a group by its two best experts, as DeepSeek-V3 does")
    if has_experts and config.topk_method == "greedy" and config.n_group > 1:
        object_("vLLM, SGLang, llama.cpp", "n_group", "and they route by groups whatever topk_method is")
    if config.rms_norm_eps != 1e-6:
        object_("vLLM, SGLang, llama.cpp", "rms_norm_eps", "which they also take for the latents' norms, 1e-6 here")
    if config.tie_word_embeddings and "lm_head.weight" not in tensors:
        object_("vLLM", "tie_word_embeddings", "but it wants lm_head.weight in the files")
    if config.hidden_act != "silu":
        object_("vLLM, SGLang, llama.cpp", "hidden_act", "expected 'silu'")
    if config.q_lora_rank is None and config.num_hidden_layers not in _LAYERS_WITHOUT_QUERY_LATENT:
        object_("llama.cpp", "q_lora_rank", "which it expects of V2-Lite's 27 layers only (override the key with 0)")
    if (config.kv_lora_rank, config.qk_rope_head_dim) != (512, 64):
        object_("vLLM", "kv_lora_rank", "whose kernels but TRITON_MLA want 512 with a qk_rope_head_dim of 64")
    return found
