"""Which fields of config.json other programs refuse or interpret differently.

Found by opening checkpoints with these fields in transformers 5.24, vLLM 0.32, llama.cpp (llama-cpp-python 0.3.36) and
mlx-lm 0.32.2: `python -m benchmarks.clients.run` repeats it, and docs/interop.md has its results. What is said of
SGLang was read in the source of version 0.5.23.
"""

import json
import math
from collections.abc import Callable, Collection

from ..configuration_deepseek_v2 import DeepseekV2Config

# reports programs, a field, and the reason
Report = Callable[[str, str, str], None]

_LLAMA_CPP_LITE_LAYERS = (26, 27)  # the numbers of layers by which llama.cpp recognizes V2-Lite


def find_incompatibilities(config: DeepseekV2Config, config_json: dict, tensor_names: Collection[str]) -> list[str]:
    """One line per field and the programs that do not support it, first those that do not refuse it.

    `config_json` is the content of config.json as it is written, `tensor_names` are the names in the files.
    """
    other_logits, refusals = [], []

    def describe(programs: str, field: str, reason: str) -> str:
        value = config_json.get(field)
        # a dict is not printed, because the reason names its entry
        shown = "" if isinstance(value, dict) else f" {json.dumps(value)}" if field in config_json else " absent"
        return f"{programs}: {field}{shown}, {reason}"

    def differs(programs: str, field: str, reason: str) -> None:
        other_logits.append(f"{describe(programs, field, reason)} (other logits, no error)")

    def refuses(programs: str, field: str, reason: str) -> None:
        refusals.append(f"{describe(programs, field, reason)} (refused)")

    _check_rope(config, config_json, differs, refuses)
    _check_experts(config, config_json, differs, refuses)
    if "auto_map" in config_json:
        refuses("SGLang", "auto_map", "so it asks for trust_remote_code")
    if config.attention_bias:
        differs("vLLM", "attention_bias", "but it leaves out the biases of latent projections")
        refuses("SGLang, llama.cpp", "attention_bias", "but their latent projections have no biases")
    if config.rms_norm_eps != 1e-6:
        differs("vLLM, SGLang, llama.cpp", "rms_norm_eps", "which they also use for the latents' norms, 1e-6 here")
    if config.tie_word_embeddings and "lm_head.weight" not in tensor_names:
        differs("vLLM", "tie_word_embeddings", "but without lm_head.weight in the files all its logits are equal")
        refuses("mlx-lm", "tie_word_embeddings", "but it needs lm_head.weight in the files")
    if config.hidden_act != "silu":
        differs("llama.cpp, mlx-lm", "hidden_act", "which they ignore, expected 'silu'")
        refuses("vLLM, SGLang", "hidden_act", "expected 'silu'")
    if (config.kv_lora_rank, config.qk_rope_head_dim) != (512, 64):
        refuses(
            "vLLM",
            "kv_lora_rank",
            "but it needs 512 with a qk_rope_head_dim of 64 on a CPU, and by its source on a GPU, except in TRITON_MLA",
        )
    if config.q_lora_rank is None and config.num_hidden_layers not in _LLAMA_CPP_LITE_LAYERS:
        refuses("llama.cpp", "q_lora_rank", "which it accepts only for V2-Lite's 27 layers (override the key with 0)")
    return other_logits + refusals


def _check_rope(config: DeepseekV2Config, config_json: dict, differs: Report, refuses: Report) -> None:
    rope, written = config.rope_parameters, config_json.get("rope_scaling")
    rope_type = rope["rope_type"]
    if rope_type not in ("default", "yarn"):
        has_length = "original_max_position_embeddings" in rope and "factor" in rope
        differs("llama.cpp", "rope_scaling", f"of type {rope_type}, which it reads as another one")
        differs("mlx-lm", "rope_scaling", f"of type {rope_type}, which it reads as yarn")
        if has_length:
            differs("vLLM", "rope_scaling", f"of type {rope_type}, which it reads as yarn")
        else:
            refuses("vLLM", "rope_scaling", f"of type {rope_type}, but it reads every type as yarn")
        refuses("SGLang", "rope_scaling", f"of type {rope_type}, expected yarn or none")
    if rope_type == "yarn":
        attention_factor = rope.get("attention_factor")
        if attention_factor is not None:
            differs("vLLM", "rope_scaling", "with an attention_factor, which it reads as another scaling")
        if attention_factor not in (None, _attention_factor_of(rope)):
            differs("llama.cpp, mlx-lm", "rope_scaling", "with an attention_factor, which they ignore")
        if not rope.get("truncate", True):
            differs("vLLM, llama.cpp, mlx-lm", "rope_scaling", "with truncate false, which they ignore")
        if (rope.get("mscale") or 1) != rope.get("mscale_all_dim"):
            differs("llama.cpp", "rope_scaling", "with an mscale that is not mscale_all_dim")
    if not written:
        refuses("mlx-lm", "rope_scaling", "but it opens no file without one")


def _attention_factor_of(rope: dict) -> float:
    """The factor of cos and sin that programs compute from the other fields."""
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (mscale and mscale_all_dim):
        mscale, mscale_all_dim = 1, 0
    log = math.log(rope["factor"])
    return (0.1 * mscale * log + 1) / (0.1 * mscale_all_dim * log + 1)


def _check_experts(config: DeepseekV2Config, config_json: dict, differs: Report, refuses: Report) -> None:
    if config.n_routed_experts is None:
        refuses(
            "transformers, vLLM, llama.cpp", "n_routed_experts", "expected a number, also where all layers are dense"
        )
    elif config.n_routed_experts <= config.n_group:
        refuses("llama.cpp", "n_routed_experts", "expected more than n_group, also where all layers are dense")
    if config.n_shared_experts is None:
        refuses("transformers, vLLM, llama.cpp", "n_shared_experts", "expected a number")
    if not config.moe_layers:
        return
    for field in ("n_group", "topk_group"):
        if config_json.get(field) is None:
            refuses("vLLM, SGLang", field, "expected 1 for one group")
    for field in ("scoring_func", "moe_layer_freq"):
        if field not in config_json:
            refuses("SGLang", field, "but it has no default for it")
    if config.normalizes_gates:
        differs("transformers, mlx-lm", "norm_topk_prob", "which they ignore")
        if config.routed_scaling_factor != 1:
            differs("vLLM, llama.cpp", "norm_topk_prob", "but they also apply routed_scaling_factor")
    elif config.norm_topk_prob:
        differs("vLLM, llama.cpp", "norm_topk_prob", "which they apply to a single expert too")
    if config.n_group > 1 and config.topk_method == "group_limited_greedy":
        differs("llama.cpp", "topk_method", "but it ranks a group by its two best experts, as DeepSeek-V3 does")
    if config.n_group > 1 and config.topk_method == "greedy":
        differs("vLLM, SGLang, llama.cpp", "n_group", "but they route by groups for any topk_method")
    if config.moe_layer_freq != 1:
        differs("transformers", "moe_layer_freq", "which it ignores: it makes random experts in dense layers")
        refuses("llama.cpp", "moe_layer_freq", "expected 1")
