"""The name of the cache: `past_key_values` until transformers 5.23, `cache` since 5.24; here both, everywhere.

transformers 5.24 renamed it in every signature, in outputs and in generate(), and warns of the old name until 5.40.
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
# the name by which the installed transformers passes a cache on
CACHE = next(name for name in CACHE_NAMES if name in {x.name for x in fields(modeling_outputs.MoeModelOutputWithPast)})


def with_cache_named(own: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments in which the cache, under whichever name it came, is called `own`.

    Raises ValueError where two caches are given.
    """
    given = [arguments.pop(name) for name in CACHE_NAMES if name in arguments]
    # peft reads the old name from what generate() prepares, so one and the same may come under both
    given = [cache for cache in given if cache is not None]
    if len(given) > 1 and given[0] is not given[1]:
        raise _two_caches()
    return arguments | {own: given[0]} if given else arguments


def takes_either_cache_name(function: Callable) -> Callable:
    """Lets a function take its cache as `cache` and as `past_key_values`; one of them is its own parameter.

    What it returns answers to both names as well. Raises ValueError where two caches are given.
    """
    signature = inspect.signature(function)
    place, own = next((i, name) for i, name in enumerate(signature.parameters) if name in CACHE_NAMES)
    other = CACHE_NAMES[1 - CACHE_NAMES.index(own)]

    @functools.wraps(function)
    def by_either_name(*args, **kwargs):
        if other in kwargs or len(args) > place:
            kwargs = with_cache_named(own, kwargs)
            if own in kwargs and len(args) > place:
                if args[place] is not None:
                    raise _two_caches()
                args = (*args[:place], kwargs.pop(own), *args[place + 1 :])
        return answering_to_both(function(*args, **kwargs))

    # generate() refuses arguments that no signature names
    *first, others = signature.parameters.values()
    second_name = signature.parameters[own].replace(name=other, kind=inspect.Parameter.KEYWORD_ONLY)
    by_either_name.__signature__ = signature.replace(parameters=[*first, second_name, others])
    return by_either_name


def _two_caches() -> ValueError:
    return ValueError("expected one cache and got two: cache and past_key_values mean the same, so leave one out.")


class _AnswersToCache:
    """An output whose field is still called `past_key_values`."""

    @property
    def cache(self) -> Cache | None:
        return self.past_key_values

    def __getitem__(self, key):
        return super().__getitem__("past_key_values" if key == "cache" else key)


_OURS: dict[type[ModelOutput], type[ModelOutput]] = {}


def _answering_class(theirs: type[ModelOutput]) -> type[ModelOutput]:
    if CACHE == "cache":
        return theirs
    # pickle looks for a class by the name that this module gives it
    attributes = {"__module__": __name__, "__doc__": theirs.__doc__}
    _OURS[theirs] = dataclass(type(theirs.__name__, (_AnswersToCache, theirs), attributes))
    return _OURS[theirs]


MoeModelOutputWithPast = _answering_class(modeling_outputs.MoeModelOutputWithPast)
MoeCausalLMOutputWithPast = _answering_class(modeling_outputs.MoeCausalLMOutputWithPast)
SequenceClassifierOutputWithPast = _answering_class(modeling_outputs.SequenceClassifierOutputWithPast)
GenerateDecoderOnlyOutput = _answering_class(generation_utils.GenerateDecoderOnlyOutput)
GenerateBeamDecoderOnlyOutput = _answering_class(generation_utils.GenerateBeamDecoderOnlyOutput)


def answering_to_both(output: Any) -> Any:
    """An output of the classes above as one that has its cache under both names; anything else stays as it is."""
    ours = _OURS.get(type(output))
    return output if ours is None else ours(**{field.name: getattr(output, field.name) for field in fields(output)})
