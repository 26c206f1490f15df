"""What this package leans on in accelerate beyond its documented interface, each thing once (accelerate 1.10 to 1.15).

`device_map` has accelerate put a hook around every module: it replaces `forward` on the instance, keeps the old one in
`_old_forward`, and moves inputs, outputs or weights. tests/test_compat.py holds a canary for each thing said here.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from .compat_torch import is_forward_of_its_class


def keeps_its_meaning(module: nn.Module) -> bool:
    """Whether the `forward` that stands on the instance does what the class says, once all weights are there.

    So it is with hooks that bring inputs to where the module is, or weights from elsewhere, and nothing else: they are
    on every module of a model that was dispatched to several devices, also on those that never move.
    """
    forward = vars(module)["forward"]
    # what remains where hooks were removed
    if is_forward_of_its_class(module, forward):
        return True
    is_of_a_hook = isinstance(forward, partial) and forward.func.__module__ == "accelerate.hooks"
    return (
        is_of_a_hook
        and is_forward_of_its_class(module, module._old_forward)
        and all(_aligns_devices(hook) for hook in _hooks_of(module))
    )


def _hooks_of(module: nn.Module) -> list[Any]:
    hook = module._hf_hook
    return list(hook.hooks) if type(hook).__name__ == "SequentialHook" else [hook]


def _aligns_devices(hook: Any) -> bool:
    # of another kind are hooks that cast weights, share them between models, or bring outputs back
    return type(hook).__name__ == "AlignDevicesHook" and not hook.io_same_device


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own weights lie elsewhere between its calls."""
    return "_hf_hook" in vars(module) and any(getattr(hook, "offload", False) for hook in _hooks_of(module))


def weights_here(module: nn.Module) -> AbstractContextManager:
    """Has the weights of a module and of those inside it lie where they are used, as in a call of each."""
    offloaded = [inner for inner in module.modules() if is_offloaded(inner)]
    return _brought_here(offloaded) if offloaded else nullcontext()


@contextmanager
def _brought_here(offloaded: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for inner in offloaded:
            inner._hf_hook.pre_forward(inner)
            stack.callback(inner._hf_hook.post_forward, inner, None)
        yield
