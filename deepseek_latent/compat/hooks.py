"""Whether calling a module does more than its class says: then reading its weights would leave something out."""

from torch import nn

from .accelerate import keeps_its_meaning
from .torch import has_forward_hooks


def has_hooks(module: nn.Module) -> bool:
    return has_forward_hooks(module) or has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether `forward` was replaced on the instance by what does more than the class."""
    return "forward" in vars(module) and not keeps_its_meaning(module)
