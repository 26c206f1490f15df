"""What this package uses of peft beyond its documented interface, each thing once (peft 0.20 to 0.21).

Layers are recognized by the names of their classes, since a checkpoint's own code must load without peft installed.
tests/compat/test_peft.py has a test for each thing that is used here, which fails when a release changes it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

# ---- Kinds of layers -------------------------------------------------------------------------------------------------


def is_lora_linear(module: nn.Module) -> bool:
    """Whether this is a LoRA layer around a Linear, rather than another of peft's methods or kinds of layers."""
    return _class_of(module) == ("peft.tuners.lora.layer", "Linear")


def is_lora_parameter(module: nn.Module) -> bool:
    """Whether this is a LoRA layer around one parameter of a module (`target_parameters`)."""
    return _class_of(module) == ("peft.tuners.lora.layer", "ParamWrapper")


def _class_of(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def is_adapted(module: nn.Module) -> bool:
    """Whether this is an adapter layer of any of peft's methods."""
    return hasattr(module, "merged_adapters")


def has_merged_adapters(module: nn.Module) -> bool:
    return bool(getattr(module, "merged_adapters", None))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in model.named_modules() if is_adapted(layer))


# ---- What adapters add -----------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """What one LoRA adapter adds to a weight: `scaling` times B A, the product of two layers' weights."""

    a: nn.Module
    b: nn.Module
    scaling: float


def acting_adapters(layer: nn.Module) -> list[Adapter] | None:
    """The adapters of a LoRA layer that act beside its base weight; None if only calling the layer gives its result.

    Merged adapters are part of the base weight, and disabled ones do nothing. If an adapter is both merged and
    disabled, peft unmerges it at the next call. Active dropout and variants such as DoRA, aLoRA or rotated bases do
    not add a plain product.
    """
    if layer.merged:
        return None if layer.disable_adapters else []
    if layer.disable_adapters:
        return []
    adapters = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        # peft leaves new layers in training mode, which changes nothing without dropout
        has_dropout = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
        if has_dropout or name in layer.lora_variant or getattr(layer, "fan_in_fan_out", False):
            return None
        adapters.append(Adapter(layer.lora_A[name], layer.lora_B[name], layer.scaling[name]))
    return adapters


def acts_on_some_tokens(layer: nn.Module) -> bool:
    """Whether an activated LoRA (aLoRA) is active, which finds its tokens by their positions from the end."""
    if getattr(layer, "disable_adapters", True):
        return False
    variants = getattr(layer, "lora_variant", {})
    activated = [name for name, variant in variants.items() if type(variant).__name__ == "ALoraLinearVariant"]
    # in a batch with mixed adapters, a hook selects the adapter of each row
    is_mixed = bool(layer._forward_pre_hooks)
    return bool(activated) and (is_mixed or any(name in layer.active_adapters for name in activated))


def stacked_factors(layer: nn.Module, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A [e rank in] and B [e out rank] of an adapter on a stacked parameter.

    peft stores the rows of A expert by expert, and the columns of B rank by rank.
    """
    a = adapter.a.weight.unflatten(0, (layer.num_experts, -1))
    b = adapter.b.weight.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)
    return a, b


def adapter_state(layer: nn.Module) -> list[Any]:
    """What the weights of an adapter layer do not show: its settings, and which adapters are active or merged."""
    settings = {name: getattr(layer, name) for name in layer.other_param_names if hasattr(layer, name)}
    return [layer.active_adapter, layer.disable_adapters, layer.merged_adapters, settings]
