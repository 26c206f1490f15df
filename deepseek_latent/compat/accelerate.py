"""What this package leans on in accelerate beyond its documented interface, each thing once (accelerate 1.10 to 1.15).

`device_map` has accelerate put a hook around every module: it replaces `forward` on the instance, keeps the old one in
`_old_forward`, and moves inputs, outputs or weights.
tests/compat/test_canaries.py holds a canary for each thing said here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from .bound_functions import is_equivalent_forward


def forward_inside_hooks(module: nn.Module) -> Callable:
    """The `forward` that hooks call once all weights are there, if they only align devices; else the outermost one.

    Such hooks bring inputs to where the module is, or weights from elsewhere, and do nothing else. They are on every
    module of a model that was dispatched to several devices, also on those that never move.
    """
    forward = module.forward
    is_of_a_hook = isinstance(forward, partial) and forward.func.__module__ == "accelerate.hooks"
    if is_of_a_hook and all(_aligns_devices(hook) for hook in _hooks_of(module)):
        return module._old_forward
    return forward


def keeps_its_meaning(module: nn.Module) -> bool:
    """True if the `forward` that a module has does what its class says, once all weights are there."""
    return is_equivalent_forward(module, forward_inside_hooks(module))


def _hooks_of(module: nn.Module) -> list[Any]:
    hook = module._hf_hook
    return list(hook.hooks) if type(hook).__name__ == "SequentialHook" else [hook]


def _aligns_devices(hook: Any) -> bool:
    # of another kind are hooks that cast weights, share them between models, or bring outputs back
    return type(hook).__name__ == "AlignDevicesHook" and not hook.io_same_device


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own weights lie elsewhere between its calls."""
    return bool(_offloading_hooks(module))


def _offloading_hooks(module: nn.Module) -> list[Any]:
    hooks = _hooks_of(module) if "_hf_hook" in vars(module) else []
    return [hook for hook in hooks if getattr(hook, "offload", False)]


def keep_changed(module: nn.Module) -> None:
    """Has the weights of an offloaded module, changed while they are here, come back as they are now."""
    weights = {name: weight.detach().cpu() for name, weight in module.named_parameters(recurse=False)}
    for hook in _offloading_hooks(module):
        hook.weights_map = weights


def loads_whole_blocks(model: nn.Module) -> bool:
    """Whether some hook brings in the weights of all modules inside its own by their names (preload_module_classes)."""
    return any(hook.place_submodules for module in model.modules() for hook in _offloading_hooks(module))


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[bool]:
    """Has weights that lie elsewhere look as if they were where they are computed; gives whether there are any.

    They have no memory of their own, and what is read of them is not a number.
    """
    own = []
    for module in filter(is_offloaded, model.modules()):
        device = _offloading_hooks(module)[0].execution_device
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta and weight.is_floating_point():
                own.append((module, name, weight))
                nothing = torch.full((), torch.nan, dtype=weight.dtype, device=device).expand(weight.shape)
                module._parameters[name] = nn.Parameter(nothing, weight.requires_grad)
    try:
        yield bool(own)
    finally:
        for module, name, weight in own:
            module._parameters[name] = weight.requires_grad_(module._parameters[name].requires_grad)


@contextmanager
def without_device_map(model: nn.Module) -> Iterator[None]:
    """Hides where layers lie from who would take the hooks off and dispatch the model anew."""
    placed = vars(model).pop("hf_device_map", None)
    try:
        yield
    finally:
        if placed is not None:
            model.hf_device_map = placed


@contextmanager
def placed_where_computed(model: nn.Module) -> Iterator[None]:
    """Has `hf_device_map` say of offloaded layers where they are computed: on the first device that does."""
    placed = getattr(model, "hf_device_map", None)
    if placed is None:
        yield
        return
    first = next((device for device in placed.values() if device not in ("cpu", "disk")), "cpu")
    model.hf_device_map = {name: first if device in ("cpu", "disk") else device for name, device in placed.items()}
    try:
        yield
    finally:
        model.hf_device_map = placed


def lacks_weights(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether some of a module's own weights of these names lie nowhere: not here, and where a hook fetches them."""
    if not any(getattr(module, name).is_meta for name in names):
        return False
    if "_hf_hook" not in vars(module):
        return "forward" not in vars(module)
    maps = [hook.weights_map for hook in _hooks_of(module) if getattr(hook, "weights_map", None) is not None]
    # a map of the whole model has names of the whole model
    return bool(maps) and not any(key.rpartition(".")[2] in names for one in maps for key in one)


def weights_here(module: nn.Module) -> AbstractContextManager:
    """Has the weights of a module, also of one inside adapters, lie where they are used, as while it is called."""
    offloaded = []
    while module is not None:
        if is_offloaded(module):
            offloaded.append(module)
        module = module._modules.get("base_layer")
    return _brought_here(offloaded) if offloaded else nullcontext()


@contextmanager
def _brought_here(offloaded: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for inner in offloaded:
            inner._hf_hook.pre_forward(inner)
            stack.callback(inner._hf_hook.post_forward, inner, None)
        yield
