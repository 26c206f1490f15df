"""What this package changes in the warnings of peft (0.20 and 0.21), for its own models only."""

import functools
import warnings
from ast import literal_eval
from importlib import import_module
from typing import Any

from .peft_config import is_target_parameter, value_for

_PREFIXES = tuple(
    f"The following {field} keys did not match any targeted module and were ignored: "
    for field in ("rank_pattern", "alpha_pattern")
)


def correct_pattern_warnings(model_class: type) -> None:
    """Has peft warn of a `rank_pattern` or `alpha_pattern` on these models only where it matches nothing.

    peft (since 0.21) compares patterns with the names of modules alone, so it warns that a pattern of a parameter, such
    as the stacked weights of routed experts, "did not match", and uses it nevertheless. All warnings are collected
    while an adapter is added and shown afterwards, without the patterns that match a parameter.

    TODO: drop it when a peft that compares patterns with parameters is required.
    """
    tuner = import_module("peft.tuners.tuners_utils").BaseTuner
    inject = tuner.inject_adapter
    if hasattr(inject, "corrects_pattern_warnings"):
        return

    @functools.wraps(inject)
    def inject_and_correct(self, model, adapter_name, *args, **kwargs):
        if not isinstance(model, model_class):
            return inject(self, model, adapter_name, *args, **kwargs)
        try:
            with warnings.catch_warnings(record=True) as collected:
                # the caller's filters decide below
                warnings.simplefilter("always")
                return inject(self, model, adapter_name, *args, **kwargs)
        finally:
            for warning in collected:
                message = _corrected(warning.message, self.peft_config[adapter_name], self.targeted_parameter_names)
                if message is not None:
                    warnings.warn_explicit(message, warning.category, warning.filename, warning.lineno)

    inject_and_correct.corrects_pattern_warnings = True
    tuner.inject_adapter = inject_and_correct


def _corrected(message: Warning, config: Any, parameters: list[str]) -> Warning | None:
    """A warning of peft without the patterns that match a parameter with an adapter; None if no other is left."""
    text = str(message)
    prefix = next((prefix for prefix in _PREFIXES if text.startswith(prefix)), None)
    if prefix is None:
        return message
    targeted = [name for name in parameters if is_target_parameter(config, name)]
    patterns = literal_eval(text.removeprefix(prefix).removesuffix("."))
    left = [x for x in patterns if not any(value_for(name, {x: True}, False) for name in targeted)]
    return type(message)(f"{prefix}{left}.") if left else None
