"""Recognizes DeepSeek-V2 of other classes than this package's: transformers' own, and code beside a checkpoint."""

from typing import Any

from torch import nn


def check_is_own_class(thing: Any) -> None:
    """Raises TypeError if `thing` is, or wraps, a model or config of DeepSeek-V2 that this package does not define.

    Anything else passes, other architectures included.
    """
    for part in thing.modules() if isinstance(thing, nn.Module) else [thing]:
        name, module = type(part).__name__, type(part).__module__
        if not name.startswith("DeepseekV2"):
            continue
        if module.startswith("transformers.models."):
            when = "from_pretrained" if isinstance(part, nn.Module) else "you make the config"
            raise TypeError(f"this is transformers' own {name}: import deepseek_latent before {when}.")
        if module.startswith("transformers_modules."):
            raise TypeError(
                f"this is the {name} of the code beside a checkpoint: import deepseek_latent, and load the checkpoint "
                "without trust_remote_code."
            )
