"""What peft makes of the fields of a LoraConfig, by peft's own functions (peft 0.20 to 0.21).

tests/compat/test_peft.py has a test for what is used here, which fails when a release changes it.
"""

from importlib import import_module
from typing import Any


def lora_config_of(fields: dict[str, Any]) -> Any:
    """The LoraConfig of an adapter_config.json. As in peft, fields that are unknown here are left out."""
    known = import_module("peft").LoraConfig
    return known(**{name: value for name, value in fields.items() if name in known.__dataclass_fields__})


def is_target_module(config: Any, name: str) -> bool:
    """Whether a LoraConfig adapts the module `name`."""
    return bool(import_module("peft.tuners.tuners_utils").check_target_module_exists(config, name))


def is_target_parameter(config: Any, name: str) -> bool:
    """Whether a LoraConfig adapts the parameter `name`, which must end in the name of a target."""
    return any(f".{name}".endswith(f".{target}") for target in config.target_parameters or ())


def value_for(name: str, patterns: dict[str, Any], default: Any) -> Any:
    """The value of the first pattern that matches the module or parameter `name`, for `rank_pattern` and the like."""
    find = import_module("peft.utils.other").get_pattern_key
    return patterns.get(find(patterns.keys(), name), default)
