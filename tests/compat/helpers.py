"""What the canaries share."""

import inspect

from torch import nn


def takes(function, *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


def linear() -> nn.Linear:
    return nn.Linear(4, 6, bias=False)
