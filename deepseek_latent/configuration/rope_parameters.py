"""RoPE's settings in both forms: `rope_parameters` of transformers 5, and the older `rope_theta` and `rope_scaling`."""

from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LEGACY_NAMES = ("rope_theta", "rope_scaling")
DEFAULT_THETA = 10000.0

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
            f"rope_theta and the rope_theta inside rope_scaling must agree, got {rope_theta!r} and "
            f"{legacy['rope_theta']!r}; leave one out."
        )
    for name in current.keys() & legacy.keys():
        if current[name] != legacy[name]:
            raise ValueError(
                f"rope_parameters and the older rope_theta/rope_scaling must agree, got {name} = {current[name]!r} "
                f"and {legacy[name]!r}; change both or leave one out."
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


def validate_rope(rope: dict[str, Any] | None) -> None:
    """Raises ValueError for an unknown type, a missing or invalid number, or a partial rotation of the rotary width."""
    if not rope or "rope_type" not in rope:
        raise ValueError(f"rope_parameters must be a dict with rope_type and rope_theta, got {rope!r}.")
    rope_type = rope["rope_type"]
    if rope_type not in REQUIRED or rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(f"rope_type must be one of {', '.join(REQUIRED)}, got {rope_type!r}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']}; set qk_rope_head_dim to the width "
            "that rotates."
        )
    for name in REQUIRED[rope_type]:
        if not _is_number(rope.get(name)) or rope[name] <= 0:
            raise ValueError(f"{rope_type} needs a positive {name} in rope_scaling, got {rope.get(name)!r}.")
    for name in OPTIONAL:
        if rope.get(name) is not None and not (_is_number(rope[name]) and rope[name] >= 0):
            raise ValueError(f"{name} in rope_scaling must be a number of 0 or more, got {rope[name]!r}.")
    if rope_type == "longrope" and not (rope.get("short_factor") and rope.get("long_factor")):
        raise ValueError("longrope needs the lists short_factor and long_factor in rope_scaling, got none.")
    if rope.get("mscale_all_dim") and rope_type != "default" and not _is_number(rope.get("factor")):
        raise ValueError(f"mscale_all_dim needs a number as factor in rope_scaling, got {rope.get('factor')!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _with_rope_type(rope: dict[str, Any] | None) -> dict[str, Any]:
    rope = dict(rope or {})
    old_name = rope.pop("type", None)
    if old_name is not None and rope.setdefault("rope_type", old_name) != old_name:
        raise ValueError(
            f"rope_type and the older type must agree, got {rope['rope_type']!r} and {old_name!r}; leave one out."
        )
    return rope
