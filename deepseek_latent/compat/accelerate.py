"""What this package uses of accelerate beyond its documented interface, each thing once (accelerate 1.10 to 1.15).

With a `device_map`, accelerate puts a hook around every module: it replaces `forward` on the instance, keeps the old
one in `_old_forward`, and moves inputs, outputs or weights between devices.
tests/compat/test_accelerate.py has a test for each thing that is used here, which fails when a release changes it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from .bound_functions import is_equivalent_forward

# ---- Hooks -----------------------------------------------------------------------------------------------------------


def forward_inside_hooks(module: nn.Module) -> Callable:
    """The `forward` that accelerate's hooks wrap, if they only move inputs and weights; else `module.forward` as it is.

    A model that was dispatched to several devices has such hooks on every module, also on those that never move.
    """
    forward = module.forward
    is_of_a_hook = isinstance(forward, partial) and forward.func.__module__ == "accelerate.hooks"
    if is_of_a_hook and all(_only_moves_inputs_and_weights(hook) for hook in _hooks_of(module)):
        return module._old_forward
    return forward


def is_equivalent_inside_hooks(module: nn.Module) -> bool:
    """Whether a module computes what its class does, apart from hooks that move inputs and weights."""
    return is_equivalent_forward(module, forward_inside_hooks(module))


def _hooks_of(module: nn.Module) -> list[Any]:
    hook = module._hf_hook
    return list(hook.hooks) if type(hook).__name__ == "SequentialHook" else [hook]


def _only_moves_inputs_and_weights(hook: Any) -> bool:
    # other hooks cast weights, share them between models, or move outputs back
    return type(hook).__name__ == "AlignDevicesHook" and not hook.io_same_device


# ---- Offloaded weights -----------------------------------------------------------------------------------------------


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own weights are on disk or on another device between its calls."""
    return bool(_offloading_hooks(module))


def _offloading_hooks(module: nn.Module) -> list[Any]:
    hooks = _hooks_of(module) if "_hf_hook" in vars(module) else []
    return [hook for hook in hooks if getattr(hook, "offload", False)]


def has_block_hooks(model: nn.Module) -> bool:
    """Whether any hook fetches the weights of all submodules of its module by name (`preload_module_classes`)."""
    return any(hook.place_submodules for module in model.modules() for hook in _offloading_hooks(module))


def lacks_weights(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether own weights of these names exist nowhere: neither in the module nor where a hook would fetch them."""
    if not any(getattr(module, name).is_meta for name in names):
        return False
    if "_hf_hook" not in vars(module):
        return "forward" not in vars(module)
    maps = [hook.weights_map for hook in _hooks_of(module) if getattr(hook, "weights_map", None) is not None]
    # a map for the whole model has full parameter names
    return bool(maps) and not any(key.rpartition(".")[2] in names for weights in maps for key in weights)


def weights_here(module: nn.Module) -> AbstractContextManager:
    """Fetches the offloaded weights of a module and of the layer inside its adapters, as calling it would."""
    offloaded = []
    while module is not None:
        if is_offloaded(module):
            offloaded.append(module)
        module = module._modules.get("base_layer")
    return _fetched(offloaded) if offloaded else nullcontext()


@contextmanager
def _fetched(offloaded: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in offloaded:
            module._hf_hook.pre_forward(module)
            stack.callback(module._hf_hook.post_forward, module, None)
        yield


def keep_fetched_weights(module: nn.Module) -> None:
    """Keeps changes to the fetched weights of an offloaded module for its later calls."""
    weights = {name: weight.detach().cpu() for name, weight in module.named_parameters(recurse=False)}
    for hook in _offloading_hooks(module):
        hook.weights_map = weights


@contextmanager
def placeholder_weights(model: nn.Module) -> Iterator[bool]:
    """Puts placeholders of NaN, which take no memory, on the devices that compute offloaded layers.

    Yields whether any weight is offloaded.
    """
    replaced = []
    for module in filter(is_offloaded, model.modules()):
        device = _offloading_hooks(module)[0].execution_device
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta and weight.is_floating_point():
                replaced.append((module, name, weight))
                nan = torch.full((), torch.nan, dtype=weight.dtype, device=device).expand(weight.shape)
                module._parameters[name] = nn.Parameter(nan, weight.requires_grad)
    try:
        yield bool(replaced)
    finally:
        for module, name, weight in replaced:
            module._parameters[name] = weight.requires_grad_(module._parameters[name].requires_grad)


# ---- The device map --------------------------------------------------------------------------------------------------


@contextmanager
def hidden_device_map(model: nn.Module) -> Iterator[None]:
    """Hides `hf_device_map` from code that would remove the hooks and dispatch the model again."""
    device_map = vars(model).pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map


@contextmanager
def device_map_without_offloading(model: nn.Module) -> Iterator[None]:
    """Maps offloaded layers to the device that computes them: the first that is neither "cpu" nor "disk"."""
    device_map = getattr(model, "hf_device_map", None)
    if device_map is None:
        yield
        return
    first = next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")
    model.hf_device_map = {name: first if device in ("cpu", "disk") else device for name, device in device_map.items()}
    try:
        yield
    finally:
        model.hf_device_map = device_map
