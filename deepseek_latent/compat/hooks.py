"""Tells whether hooks or a replaced `forward` change what calling a module does.

Then the weight alone does not tell the effect. Our own equivalent kernels (`bound_functions`) change nothing.
"""

from torch import nn

from .accelerate import keeps_its_meaning
from .bound_functions import is_equivalent_forward
from .torch import has_forward_hooks


def has_hooks(module: nn.Module) -> bool:
    return has_forward_hooks(module) or has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """True if `forward` was replaced on the instance, and the replacement does not do what the class says."""
    forward = vars(module).get("forward")
    return forward is not None and not (is_equivalent_forward(module, forward) or keeps_its_meaning(module))
