"""Recognizes DeepSeek-V2 of other classes than this package's: transformers' own, and code beside a checkpoint."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def check_is_not_native(thing: Any) -> None:
    """Raises TypeError if `thing` is, or wraps, a model or config of transformers' own DeepSeek-V2."""
    for part in _parts(thing):
        if type(part).__module__.startswith("transformers.models."):
            when = "from_pretrained" if isinstance(part, nn.Module) else "you make the config"
            raise TypeError(f"this is transformers' own {type(part).__name__}: import deepseek_latent before {when}.")


def check_is_own_class(thing: Any) -> None:
    """Raises TypeError if `thing` is, or wraps, a DeepSeek-V2 that is defined elsewhere than in this package.

    Anything else passes, other architectures included.
    """
    check_is_not_native(thing)
    for part in _parts(thing):
        if type(part).__module__.startswith("transformers_modules."):
            raise TypeError(
                f"this is the {type(part).__name__} of the code beside a checkpoint: import deepseek_latent, and load "
                "the checkpoint without trust_remote_code."
            )


def _parts(thing: Any) -> Iterator[Any]:
    parts = thing.modules() if isinstance(thing, nn.Module) else [thing]
    return (part for part in parts if type(part).__name__.startswith("DeepseekV2"))
