"""What a configuration amounts to: its parameters by part, those a token uses, and what a token leaves in the cache.

Letters: h heads, n/r/v content, rotary and value width per head, c KV latent width, d model width, e experts,
f expert width, k experts per token.
"""

import math
from typing import NamedTuple

from ..configuration_deepseek_v2 import DeepseekV2Config

# Table 3 of arXiv:2202.01169 for S-BASE routing, the best of its three: a, b, c and the bounds of E
_ROUTED_LAW = {"a": -0.082, "b": -0.108, "c": 0.009, "start": 1.847, "max": 314.478}

# the first substring found in a tensor's name says which part it is
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
GQA_GROUPS = 8  # n_g of the paper's comparison


def parameters_by_part(tensors: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Parameters of each part that occurs, from `checkpoint_tensors`; their sum is the total."""
    counts = dict.fromkeys(_PARTS.values(), 0)
    for name, shape in tensors.items():
        part = next(part for piece, part in _PARTS.items() if piece in name)
        counts[part] += math.prod(shape)
    return {part: count for part, count in counts.items() if count}


def idle_parameters(config: DeepseekV2Config) -> int:
    """Parameters of the (e - k) experts per MoE layer that a token does not visit; total minus idle is active."""
    if config.n_routed_experts is None:
        return 0
    num_moe_layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    unvisited = config.n_routed_experts - config.num_experts_per_tok
    return num_moe_layers * unvisited * 3 * config.hidden_size * config.moe_intermediate_size


def expanded_width(config: DeepseekV2Config) -> int:
    """h (n + r + v): elements per token and layer if keys and values were cached instead of what they come from."""
    return config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)


def cached_elements_per_token(config: DeepseekV2Config) -> dict[str, int]:
    """Elements one token holds over all layers, here and under the attentions the paper compares with.

    The paper writes d_h for the width of a key and of a value; where they differ, theirs are n and v.
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.1.4, Table 1.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    pair = config.qk_nope_head_dim + config.v_head_dim
    elements = {
        "MLA, compressed (this package)": config.cached_width * layers,
        "MLA, expanded to keys and values": expanded_width(config) * layers,
        "MHA": heads * pair * layers,
    }
    if heads % GQA_GROUPS == 0:
        elements[f"GQA, {GQA_GROUPS} groups"] = GQA_GROUPS * pair * layers
    return elements | {"MQA": pair * layers}


class RoutedSize(NamedTuple):
    """A model with experts on the scale of dense ones.

    base       N, parameters that a token uses, without embeddings and lm_head
    expansion  E, experts as wide as all that a token visits: e / k where they are fine-grained
    effective  parameters, without embeddings, of the dense model that the law expects to be as good
    """

    base: int
    expansion: float
    effective: float


def routed_size(config: DeepseekV2Config, tensors: dict[str, tuple[int, ...]]) -> RoutedSize:
    """N, E and the effective parameter count of a model with experts; `tensors` as of `checkpoint_tensors`.

    log L = a log N + b log E' + c log N log E' + d with 1/E' = 1/(E - 1 + 1/(1/start - 1/max)) + 1/max, in decimal
    logarithms; a dense model is E = 1. Fitted on models of up to 200 B parameters, 512 experts and 130 B tokens, one
    expert per token; fine-grained and shared experts are not in it.
    Source: Unified Scaling Laws for Routed Language Models (arXiv:2202.01169), eqs. 1 and 11, Table 3.
    """
    parts = parameters_by_part(tensors)
    outside = sum(parts.get(part, 0) for part in ("embeddings", "lm_head", "classifier"))
    base = sum(parts.values()) - idle_parameters(config) - outside
    expansion = config.n_routed_experts / config.num_experts_per_tok if config.n_routed_experts else 1.0
    a, b, c, start, most = _ROUTED_LAW.values()
    saturated = 1 / (1 / (expansion - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
    n, e, one = (math.log10(x) for x in (base, saturated, start))
    return RoutedSize(base, expansion, 10 ** (((a + c * e) * n + b * (e - one)) / (a + c * one)))
