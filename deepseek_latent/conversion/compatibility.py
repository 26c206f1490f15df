"""Which fields of config.json other programs refuse or interpret differently.

Found by reading vLLM 0.33, SGLang 0.5.23, llama.cpp 0c1e57098, mlx-lm d78bf58 and transformers 5.23, and corrected
by reported runs of vLLM 0.32, mlx-lm, llama.cpp and transformers on files with these fields. A field that a program
ignores or reads as something else gives other logits without an error.
"""

import json
from collections.abc import Collection

from ..configuration_deepseek_v2 import DeepseekV2Config

_LLAMA_CPP_LITE_LAYERS = (26, 27)  # the numbers of layers by which llama.cpp recognizes V2-Lite

# the types of RoPE for which a program computes other logits instead of refusing
_WITHOUT_REFUSAL = {"linear": " (vLLM does not refuse it)", "longrope": " (mlx-lm does not refuse it)"}


def find_incompatibilities(config: DeepseekV2Config, config_json: dict, tensor_names: Collection[str]) -> list[str]:
    """One line per field and the programs that do not support it.

    `config_json` is the content of config.json as it is written, `tensor_names` are the names in the files.
    """
    has_experts = bool(config.moe_layers)
    rope = config.rope_parameters
    incompatibilities = []

    def report(programs: str, field: str, reason: str) -> None:
        value = config_json.get(field)
        # a dict is not printed, because the reason names its entry
        shown = "" if isinstance(value, dict) else f" {json.dumps(value)}" if field in config_json else " absent"
        incompatibilities.append(f"{programs}: {field}{shown}, {reason}")

    if "auto_map" in config_json:
        report("SGLang", "auto_map", "so it asks for trust_remote_code")
    if config.attention_bias:
        report("vLLM, SGLang", "attention_bias", "but their latent projections have no biases")
        report("llama.cpp", "attention_bias", "which it does not load")
    if rope["rope_type"] not in ("default", "yarn"):
        report(
            "vLLM, SGLang, llama.cpp, mlx-lm",
            "rope_scaling",
            f"of type {rope['rope_type']}, but they support only default and yarn for this architecture"
            + _WITHOUT_REFUSAL.get(rope["rope_type"], ""),
        )
    if rope["rope_type"] == "yarn" and rope.get("attention_factor") is not None:
        report("vLLM", "rope_scaling", "with an attention_factor, which it reads as another scaling")
        report("mlx-lm", "rope_scaling", "with an attention_factor, which it ignores")
    if rope["rope_type"] == "yarn" and not rope.get("truncate", True):
        report("mlx-lm", "rope_scaling", "with truncate false, which it ignores")
    if rope["rope_type"] == "default":
        report("mlx-lm", "rope_scaling", "but it opens no file without one")
    if rope["rope_type"] != "default" and not config_json.get("rope_scaling"):
        report("mlx-lm", "rope_scaling", "but it does not read rope_parameters")
    for field in ("n_group", "topk_group"):
        if has_experts and config_json.get(field) is None:
            report("vLLM, SGLang", field, "expected 1 for one group")
    for field in ("scoring_func", "moe_layer_freq"):
        if has_experts and field not in config_json:
            report("SGLang", field, "but it has no default for it")
    if config.n_routed_experts is None:
        report("vLLM", "n_routed_experts", "but it needs a number, also where all layers are dense")
    if has_experts and config.norm_topk_prob:
        report("transformers", "norm_topk_prob", "which its class ignores")
        report("mlx-lm", "norm_topk_prob", "which it ignores")
        if config.n_group > 1:
            report("vLLM", "norm_topk_prob", "but with groups of experts it computes other gate weights")
    if has_experts and config.n_shared_experts is None:
        report("transformers, vLLM, llama.cpp", "n_shared_experts", "but they always have shared experts")
    if has_experts and config.topk_method == "group_limited_greedy" and config.n_group > 1:
        report("llama.cpp", "topk_method", "but it ranks a group by its two best experts, as DeepSeek-V3 does")
    if has_experts and config.topk_method == "greedy" and config.n_group > 1:
        report("vLLM, SGLang, llama.cpp", "n_group", "but they route by groups for any topk_method")
    if config.rms_norm_eps != 1e-6:
        report("vLLM, SGLang, llama.cpp", "rms_norm_eps", "which they also use for the latents' norms, 1e-6 here")
    if config.tie_word_embeddings and "lm_head.weight" not in tensor_names:
        report("vLLM, mlx-lm", "tie_word_embeddings", "but they need lm_head.weight in the files")
    if config.hidden_act != "silu":
        report("vLLM, SGLang, llama.cpp", "hidden_act", "expected 'silu'")
        report("mlx-lm", "hidden_act", "which it ignores, expected 'silu'")
    if config.q_lora_rank is None and config.num_hidden_layers not in _LLAMA_CPP_LITE_LAYERS:
        report("llama.cpp", "q_lora_rank", "which it accepts only for V2-Lite's 27 layers (override the key with 0)")
    if (config.kv_lora_rank, config.qk_rope_head_dim) != (512, 64):
        report("vLLM", "kv_lora_rank", "but its kernels except TRITON_MLA need 512 with a qk_rope_head_dim of 64")
    return incompatibilities
