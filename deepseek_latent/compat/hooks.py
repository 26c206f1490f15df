"""Whether calling a module may do something else than its class does, so that its weights alone do not tell the result.

Our own equivalent functions (`bound_functions`) compute what the class does.
"""

from torch import nn

from .accelerate import is_equivalent_inside_hooks
from .bound_functions import is_equivalent_forward
from .torch import has_forward_hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks or a replaced `forward` may change what calling the module computes."""
    return has_forward_hooks(module) or has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether `forward` was replaced on the instance by a function that may compute something else."""
    forward = vars(module).get("forward")
    return forward is not None and not (is_equivalent_forward(module, forward) or is_equivalent_inside_hooks(module))
