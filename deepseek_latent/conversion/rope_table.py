"""At which frequencies the heads of a source rotate, and how DeepSeek-V2 is told to rotate at any of them."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def rope_frequencies(origin: PreTrainedConfig, width: int) -> tuple[Tensor, float]:
    """The scaled frequencies [width/2] of a source's head in float64, and the factor on cos and sin.

    Pairs that do not rotate come last and have the frequency 0.
    """
    theta, kind = origin.rope_parameters["rope_theta"], origin.rope_parameters["rope_type"]
    if kind == "default":
        rotary = int(width * origin.rope_parameters.get("partial_rotary_factor", 1))
        frequencies, factor = theta ** -(torch.arange(0, rotary, 2, dtype=torch.float64) / rotary), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](origin, "cpu")
    return torch.nn.functional.pad(frequencies.double(), (0, width // 2 - len(frequencies))), float(factor)


def rope_parameters(origin: PreTrainedConfig, frequencies: Tensor, factor: float) -> dict:
    """The config field for RoPE with any frequencies [r/2] and a factor on cos and sin.

    Frequencies of plain RoPE give "default". Any others become the divisors of longrope, the same for every length.
    """
    theta, num_pairs = origin.rope_parameters["rope_theta"], len(frequencies)
    plain = theta ** -(torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    if factor == 1 and torch.equal(frequencies, plain):
        return {"rope_type": "default", "rope_theta": theta}
    factors = (plain / frequencies).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": factor,
        "original_max_position_embeddings": origin.max_position_embeddings,
    }


def interleave(x: Tensor) -> Tensor:
    """Rows [w ..] from Llama's order, which rotates (i, i + w/2), to DeepSeek's, which rotates (2i, 2i + 1)."""
    return x.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
