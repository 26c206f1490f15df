"""RoPE's settings in both spellings: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before it."""

from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LEGACY_NAMES = ("rope_theta", "rope_scaling")

NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def merge_rope(rope_parameters: dict | None, rope_theta: float | None, rope_scaling: dict | None) -> dict[str, Any]:
    """One dict in transformers 5's form from either spelling, or from both where they agree.

    Raises ValueError where they disagree, or as `validate_rope`.
    """
    current = _with_rope_type(rope_parameters)
    legacy = _with_rope_type(rope_scaling)
    if rope_theta is not None:
        legacy.setdefault("rope_theta", rope_theta)
    for name in current.keys() & legacy.keys():
        if current[name] != legacy[name]:
            raise ValueError(
                f"rope_parameters and the older rope_theta/rope_scaling must agree, got {name} = {current[name]!r} "
                f"and {legacy[name]!r}; change both or leave one out."
            )
    rope = {"rope_theta": 10000.0, "rope_type": "default"} | legacy | current
    # now, since transformers goes on to fill a missing original_max_position_embeddings with the stretched length
    validate_rope(rope)
    return rope


def split_rope(rope: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling`, as DeepSeek's own config.json has them."""
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")}
    return rope["rope_theta"], None if rope["rope_type"] == "default" else {"type": rope["rope_type"], **scaling}


def validate_rope(rope: dict[str, Any]) -> None:
    """Raises ValueError for an unknown type, a missing number, or a part of the width left unrotated."""
    known = ("default", *ROPE_INIT_FUNCTIONS)
    if rope["rope_type"] not in known:
        raise ValueError(f"rope_type must be one of {', '.join(known)}, got {rope['rope_type']!r}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']}; qk_rope_head_dim says what rotates."
        )
    for name in NEEDED.get(rope["rope_type"], ()):
        if rope.get(name) is None or rope[name] <= 0:
            raise ValueError(f"{rope['rope_type']} needs a positive {name} in rope_scaling, got {rope.get(name)}.")


def _with_rope_type(rope: dict[str, Any] | None) -> dict[str, Any]:
    rope = dict(rope or {})
    old_name = rope.pop("type", None)
    if old_name is not None and rope.setdefault("rope_type", old_name) != old_name:
        raise ValueError(
            f"rope_type and the older type must agree, got {rope['rope_type']!r} and {old_name!r}; leave one out."
        )
    return rope
