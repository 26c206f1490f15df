"""Whether DeepSeek-V2 can do what the config of a source asks for."""

import math
import reprlib

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from ..configuration.checks import MAX_FACTOR, MAX_LENGTH, MAX_WIDTH, SIZES, check_general_fields, check_size
from ..configuration.rope_parameters import validate_rope
from .architectures import PARTIALLY_ROTATED, architecture_of, check_model_type, head_width
from .source import Source

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
# the numbers by which architectures multiply or divide; no other has them
_FACTORS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")


def read_source_config(files: Source) -> PreTrainedConfig:
    """The config of a source in transformers' own class, checked before anything is computed with it.

    Raises ValueError for another architecture, for impossible numbers, and for a feature that DeepSeek-V2 does not
    have, with what can be done about it.
    """
    check_model_type(files.config)
    try:
        check_general_fields(files.config)
        # before transformers computes with them
        for name, most in SIZES.items():
            if files.config.get(name) is not None:
                check_size(name, files.config[name], most)
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        _check_numbers(config)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(f"expected a config.json that transformers reads in {files.folder}, got: {error}") from error
    for name, (value, reason) in _unsupported(config).items():
        if value is not None and value is not False:
            raise ValueError(f"DeepSeek-V2 does not support {name} {reprlib.repr(value)} of {files.folder}: {reason}.")
    _check_rope(config, files)
    return config


def _check_numbers(config: PreTrainedConfig) -> None:
    """Raises ValueError for numbers that transformers accepts, but no model has."""
    for name, value in (("num_key_value_heads", config.num_key_value_heads), ("head_dim", head_width(config))):
        check_size(name, value, MAX_WIDTH)
    if getattr(config, "sliding_window", None) is not None:
        check_size("sliding_window", config.sliding_window, MAX_LENGTH, ", or null to leave it out")
    h, g = config.num_attention_heads, config.num_key_value_heads
    if h % g:
        raise ValueError(f"num_key_value_heads must divide num_attention_heads ({h}), got {g}.")
    if head_width(config) % 2:
        raise ValueError(f"the width of a head must be even, since RoPE rotates pairs, got {head_width(config)}.")
    for name in _FACTORS:
        factor = getattr(config, name, 1.0)
        if not (isinstance(factor, int | float) and 1 / MAX_FACTOR <= factor <= MAX_FACTOR):
            raise ValueError(
                f"{name} must be a number from {1 / MAX_FACTOR:g} to {MAX_FACTOR:,}, got {reprlib.repr(factor)}."
            )
    if config.model_type == "smollm3" and len(config.no_rope_layers) < config.num_hidden_layers:
        raise ValueError(
            f"no_rope_layers must have a number for each of {config.num_hidden_layers} layers, got "
            f"{len(config.no_rope_layers)}."
        )


def _unsupported(config: PreTrainedConfig) -> dict[str, tuple[object, str]]:
    """Fields and the reasons why their values cannot be converted. False and None can be."""
    window = _sliding_window(config)
    no_biases = "its MLPs have no biases; choose a source without them"
    return {
        "sliding_window": (
            window,
            "each of its layers reads the whole text; set sliding_window to null and leave out layer_types in "
            f"config.json, and the result equals the source on texts of up to {window} tokens",
        ),
        "layer_types": (
            _other_layers(config),
            "all of its layers read the whole text; choose a source without them",
        ),
        "mlp_bias": (getattr(config, "mlp_bias", None), no_biases),
        "use_bias": (getattr(config, "use_bias", None), no_biases),
        "clip_qkv": (
            getattr(config, "clip_qkv", None),
            "it does not clip queries, keys and values; choose a source without it",
        ),
        "use_bidirectional_attention": (
            getattr(config, "use_bidirectional_attention", None),
            "no token attends to later ones; choose a source without it",
        ),
        "hidden_act": (
            None if _is_elementwise(config.hidden_act) else config.hidden_act,
            "it needs a function of transformers without weights; choose a source with one, such as 'silu'",
        ),
    }


def _sliding_window(config: PreTrainedConfig) -> int | None:
    """The number of tokens that layers with a window read, or None if no layer reads fewer than the longest text."""
    layer_types = getattr(config, "layer_types", None)
    has_windows = layer_types is None or "sliding_attention" in layer_types
    window = getattr(config, "sliding_window", None)
    return window if has_windows and window is not None and window < config.max_position_embeddings else None


def _other_layers(config: PreTrainedConfig) -> list[str] | None:
    """The types of layers, unless all of them read the whole text."""
    layer_types = getattr(config, "layer_types", None)
    # a window that is not as long as the longest text is refused by itself
    has_window = getattr(config, "sliding_window", None) is not None
    allowed = {"full_attention", "sliding_attention"} if has_window else {"full_attention"}
    is_usable = layer_types is None or (len(layer_types) == config.num_hidden_layers and {*layer_types} <= allowed)
    return None if is_usable else layer_types


def _is_elementwise(activation: str) -> bool:
    return activation in ACT2FN and not [*ACT2FN[activation].parameters()]


def _check_rope(config: PreTrainedConfig, files: Source) -> None:
    """Raises ValueError unless the source rotates at the same frequencies whatever the length of a text is."""
    rope = config.rope_parameters if isinstance(config.rope_parameters, dict) else {}
    rope_type, partial = rope.get("rope_type"), rope.get("partial_rotary_factor", 1)
    refused = f"DeepSeek-V2 does not support {{}} of {files.folder}: {{}}."
    if rope_type not in _ROPE_TYPES:
        reason = f"it rotates by {', '.join(_ROPE_TYPES)}; choose a source with one of these types"
        raise ValueError(refused.format(f"rope_type {reprlib.repr(rope_type or 'none')}", reason))
    if partial != 1 and config.model_type not in PARTIALLY_ROTATED:
        reason = f"transformers' class for {config.model_type} rotates whole heads; remove it or set it to 1"
        raise ValueError(refused.format(f"partial_rotary_factor {reprlib.repr(partial)}", reason))
    is_fraction = isinstance(partial, int | float) and 0 < partial <= 1 and math.isfinite(partial)
    rotary_width = architecture_of(config).rotary_width if is_fraction else 0
    if rotary_width < 2 or rotary_width % 2:
        raise ValueError(
            f"partial_rotary_factor must be the fraction of a head's {head_width(config)} elements that rotate, an "
            f"even number of them, got {reprlib.repr(partial)}; correct config.json."
        )
    validate_rope({name: value for name, value in rope.items() if name != "partial_rotary_factor"}, rotary_width)
    if rope_type == "longrope" and rope["short_factor"] != rope["long_factor"]:
        length = rope["original_max_position_embeddings"]
        if config.max_position_embeddings > length:
            reason = (
                f"texts of more than {length} tokens would need other frequencies than shorter ones, but cached keys "
                "are rotated already; make both lists in config.json equal, to long_factor for long texts or to "
                "short_factor for short ones"
            )
            raise ValueError(refused.format("different lists short_factor and long_factor", reason))
