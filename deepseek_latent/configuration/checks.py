"""Checks that the fields of a config agree with each other and with the architecture of DeepSeek-V2."""

import math
from typing import Any

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .rope_parameters import validate_rope

logger = logging.get_logger(__name__)


def check_fields(config: PreTrainedConfig) -> None:
    """Raises ValueError that names the wrong field, what was expected, what it got and what to do."""
    if config.kv_lora_rank is None:
        raise ValueError(
            "kv_lora_rank must be the width of the KV latent, got null: this checkpoint has no latent attention; "
            "load it with its own code."
        )
    sizes = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads kv_lora_rank qk_nope_head_dim "
        "qk_rope_head_dim v_head_dim intermediate_size moe_intermediate_size moe_layer_freq max_position_embeddings"
    )
    for name in sizes.split():
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")
    for name in ("q_lora_rank", "n_routed_experts", "n_shared_experts"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, or null to leave it out, got {getattr(config, name)}.")
    if config.qk_rope_head_dim % 2:
        raise ValueError(
            f"qk_rope_head_dim must be even, since RoPE rotates pairs, got {config.qk_rope_head_dim}; "
            f"use {config.qk_rope_head_dim + 1} or {config.qk_rope_head_dim - 1}."
        )
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads must equal num_attention_heads ({config.num_attention_heads}), since MLA expands "
            f"one latent for every head, got {config.num_key_value_heads}; give both the same number."
        )
    if config.first_k_dense_replace < 0:
        raise ValueError(f"first_k_dense_replace must be 0 or more, got {config.first_k_dense_replace}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(
            f"hidden_act must be an activation of transformers, got {config.hidden_act!r}; DeepSeek-V2 uses 'silu'."
        )
    for name in ("attention_dropout", "classifier_dropout", "no_drop_fraction"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be a probability between 0 and 1, got {getattr(config, name)}.")
    for name in ("aux_loss_alpha", "device_aux_loss_alpha", "communication_aux_loss_alpha"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be a number of 0 or more, got {getattr(config, name)}.")
    for name in ("rms_norm_eps", "routed_scaling_factor"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be a positive number, got {getattr(config, name)}.")
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise ValueError(f"pad_token_id must be below vocab_size ({config.vocab_size}), got {config.pad_token_id}.")
    if config.scoring_func != "softmax":
        raise ValueError(
            f"scoring_func must be 'softmax', got {config.scoring_func!r}; other scores belong to DeepSeek-V3."
        )
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise ValueError(
            f"topk_method must be 'greedy' or 'group_limited_greedy', got {config.topk_method!r}; "
            "'noaux_tc' belongs to DeepSeek-V3."
        )
    validate_rope(config.rope_parameters)
    if config.n_routed_experts is not None:
        _check_routing(config)


def _check_routing(config: PreTrainedConfig) -> None:
    e, k, num_groups, num_kept = config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group
    if k is None or not 1 <= k <= e:
        raise ValueError(f"num_experts_per_tok must lie between 1 and n_routed_experts ({e}), got {k}.")
    if config.device_capacity_factor is not None and not 0 < config.device_capacity_factor < math.inf:
        raise ValueError(
            f"device_capacity_factor must be a positive number, got {config.device_capacity_factor}; "
            "None drops no token."
        )
    device_options = ("device_aux_loss_alpha", "communication_aux_loss_alpha", "device_capacity_factor")
    used = [name for name in device_options if getattr(config, name)]
    # the device options take n_group as the number of devices, even if the router ignores groups
    if (config.topk_method != "greedy" or used) and (num_groups < 1 or e % num_groups):
        raise ValueError(
            f"n_group must divide n_routed_experts ({e}) into groups of equal size, got {num_groups}; "
            "use a divisor, or topk_method='greedy'."
        )
    if num_groups == 1 and used:
        logger.warning_once(
            f"{' and '.join(used)} balance devices, but n_group is 1, so there is only one device; set n_group to the "
            "number of devices that hold the experts (with topk_method='greedy', the router ignores it)."
        )
    if config.topk_method == "greedy":
        return
    if not 1 <= num_kept <= num_groups:
        raise ValueError(f"topk_group must lie between 1 and n_group ({num_groups}), got {num_kept}.")
    if k > num_kept * (e // num_groups):
        raise ValueError(
            f"num_experts_per_tok ({k}) is above the number of experts in the chosen groups: topk_group ({num_kept}) x "
            f"{e // num_groups} experts per group = {num_kept * (e // num_groups)}; lower it or raise topk_group."
        )


def refuse_other_architectures(given: dict[str, Any]) -> None:
    """Raises ValueError if the fields of a config.json belong to another architecture."""
    if given.get("model_type", "deepseek_v2") not in ("deepseek_v2", "deepseek"):
        raise ValueError(
            f"model_type must be 'deepseek_v2', got {given['model_type']!r}, another architecture; "
            "load it with transformers' own class."
        )
    if given.get("use_mla", True) is False:
        raise ValueError(
            "use_mla must be true, got false: this checkpoint has plain attention (DeepSeek-VL2-Tiny, DeepSeek-OCR), "
            "not latent attention; load it with DeepSeek's own code."
        )
    if given.get("mlp_bias"):
        raise ValueError("mlp_bias must be false, got true: no MLP of DeepSeek-V2 has a bias.")
