"""The sizes of a model, from its config: parameters by part, active parameters, and cache elements per token.

Letters: h heads, n/r/v content, rotary and value width per head, c KV latent width, d model width, e experts,
f expert width, k experts per token.
"""

import math
from typing import NamedTuple

from ..configuration_deepseek_v2 import DeepseekV2Config

# Table 3 of arXiv:2202.01169 for S-BASE routing, the best of three kinds: a, b, c and the bounds of E
_SCALING_LAW = {"a": -0.082, "b": -0.108, "c": 0.009, "start": 1.847, "max": 314.478}

# the first of these substrings in a tensor's name determines its part
_PARTS = {
    "embed_tokens": "embeddings",
    "norm.": "norms",
    "self_attn": "attention",
    "mlp.gate.weight": "router",
    "mlp.experts": "routed experts",
    "mlp.shared_experts": "shared experts",
    "mlp": "dense MLP",
    "lm_head": "lm_head",
    "score": "classifier",
}
NUM_GQA_GROUPS = 8  # n_g in the paper's comparison
EXPANDED = "MLA, expanded to keys and values"


def parameters_by_part(tensors: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The number of parameters of each part, from the shapes of `checkpoint_tensors`. Empty parts are left out."""
    counts = dict.fromkeys(_PARTS.values(), 0)
    for name, shape in tensors.items():
        part = next(part for substring, part in _PARTS.items() if substring in name)
        counts[part] += math.prod(shape)
    return {part: count for part, count in counts.items() if count}


def idle_parameters(config: DeepseekV2Config) -> int:
    """Parameters of the (e - k) experts per MoE layer that a token does not use. Total minus idle is active."""
    if config.n_routed_experts is None:
        return 0
    num_unused = config.n_routed_experts - config.num_experts_per_tok
    return len(config.moe_layers) * num_unused * 3 * config.hidden_size * config.moe_intermediate_size


def expanded_width(config: DeepseekV2Config) -> int:
    """h (n + r + v): elements per token and layer if keys and values were cached instead of the latent."""
    return config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)


def cached_elements_per_token(config: DeepseekV2Config) -> dict[str, int]:
    """Cache elements per token over all layers, of this package and of the kinds of attention in the paper's Table 1.

    The paper has one width d_h for keys and values. Here these widths are n and v. A converted model has its source
    instead of GQA with 8 groups, and the width of the source's heads, v, since its n is chosen for the latent.
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.1.4, Table 1.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    is_converted = config.source_cached_width is not None
    pair = (config.v_head_dim if is_converted else config.qk_nope_head_dim) + config.v_head_dim
    elements = {
        "MLA, compressed (this package)": config.cached_width * layers,
        EXPANDED: expanded_width(config) * layers,
        "MHA": heads * pair * layers,
    }
    if is_converted:
        elements["source, before the conversion"] = config.source_cached_width * layers
    elif heads % NUM_GQA_GROUPS == 0:
        elements[f"GQA, {NUM_GQA_GROUPS} groups"] = NUM_GQA_GROUPS * pair * layers
    return elements | {"MQA": pair * layers}


class RoutedSize(NamedTuple):
    """The size of a model with experts, compared with dense models.

    base       N, active parameters without embeddings and lm_head
    expansion  E, the number of experts if all k experts of a token count as one: e / k
    effective  parameters, without embeddings, of the dense model with the same predicted loss
    """

    base: int
    expansion: float
    effective: float


def routed_size(config: DeepseekV2Config, tensors: dict[str, tuple[int, ...]]) -> RoutedSize:
    """N, E and the effective number of parameters of a model; `tensors` are those of `checkpoint_tensors`.

    log L = a log N + b log E' + c log N log E' + d with 1/E' = 1/(E - 1 + 1/(1/start - 1/max)) + 1/max, in decimal
    logarithms. A dense model has E = 1. The law was fitted on models of up to 200 B parameters, 512 experts and 130 B
    tokens with one expert per token. It does not know fine-grained or shared experts.
    Source: Unified Scaling Laws for Routed Language Models (arXiv:2202.01169), eqs. 1 and 11, Table 3.
    """
    parts = parameters_by_part(tensors)
    outside = sum(parts.get(part, 0) for part in ("embeddings", "lm_head", "classifier"))
    base = sum(parts.values()) - idle_parameters(config) - outside
    expansion = config.n_routed_experts / config.num_experts_per_tok if config.n_routed_experts else 1.0
    a, b, c, start, most = _SCALING_LAW.values()
    saturated = 1 / (1 / (expansion - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
    n, e, one = (math.log10(x) for x in (base, saturated, start))
    return RoutedSize(base, expansion, 10 ** (((a + c * e) * n + b * (e - one)) / (a + c * one)))
