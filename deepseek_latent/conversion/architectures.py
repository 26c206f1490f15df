"""Which architectures can be converted: how each differs from Llama, and why others cannot be.

Letters: w width of a head.
"""

import math
import reprlib
from typing import NamedTuple

from transformers import PreTrainedConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# a projection of some architectures, and those of Llama whose rows it holds one after the other
FUSED = {"qkv_proj": PROJECTIONS[:3], "gate_up_proj": ("gate_proj", "up_proj")}
OLMO_EPS = 1e-5  # a constant of its class


class Architecture(NamedTuple):
    """How a model differs from a Llama of the same sizes. Weights can absorb all of these differences exactly.

    `rotary_width` is the number of elements of a head that RoPE rotates, the first ones. Without `interleaves_pairs`,
    it rotates i with i + rotary_width / 2, otherwise 2i with 2i + 1. `score_scale` is relative to 1 / sqrt(w).
    """

    rotary_width: int
    norm_eps: float
    biases: tuple[str, ...] = ()  # the projections of attention that have one
    fused: tuple[str, ...] = ()  # keys of FUSED
    interleaves_pairs: bool = False
    layers_without_rope: frozenset[int] = frozenset()
    centers_norms: bool = False  # norms subtract the mean, and have no weight
    norm_offset: float = 0.0  # added to the weight of every norm
    score_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLPs add to the residual stream
    logits_scale: float = 1.0


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a config whose model type is supported."""
    width = head_width(config)
    rotary_width = int(width * config.rope_parameters.get("partial_rotary_factor", 1))
    norm_eps = OLMO_EPS if config.model_type == "olmo" else config.rms_norm_eps
    llama = Architecture(rotary_width, norm_eps, PROJECTIONS if getattr(config, "attention_bias", False) else ())
    return _DIFFERENCES[config.model_type](config, llama)


def _gemma(config: PreTrainedConfig, llama: Architecture) -> Architecture:
    return llama._replace(norm_offset=1.0, embedding_scale=math.sqrt(config.hidden_size))


def _glm(config: PreTrainedConfig, llama: Architecture) -> Architecture:
    return _helium(config, llama)._replace(fused=("gate_up_proj",))


def _granite(config: PreTrainedConfig, llama: Architecture) -> Architecture:
    return llama._replace(
        score_scale=config.attention_multiplier * math.sqrt(head_width(config)),
        embedding_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        logits_scale=1 / config.logits_scaling,
    )


def _helium(config: PreTrainedConfig, llama: Architecture) -> Architecture:
    # o_proj has no bias
    return llama._replace(interleaves_pairs=True, biases=llama.biases[:3])


def _seed_oss(config: PreTrainedConfig, llama: Architecture) -> Architecture:
    return llama._replace(biases=llama.biases[:3] + (("o_proj",) if config.attention_out_bias else ()))


def _smollm3(config: PreTrainedConfig, llama: Architecture) -> Architecture:
    # a 0 in no_rope_layers stands for a layer without RoPE
    without_rope = (i for i in range(config.num_hidden_layers) if not config.no_rope_layers[i])
    return llama._replace(layers_without_rope=frozenset(without_rope))


_DIFFERENCES = {
    "llama": lambda config, llama: llama,
    "mistral": lambda config, llama: llama,
    "ministral": lambda config, llama: llama,
    "qwen2": lambda config, llama: llama._replace(biases=PROJECTIONS[:3]),
    "phi3": lambda config, llama: llama._replace(fused=("qkv_proj", "gate_up_proj")),
    "granite": _granite,
    "gemma": _gemma,
    "smollm3": _smollm3,
    "olmo": lambda config, llama: llama._replace(centers_norms=True),
    "glm": _glm,
    "helium": _helium,
    "ernie4_5": lambda config, llama: llama._replace(interleaves_pairs=True),
    "seed_oss": _seed_oss,
}
SUPPORTED_MODEL_TYPES = tuple(_DIFFERENCES)
# the architectures in which fewer elements of a head may rotate than it has
PARTIALLY_ROTATED = ("phi3", "glm")

_NORMALIZED = (
    "its queries and keys are normalized, so a key is divided by a number that depends on its token, but latent "
    "attention has linear projections alone between the latent and its keys"
)
_NORMS_AFTER = (
    "it normalizes the outputs of attention and MLPs, which DeepSeek-V2 adds to the residual stream as they are"
)
_CAPPED = "it caps attention scores and logits by a tanh, which DeepSeek-V2 does not"
_NORM_BIASES = "its LayerNorms have biases, which would become biases of MLPs, and those of DeepSeek-V2 have none"
_PARALLEL = "its MLP reads the input of attention, but that of DeepSeek-V2 reads what attention has added to it"
_EXPERTS = "it has experts, and only the MLPs of dense models are copied"
_REASONS = {
    "qwen3": _NORMALIZED,
    "hunyuan_v1_dense": _NORMALIZED,
    "apertus": _NORMALIZED,
    "olmo2": _NORMALIZED,
    "olmo3": _NORMALIZED,
    "exaone4": _NORMALIZED,
    "gemma3_text": _NORMALIZED,
    "gemma2": _CAPPED,
    "glm4": _NORMS_AFTER,
    "stablelm": _NORM_BIASES,
    "starcoder2": _NORM_BIASES,
    "nemotron": _NORM_BIASES,
    "phi": _PARALLEL,
    "gpt_neox": _PARALLEL,
    "falcon": _PARALLEL,
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "ministral3": "it scales queries by a number that depends on their position, which DeepSeek-V2 does not",
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "granitemoe": _EXPERTS,
    "deepseek_v2": "it has latent attention already",
    "deepseek_v3": "it has latent attention already",
}


def check_model_type(given: dict) -> None:
    """Raises ValueError, with the reason if it is known, unless the content of a config.json can be converted."""
    model_type = given.get("model_type")
    if isinstance(model_type, str) and model_type in SUPPORTED_MODEL_TYPES:
        return
    inner = given.get("text_config")
    inner_type = inner.get("model_type") if isinstance(inner, dict) else None
    reasons = [_REASONS[each] for each in (model_type, inner_type) if isinstance(each, str) and each in _REASONS]
    if inner_type in SUPPORTED_MODEL_TYPES:
        reasons.append("it wraps a language model, which must be saved alone")
    raise ValueError(
        f"expected one of {', '.join(SUPPORTED_MODEL_TYPES)}, got model_type {reprlib.repr(model_type)}"
        f"{': ' if reasons else ''}{' '.join(reasons[:1])}; choose another source."
    )


def head_width(config: PreTrainedConfig) -> int:
    # some classes have no such field, but read it
    given = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if given is None else given
