"""Checks that the fields of a config agree with each other and with the architecture of DeepSeek-V2."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .rope_parameters import validate_rope

logger = logging.get_logger(__name__)


# the largest numbers that are accepted, far above those of any model: with them, the sizes of a model can still be
# counted, and compared with what files hold, in a second
MAX_LAYERS, MAX_EXPERTS_IN_ALL_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_LENGTH = 500, 10**5, 10**6, 10**8, 10**9
MAX_LABELS = MAX_FACTOR = 10**6
WIDTHS = (
    "hidden_size num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim intermediate_size "
    "moe_intermediate_size"
)
SIZES = dict.fromkeys(WIDTHS.split(), MAX_WIDTH) | {
    "vocab_size": MAX_VOCABULARY,
    "num_hidden_layers": MAX_LAYERS,
    "moe_layer_freq": MAX_LENGTH,
    "max_position_embeddings": MAX_LENGTH,
}
OPTIONAL_SIZES = {
    "q_lora_rank": MAX_WIDTH,
    "source_cached_width": MAX_WIDTH,
    "n_routed_experts": MAX_EXPERTS_IN_ALL_LAYERS,
    "n_shared_experts": 1_000,
}


def check_size(name: str, value: Any, most: int, otherwise: str = "") -> None:
    """Raises ValueError unless `value` is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number{otherwise}, got {reprlib.repr(value)}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1{otherwise}, got {value}.")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}{otherwise}, got {reprlib.repr(value)}; correct it.")


def check_general_fields(given: Mapping[str, Any]) -> None:
    """Raises ValueError for a field of any model's config.json that transformers would take without a look at it."""
    for name in ("dtype", "torch_dtype"):
        dtype = given.get(name)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
            dtype = dtype if isinstance(dtype, torch.dtype) else given[name]
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"{name} must be a floating-point type of torch, such as 'bfloat16', got {reprlib.repr(given[name])}."
            )
    for name in ("attn_implementation", "experts_implementation"):
        chosen = given.get(name)
        # a dict has one for each part of a composite model
        if not all(
            isinstance(each, str | None) for each in (chosen.values() if isinstance(chosen, dict) else [chosen])
        ):
            raise ValueError(f"{name} must be a name, or null, got {reprlib.repr(chosen)}; correct it or leave it out.")
    architectures = given.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ValueError(
            f"architectures must be a list of class names, or null, got {reprlib.repr(architectures)}; "
            "correct it or leave it out."
        )
    layer_types = given.get("layer_types")
    if not (layer_types is None or (isinstance(layer_types, list) and all(isinstance(x, str) for x in layer_types))):
        raise ValueError(f"layer_types must be a list of names, or null, got {reprlib.repr(layer_types)}; remove it.")
    if given.get("per_layer_config") is not None:
        raise ValueError(
            f"per_layer_config must be left out, got {reprlib.repr(given['per_layer_config'])}: all layers of this "
            "architecture are alike; remove it."
        )
    if not isinstance(given.get("auto_map"), dict | None):
        raise ValueError(f"auto_map must be an object, got {reprlib.repr(given['auto_map'])}; correct it or remove it.")
    quantization = given.get("quantization_config")
    # transformers itself puts its own object there
    if not (quantization is None or isinstance(quantization, dict) or hasattr(quantization, "to_dict")):
        raise ValueError(f"quantization_config must be an object, got {reprlib.repr(quantization)}; remove it.")
    if given.get("num_labels") is not None:
        check_size("num_labels", given["num_labels"], MAX_LABELS)
    labels = given.get("id2label")
    if labels is not None and not (
        isinstance(labels, dict) and all(isinstance(label, int) or label.isdecimal() for label in labels)
    ):
        raise ValueError(f"id2label must give a label for each number, got {reprlib.repr(labels)}; correct it.")


