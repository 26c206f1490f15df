"""RoPE's settings in both forms: `rope_parameters` of transformers 5, and the older `rope_theta` and `rope_scaling`."""

import reprlib
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LEGACY_NAMES = ("rope_theta", "rope_scaling")
DEFAULT_THETA = 10000.0

# the bounds of every number: beyond them, frequencies or lengths are no longer finite
SMALLEST, LARGEST, MOST_OPTIONAL = 1e-6, 1e12, 10_000
# the numbers that each type of RoPE requires; all are positive
REQUIRED = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "dynamic": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("rope_theta", "original_max_position_embeddings"),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
}
OPTIONAL = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")


def merge_rope(rope_parameters: dict | None, rope_theta: float | None, rope_scaling: dict | None) -> dict[str, Any]:
    """Returns RoPE's settings in transformers 5's form, given in one of the forms or in both.

    Raises ValueError if both are given and disagree, or if `validate_rope` does.
    """
    current = _with_rope_type(rope_parameters)
    legacy = _with_rope_type(rope_scaling)
    if rope_theta is not None and legacy.setdefault("rope_theta", rope_theta) != rope_theta:
        raise ValueError(
            f"rope_theta and the rope_theta inside rope_scaling must agree, got "
            f"{reprlib.repr(rope_theta)} and {reprlib.repr(legacy['rope_theta'])}; leave one out."
        )
    for name in current.keys() & legacy.keys():
        if current[name] != legacy[name]:
            raise ValueError(
                f"rope_parameters and the older rope_theta/rope_scaling must agree, got {name} = "
                f"{reprlib.repr(current[name])} and {reprlib.repr(legacy[name])}; change both or leave one out."
            )
    rope = {"rope_theta": DEFAULT_THETA, "rope_type": "default"} | legacy | current
    # validated here, because transformers then fills in a missing original_max_position_embeddings with the extended
    # length
    validate_rope(rope)
    return rope


def split_rope(rope: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Returns `rope_theta` and `rope_scaling`, as they are in DeepSeek's own config.json."""
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")}
    return rope["rope_theta"], None if rope["rope_type"] == "default" else {"type": rope["rope_type"], **scaling}


def validate_rope(rope: dict[str, Any] | None, width: int | None = None) -> None:
    """Raises ValueError for an unknown type, a missing or invalid number, or a partial rotation of the rotary width.

    With the rotary `width`, the number of longrope's divisors is checked too.
    """
    if not isinstance(rope, dict) or "rope_type" not in rope:
        raise ValueError(
            f"rope_parameters must be a dict with rope_type and rope_theta, got {reprlib.repr(rope)}; correct it."
        )
    rope_type = rope["rope_type"]
    if (
        not isinstance(rope_type, str)
        or rope_type not in REQUIRED
        or rope_type not in ("default", *ROPE_INIT_FUNCTIONS)
    ):
        raise ValueError(f"rope_type must be one of {', '.join(REQUIRED)}, got {reprlib.repr(rope_type)}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor must be 1, got {reprlib.repr(rope['partial_rotary_factor'])}; set qk_rope_head_dim "
            "to the width that rotates."
        )
    for name in REQUIRED[rope_type]:
        value = rope.get(name)
        if not _is_number(value) or value <= 0:
            raise ValueError(f"{rope_type} needs a positive {name} in rope_scaling, got {reprlib.repr(value)}.")
        # logarithms of the first two are divided by
        least = 1 if name in ("rope_theta", "original_max_position_embeddings") else SMALLEST
        if not least < value < LARGEST:
            raise ValueError(f"{name} in rope_scaling must be above {least:g} and below {LARGEST:g}, got {value}.")
    for name in OPTIONAL:
        value = rope.get(name)
        if value is not None and not (_is_number(value) and value >= 0):
            raise ValueError(f"{name} in rope_scaling must be a number of 0 or more, got {reprlib.repr(value)}.")
        if value is not None and value > MOST_OPTIONAL:
            raise ValueError(f"{name} in rope_scaling must be at most {MOST_OPTIONAL:,}, got {value}.")
    if not isinstance(rope.get("truncate", True), bool):
        raise ValueError(f"truncate in rope_scaling must be true or false, got {reprlib.repr(rope['truncate'])}.")
    if rope_type == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor in rope_scaling must be below high_freq_factor ({rope['high_freq_factor']}), got "
            f"{rope['low_freq_factor']}."
        )
    if rope_type == "dynamic" and width == 2:
        raise ValueError("dynamic needs a qk_rope_head_dim of at least 4, got 2; use another rope_type.")
    if rope_type == "longrope":
        _check_divisors(rope, width)
    if rope.get("mscale_all_dim") and rope_type != "default" and not _is_number(rope.get("factor")):
        raise ValueError(
            f"mscale_all_dim needs a number as factor in rope_scaling, got {reprlib.repr(rope.get('factor'))}."
        )


def _check_divisors(rope: dict[str, Any], width: int | None) -> None:
    if not (rope.get("short_factor") and rope.get("long_factor")):
        raise ValueError("longrope needs the lists short_factor and long_factor in rope_scaling, got none.")
    for name in ("short_factor", "long_factor"):
        divisors = rope[name]
        if not isinstance(divisors, list) or not all(_is_number(x) and SMALLEST**2 < x < LARGEST for x in divisors):
            raise ValueError(
                f"{name} in rope_scaling must be a list of positive numbers, got {reprlib.repr(divisors)}."
            )
        if width is not None and len(divisors) != width // 2:
            raise ValueError(
                f"{name} in rope_scaling must have half as many numbers as qk_rope_head_dim ({width}), got "
                f"{len(divisors)}."
            )
    factor = rope.get("factor")
    if factor is not None and not (_is_number(factor) and SMALLEST < factor < LARGEST):
        raise ValueError(f"factor in rope_scaling must be a positive number, got {reprlib.repr(factor)}.")


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # a whole number too large for a float is none that could be computed with
    return is_number and abs(value) < 1e300


def _with_rope_type(rope: dict[str, Any] | None) -> dict[str, Any]:
    if rope is not None and not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be a dict or null, got {reprlib.repr(rope)}; correct it.")
    rope = dict(rope or {})
    old_name = rope.pop("type", None)
    if old_name is not None and rope.setdefault("rope_type", old_name) != old_name:
        raise ValueError(
            f"rope_type and the older type must agree, got {reprlib.repr(rope['rope_type'])} and "
            f"{reprlib.repr(old_name)}; leave one out."
        )
    return rope
