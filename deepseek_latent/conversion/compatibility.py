"""What other programs make of a checkpoint, by the fields of its config.json.

Found by opening checkpoints with these fields in transformers 5.24, vLLM 0.32, llama.cpp (llama-cpp-python 0.3.36) and
mlx-lm 0.32.2: `python -m benchmarks.clients.run` repeats it, and docs/interop.md has its results. What is said of
SGLang was read in the source of version 0.5.23.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field

from ..configuration_deepseek_v2 import DeepseekV2Config

PROGRAMS = ("transformers", "vLLM", "SGLang", "llama.cpp", "mlx-lm")
NOT_RUN = "SGLang"
_LLAMA_CPP_LITE_LAYERS = (26, 27)  # the numbers of layers by which llama.cpp recognizes V2-Lite
_VLLM_WITH_TORCH = """--compilation-config '{"custom_ops": ["none"]}'"""


@dataclass
class Outcome:
    """Why a program refuses a checkpoint, and why its logits differ without an error; both lists may be empty."""

    refusals: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        lines = [f"refused: {reason}" for reason in self.refusals]
        lines += [f"other logits without an error: {reason}" for reason in self.differences]
        return lines or ["works: no difference is known"]


class _Findings:
    """What each program makes of one config.json, whose content is `config_json`."""

    def __init__(self, config_json: dict):
        self.outcomes = {program: Outcome() for program in PROGRAMS}
        self.config_json = config_json

    def add_refusal(self, name: str, reason: str, *programs: str) -> None:
        """Records why these programs refuse the file, because of the field `name`."""
        for program in programs:
            self.outcomes[program].refusals.append(self._describe(name, reason))

    def add_difference(self, name: str, reason: str, *programs: str) -> None:
        """Records why the logits of these programs differ, because of the field `name`."""
        for program in programs:
            self.outcomes[program].differences.append(self._describe(name, reason))

    def _describe(self, name: str, reason: str) -> str:
        if name not in self.config_json:
            return f"{name} absent, {reason}"
        value = self.config_json[name]
        # a dict is not printed, because the reason names its entry
        if isinstance(value, dict):
            return f"{name}, {reason}"
        return f"{name} {f'{value:g}' if isinstance(value, float) else json.dumps(value)}, {reason}"


def outcomes_in_other_programs(
    config: DeepseekV2Config, config_json: dict, tensor_names: Collection[str]
) -> dict[str, Outcome]:
    """What each of `PROGRAMS` makes of a checkpoint.

    `config_json` is the content of config.json as it is written, `tensor_names` are the names in the files.
    """
    found = _Findings(config_json)
    _check_rope(config, found)
    _check_experts(config, found)
    if "auto_map" in config_json:
        found.add_refusal("auto_map", "so it asks for trust_remote_code", "SGLang")
    if config.attention_bias:
        found.add_difference("attention_bias", "but it leaves out the biases of latent projections", "vLLM")
        found.add_refusal("attention_bias", "but its latent projections have no biases", "SGLang", "llama.cpp")
    # a file may hold it rounded to float32
    if not math.isclose(config.rms_norm_eps, 1e-6, rel_tol=1e-6):
        found.add_difference(
            "rms_norm_eps", "which it also uses for the latents' norms, 1e-6 here", "vLLM", "SGLang", "llama.cpp"
        )
    if config.tie_word_embeddings and "lm_head.weight" not in tensor_names:
        found.add_difference(
            "tie_word_embeddings", "but without lm_head.weight in the files all its logits are equal", "vLLM"
        )
        found.add_refusal("tie_word_embeddings", "but it needs lm_head.weight in the files", "mlx-lm")
    if config.hidden_act != "silu":
        found.add_difference("hidden_act", "which it ignores, expected 'silu'", "llama.cpp", "mlx-lm")
        found.add_refusal("hidden_act", "expected 'silu'", "vLLM", "SGLang")
    if (config.kv_lora_rank, config.qk_rope_head_dim) != (512, 64):
        found.add_refusal(
            "kv_lora_rank",
            "expected 512 with a qk_rope_head_dim of 64 on a CPU; on a GPU, its TRITON_MLA takes others, by its source",
            "vLLM",
        )
    if config.q_lora_rank is None and config.num_hidden_layers not in _LLAMA_CPP_LITE_LAYERS:
        found.add_refusal(
            "q_lora_rank", "which it accepts only for V2-Lite's 27 layers (override the key with 0)", "llama.cpp"
        )
    return found.outcomes


def _check_rope(config: DeepseekV2Config, found: _Findings) -> None:
    rope = config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type == "default":
        # a fault of its operator for CPUs
        found.add_difference("rope_scaling", f"on a CPU, unless vLLM is run with {_VLLM_WITH_TORCH}", "vLLM")
    if rope_type not in ("default", "yarn"):
        has_length = "original_max_position_embeddings" in rope and "factor" in rope
        found.add_difference("rope_scaling", f"of type {rope_type}, which it reads as another one", "llama.cpp")
        found.add_difference("rope_scaling", f"of type {rope_type}, which it reads as yarn", "mlx-lm")
        if has_length:
            found.add_difference("rope_scaling", f"of type {rope_type}, which it reads as yarn", "vLLM")
        else:
            found.add_refusal("rope_scaling", f"of type {rope_type}, but it reads every type as yarn", "vLLM")
        found.add_refusal("rope_scaling", f"of type {rope_type}, expected yarn or none", "SGLang")
    if rope_type == "yarn":
        attention_factor = rope.get("attention_factor")
        if attention_factor is not None:
            found.add_difference("rope_scaling", "with an attention_factor, which it reads as another scaling", "vLLM")
        if attention_factor not in (None, _attention_factor_of(rope)):
            found.add_difference("rope_scaling", "with an attention_factor, which it ignores", "llama.cpp", "mlx-lm")
        if not rope.get("truncate", True):
            found.add_difference("rope_scaling", "with truncate false, which it ignores", "vLLM", "llama.cpp", "mlx-lm")
        if (rope.get("mscale") or 1) != rope.get("mscale_all_dim"):
            found.add_difference("rope_scaling", "with an mscale that is not mscale_all_dim", "llama.cpp")
    if not found.config_json.get("rope_scaling"):
        found.add_refusal("rope_scaling", "but it opens no file without one", "mlx-lm")


def _attention_factor_of(rope: dict) -> float:
    """The factor of cos and sin that programs compute from the other fields."""
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (mscale and mscale_all_dim):
        mscale, mscale_all_dim = 1, 0
    log = math.log(rope["factor"])
    return (0.1 * mscale * log + 1) / (0.1 * mscale_all_dim * log + 1)


def _check_experts(config: DeepseekV2Config, found: _Findings) -> None:
    if config.n_routed_experts is None:
        found.add_refusal(
            "n_routed_experts", "expected a number, even if all layers are dense", "transformers", "vLLM", "llama.cpp"
        )
    elif config.n_routed_experts <= config.n_group:
        found.add_refusal("n_routed_experts", "expected more than n_group, even if all layers are dense", "llama.cpp")
    if config.n_shared_experts is None:
        found.add_refusal("n_shared_experts", "expected a number", "transformers", "vLLM", "llama.cpp")
    if not config.moe_layers:
        return
    for name in ("n_group", "topk_group"):
        if found.config_json.get(name) is None:
            found.add_refusal(name, "expected 1 for one group", "vLLM", "SGLang")
    for name in ("scoring_func", "moe_layer_freq"):
        if name not in found.config_json:
            found.add_refusal(name, "but it has no default for it", "SGLang")
    if config.normalizes_gates:
        found.add_difference("norm_topk_prob", "which it ignores", "transformers", "mlx-lm")
        if config.routed_scaling_factor != 1:
            found.add_difference("norm_topk_prob", "but it also applies routed_scaling_factor", "vLLM", "llama.cpp")
    elif config.norm_topk_prob:
        found.add_difference("norm_topk_prob", "which it applies to a single expert too", "vLLM", "llama.cpp")
    if config.n_group > 1 and config.topk_method == "group_limited_greedy":
        found.add_difference(
            "topk_method", "but it ranks a group by its two best experts, as DeepSeek-V3 does", "llama.cpp"
        )
    if config.n_group > 1 and config.topk_method == "greedy":
        found.add_difference("n_group", "but it routes by groups for any topk_method", "vLLM", "SGLang", "llama.cpp")
    if config.moe_layer_freq != 1:
        found.add_difference(
            "moe_layer_freq", "which it ignores: it makes random experts in dense layers", "transformers"
        )
        found.add_refusal("moe_layer_freq", "expected 1", "llama.cpp")