def check_fields(config: PreTrainedConfig) -> None:
    """Raises ValueError that names the wrong field, what was expected, what it got and what to do."""
    if config.kv_lora_rank is None:
        raise ValueError(
            "kv_lora_rank must be the width of the KV latent, got null: this checkpoint has no latent attention; "
            "load it with its own code."
        )
    for name, most in SIZES.items():
        check_size(name, getattr(config, name), most)
    for name, most in OPTIONAL_SIZES.items():
        if getattr(config, name) is not None:
            check_size(name, getattr(config, name), most, ", or null to leave it out")
    num_experts = config.num_hidden_layers * (config.n_routed_experts or 0)
    if num_experts > MAX_EXPERTS_IN_ALL_LAYERS:
        raise ValueError(
            f"num_hidden_layers times n_routed_experts must be at most {MAX_EXPERTS_IN_ALL_LAYERS:,}, got "
            f"{num_experts:,}; correct one."
        )
    if config.qk_rope_head_dim % 2:
        raise ValueError(
            f"qk_rope_head_dim must be even, since RoPE rotates pairs, got {config.qk_rope_head_dim}; "
            f"use {config.qk_rope_head_dim + 1} or {config.qk_rope_head_dim - 1}."
        )
    if config.num_unquantized_channels % 2 or not 0 <= config.num_unquantized_channels < config.kv_lora_rank:
        raise ValueError(
            f"num_unquantized_channels must be even, 0 or more and below kv_lora_rank ({config.kv_lora_rank}), got "
            f"{reprlib.repr(config.num_unquantized_channels)}; leave it out, unless a conversion wrote it."
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
            f"hidden_act must be an activation of transformers, got {reprlib.repr(config.hidden_act)}; DeepSeek-V2 "
            "uses 'silu'."
        )
    for name in ("attention_dropout", "classifier_dropout", "no_drop_fraction"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be a probability between 0 and 1, got {getattr(config, name)}.")
    for name in ("initializer_range", "aux_loss_alpha", "device_aux_loss_alpha", "communication_aux_loss_alpha"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be a number of 0 or more, got {getattr(config, name)}.")
        if getattr(config, name) > MAX_FACTOR:
            raise ValueError(f"{name} must be at most {MAX_FACTOR:,}, got {reprlib.repr(getattr(config, name))}.")
    for name in ("rms_norm_eps", "routed_scaling_factor"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be a positive number, got {getattr(config, name)}.")
        if getattr(config, name) > MAX_FACTOR:
            raise ValueError(f"{name} must be at most {MAX_FACTOR:,}, got {reprlib.repr(getattr(config, name))}.")
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise ValueError(f"pad_token_id must be below vocab_size ({config.vocab_size}), got {config.pad_token_id}.")
    if config.pad_token_id is not None and config.pad_token_id < -1:
        raise ValueError(f"pad_token_id must be a token, or -1 or null for none, got {config.pad_token_id}.")
    for name in ("bos_token_id", "eos_token_id"):
        ids = getattr(config, name)
        if any(abs(id) > MAX_VOCABULARY for id in (ids if isinstance(ids, list) else [ids or 0])):
            raise ValueError(f"{name} must be a token, got {reprlib.repr(ids)}; correct it.")
    if config.scoring_func != "softmax":
        raise ValueError(
            f"scoring_func must be 'softmax', got {reprlib.repr(config.scoring_func)}; other scores belong to "
            "DeepSeek-V3."
        )
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise ValueError(
            f"topk_method must be 'greedy' or 'group_limited_greedy', got {reprlib.repr(config.topk_method)}; "
            "'noaux_tc' belongs to DeepSeek-V3."
        )
    validate_rope(config.rope_parameters, config.qk_rope_head_dim)
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
            f"model_type must be 'deepseek_v2', got {reprlib.repr(given['model_type'])}, another architecture; "
            "load it with transformers' own class."
        )
    if given.get("use_mla", True) is False:
        raise ValueError(
            "use_mla must be true, got false: this checkpoint has plain attention (DeepSeek-VL2-Tiny, DeepSeek-OCR), "
            "not latent attention; load it with DeepSeek's own code."
        )
    if given.get("mlp_bias"):
        raise ValueError("mlp_bias must be false, got true: no MLP of DeepSeek-V2 has a bias.")
