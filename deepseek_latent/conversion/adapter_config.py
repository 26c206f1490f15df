"""adapter_config.json of a LoRA adapter by peft: its checked fields, and what peft makes of them for a given module."""

import re
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

from ..compat.peft_config import is_target_module, is_target_parameter, lora_config_of, value_for
from ..json_files import read_json

CONFIG_FILE = "adapter_config.json"
# options that routed experts may have in both forms, or that do not concern them
_UNDERSTOOD = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "bias", "trainable_token_indices", "ensure_weight_tying"),
}


def _is_number(value: Any) -> bool:
    # NaN compares as false
    return type(value) in (int, float) and abs(value) < 1e30


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_pattern(of_value: Callable) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(of_value, value.values())))


def _is_index(value: Any) -> bool:
    return type(value) is int


# the fields that are read: what they may be, in words and as a test
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number above 0", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "use_rslora": ("true or false", lambda x: isinstance(x, bool)),
    "lora_dropout": ("a number from 0 to 1", lambda x: _is_number(x) and 0 <= x <= 1),
    "init_lora_weights": ('true, false or "gaussian"', lambda x: isinstance(x, bool) or x in (None, "gaussian")),
    "rank_pattern": ("whole numbers above 0 by pattern", _is_pattern(_is_rank)),
    "alpha_pattern": ("numbers by pattern", _is_pattern(_is_number)),
    "target_modules": (
        "names, or a pattern other than all-linear",
        lambda x: x is None or _is_list(x) or (isinstance(x, str) and x.lower() != "all-linear"),
    ),
    "target_parameters": ("names", lambda x: x is None or _is_list(x)),
    "exclude_modules": ("names or a pattern", lambda x: x is None or isinstance(x, str) or _is_list(x)),
    "modules_to_save": ("names", lambda x: x is None or _is_list(x)),
    "layers_to_transform": (
        "numbers of layers",
        lambda x: x is None or _is_index(x) or (isinstance(x, list) and all(map(_is_index, x))),
    ),
    "layers_pattern": ("names", lambda x: x is None or isinstance(x, str) or _is_list(x)),
}


class AdapterConfig:
    """The fields of an adapter_config.json. Modules and parameters go by their names in the model."""

    def __init__(self, fields: dict[str, Any]):
        self.fields = fields
        self._config = lora_config_of(fields)
        self.r: int = self._config.r
        self.lora_alpha: float = self._config.lora_alpha
        self.use_rslora: bool = self._config.use_rslora
        self.lora_dropout: float = self._config.lora_dropout
        self._ranks, self._alphas = self._config.rank_pattern or {}, self._config.alpha_pattern or {}
        # peft fills in the targets that its list of models has, and DeepSeek-V2 is not in that list
        if self._config.target_modules is None:
            self._config.target_modules = set()

    @classmethod
    def load(cls, folder: Path) -> "AdapterConfig":
        """Raises ValueError for anything but a plain LoRA adapter whose fields are all understood."""
        fields = read_json(folder / CONFIG_FILE)
        if fields.get("peft_type") != "LORA":
            raise ValueError(f"expected a LoRA adapter in {folder}, got peft_type={fields.get('peft_type')!r:.80}.")
        defaults = lora_config_of({})
        for name, value in fields.items():
            if name in _FIELDS and not _FIELDS[name][1](value):
                raise ValueError(f"expected {_FIELDS[name][0]} as {name} in {CONFIG_FILE}, got {value!r:.80}.")
            # options that are not used are null, false or empty
            if name not in {*_FIELDS, *_UNDERSTOOD} and value and value != getattr(defaults, name, None):
                raise ValueError(
                    "expected plain LoRA, without DoRA or other variants, since only that is the same in both forms, "
                    f"got {name:.80}={value!r:.80} in {folder}."
                )
        try:
            config = cls(fields)
            config._check_patterns()
        except (TypeError, ValueError, re.error, OverflowError, RecursionError) as error:
            reason = shorten(str(error), 300, placeholder=" ...")
            raise ValueError(
                f"expected a {CONFIG_FILE} that peft reads in {folder}, got {type(error).__name__}: {reason}; "
                "correct it."
            ) from error
        return config

    def _check_patterns(self) -> None:
        """Raises what `re` raises for fields that are no regular expressions."""
        config = self._config
        patterns = [*self._ranks, *self._alphas, *(config.modules_to_save or ())]
        patterns += [x for x in (config.target_modules, config.exclude_modules) if isinstance(x, str)]
        patterns += [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
        for pattern in patterns:
            re.compile(f"({pattern})")

    def targets_module(self, name: str) -> bool:
        return is_target_module(self._config, name)

    def targets_parameter(self, name: str) -> bool:
        return is_target_parameter(self._config, name)

    def rank(self, name: str) -> int:
        return value_for(name, self._ranks, self.r)

    def alpha(self, name: str) -> float:
        return value_for(name, self._alphas, self.lora_alpha)

    def with_fields(self, **changes: Any) -> "AdapterConfig":
        return AdapterConfig(self.fields | changes)
