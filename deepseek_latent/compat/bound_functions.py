"""Functions that replace methods on single modules, as Hugging Face's `kernels.kernelize` replaces `forward`.

The class of a module never changes. The function is bound by a `partial` in the module's `__dict__`, so that deepcopy
and pickle bind it to the copy of the module. A MethodType would not do: pickle stores it as its function's name, to be
looked up on the module.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn


def replaces_method(is_equivalent: bool = True) -> Callable[[Callable], Callable]:
    """Marks a function that `bind` may put in place of a method.

    It is equivalent if it computes what the method computes from the module's own weights. Then code that reads these
    weights, instead of calling the module, gets the same result.
    """

    def mark(function: Callable) -> Callable:
        function.is_equivalent = is_equivalent
        return function

    return mark


def bind(module: nn.Module, functions: Mapping[str, Callable], binding: type[partial] = partial) -> None:
    """Replaces methods of a module, by name, with functions of the module and the method's arguments.

    `binding` is `partial`, or a subclass of it for functions that a copy of the module must prepare first.
    If the module's own `forward` is kept elsewhere, as accelerate's hooks do in `_old_forward`, it is replaced there.
    """
    for name, function in functions.items():
        places = _places_of_forward(module) if name == "forward" else [name]
        for place in places or [name]:
            setattr(module, place, binding(function, module))


def _places_of_forward(module: nn.Module) -> list[str]:
    """The names in the module's `__dict__` that hold its own `forward`, or an equivalent function in its place."""
    return [
        name
        for name, value in vars(module).items()
        if (name == "forward" or not hasattr(type(module), name)) and is_equivalent_forward(module, value)
    ]


def unbind(module: nn.Module) -> None:
    """Gives a module the methods of its class again, also in places that keep its `forward`."""
    for name, value in [*vars(module).items()]:
        if not is_bound(value):
            continue
        if hasattr(type(module), name):
            delattr(module, name)
        else:
            setattr(module, name, MethodType(type(module).forward, module))


def is_bound(value: Any) -> bool:
    return isinstance(value, partial) and hasattr(value.func, "is_equivalent")


def has_bound_functions(module: nn.Module) -> bool:
    return any(is_bound(value) for value in vars(module).values())


def is_equivalent_forward(module: nn.Module, forward: Any) -> bool:
    """True if `forward` does what the class of `module` does: it is the method of the class, or equivalent to it."""
    if isinstance(forward, partial):
        if not getattr(forward.func, "is_equivalent", False):
            return False
        # a shallow copy of a module keeps what was bound to the original; dynamo cannot compare modules
        return torch.compiler.is_compiling() or forward.args[0] is module
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward
