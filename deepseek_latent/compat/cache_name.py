"""The cache has two names, `past_key_values` until transformers 5.23 and `cache` since 5.24; here both work everywhere.

transformers 5.24 renamed it in every signature, in outputs and in generate(), and warns about the old name until 5.40.
TODO: when transformers >= 5.24 is required, call it `cache` throughout and drop this file.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from transformers import modeling_outputs
from transformers.cache_utils import Cache
from transformers.generation import utils as generation_utils
from transformers.utils import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")
# the name under which the installed transformers passes a cache on
CACHE = next(name for name in CACHE_NAMES if name in {x.name for x in fields(modeling_outputs.MoeModelOutputWithPast)})

# ---- Arguments -------------------------------------------------------------------------------------------------------


def with_cache_named(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns keyword arguments in which the cache has this `name`, whichever name it had before.

    Raises ValueError if they contain two different caches.
    """
    given = [arguments.pop(each) for each in CACHE_NAMES if each in arguments]
    # peft reads the old name from the arguments that generate() prepares, so the same cache may have both names
    given = [cache for cache in given if cache is not None]
    if len(given) > 1 and given[0] is not given[1]:
        raise _two_caches_error()
    return arguments | {name: given[0]} if given else arguments


def takes_either_cache_name(function: Callable) -> Callable:
    """Decorates a function with one of the names as a parameter, so that it takes its cache under both names.

    Its output has the cache under both names as well. Raises ValueError if it is called with two different caches.
    """
    signature = inspect.signature(function)
    position, own = next((i, name) for i, name in enumerate(signature.parameters) if name in CACHE_NAMES)
    other = CACHE_NAMES[1 - CACHE_NAMES.index(own)]

    @functools.wraps(function)
    def with_either_name(*args, **kwargs):
        if other in kwargs or len(args) > position:
            kwargs = with_cache_named(own, kwargs)
            if own in kwargs and len(args) > position:
                if args[position] is not None:
                    raise _two_caches_error()
                args = (*args[:position], kwargs.pop(own), *args[position + 1 :])
        return with_both_cache_names(function(*args, **kwargs))

    # generate() refuses arguments that are not in the signature
    *first, var_keyword = signature.parameters.values()
    second_name = signature.parameters[own].replace(name=other, kind=inspect.Parameter.KEYWORD_ONLY)
    with_either_name.__signature__ = signature.replace(parameters=[*first, second_name, var_keyword])
    return with_either_name


def _two_caches_error() -> ValueError:
    return ValueError("expected one cache and got two: cache and past_key_values mean the same, so leave one out.")


# ---- Outputs ---------------------------------------------------------------------------------------------------------


class _HasCache:
    """An output of an older transformers, whose field is `past_key_values`, with `cache` as a second name for it."""

    @property
    def cache(self) -> Cache | None:
        return self.past_key_values

    def __getitem__(self, key):
        return super().__getitem__("past_key_values" if key == "cache" else key)


# transformers' output classes, and those that replace them
_REPLACEMENTS: dict[type[ModelOutput], type[ModelOutput]] = {}


def _class_with_both_names(output_class: type[ModelOutput]) -> type[ModelOutput]:
    if CACHE == "cache":
        return output_class
    # pickle looks the class up in this module by the same name
    attributes = {"__module__": __name__, "__doc__": output_class.__doc__}
    _REPLACEMENTS[output_class] = dataclass(type(output_class.__name__, (_HasCache, output_class), attributes))
    return _REPLACEMENTS[output_class]


MoeModelOutputWithPast = _class_with_both_names(modeling_outputs.MoeModelOutputWithPast)
MoeCausalLMOutputWithPast = _class_with_both_names(modeling_outputs.MoeCausalLMOutputWithPast)
SequenceClassifierOutputWithPast = _class_with_both_names(modeling_outputs.SequenceClassifierOutputWithPast)
GenerateDecoderOnlyOutput = _class_with_both_names(generation_utils.GenerateDecoderOnlyOutput)
GenerateBeamDecoderOnlyOutput = _class_with_both_names(generation_utils.GenerateBeamDecoderOnlyOutput)


def with_both_cache_names(output: Any) -> Any:
    """Gives an output of the classes above its cache under both names; returns anything else as it is."""
    own = _REPLACEMENTS.get(type(output))
    return output if own is None else own(**{field.name: getattr(output, field.name) for field in fields(output)})
