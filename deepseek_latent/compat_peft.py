"""What this package leans on in peft beyond its documented interface, each thing once (peft 0.20 to 0.21).

Layers are told by the names of their classes, since a checkpoint's own code must load where peft is not installed.
tests/test_compat.py holds a canary for each thing said here.
"""

import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn


def is_lora_linear(module: nn.Module) -> bool:
    """Whether LoRA stands around a Linear, and no other method or kind of layer."""
    return _class_of(module) == ("peft.tuners.lora.layer", "Linear")


def is_lora_parameter(module: nn.Module) -> bool:
    """Whether LoRA stands around one parameter of a module (`target_parameters`)."""
    return _class_of(module) == ("peft.tuners.lora.layer", "ParamWrapper")


def _class_of(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def is_adapted(module: nn.Module) -> bool:
    """Whether a layer of any of peft's methods."""
    return hasattr(module, "merged_adapters")


def has_merged_adapters(module: nn.Module) -> bool:
    return bool(getattr(module, "merged_adapters", None))


class Adapter(NamedTuple):
    """What one LoRA adapter adds to a weight: scaling times the product of two factors, each a layer."""

    a: nn.Module
    b: nn.Module
    scaling: float


def acting_adapters(layer: nn.Module) -> list[Adapter] | None:
    """The adapters of a LoRA layer that act beside its base weight; None if only calling the layer can tell.

    Merged ones are part of the base weight, disabled ones act nowhere. peft takes merging back at the next call where
    an adapter is both merged and disabled; dropout at work and variants such as DoRA, aLoRA or rotated bases add no
    plain product.
    """
    if layer.merged:
        return None if layer.disable_adapters else []
    if layer.disable_adapters:
        return []
    adapters = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        # peft leaves new layers in training mode; without dropout that changes nothing
        drops = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
        if drops or name in layer.lora_variant or getattr(layer, "fan_in_fan_out", False):
            return None
        adapters.append(Adapter(layer.lora_A[name], layer.lora_B[name], layer.scaling[name]))
    return adapters


def stacked_factors(layer: nn.Module, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A [e rank in] and B [e out rank] of an adapter on a stacked parameter; kept expert by expert and rank by rank."""
    a = adapter.a.weight.unflatten(0, (layer.num_experts, -1))
    b = adapter.b.weight.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)
    return a, b


def adapter_state(layer: nn.Module) -> list[Any]:
    """Which adapters of a layer act, and how strongly: what its weights do not say."""
    numbers = {name: getattr(layer, name) for name in layer.other_param_names if hasattr(layer, name)}
    return [layer.active_adapter, layer.disable_adapters, layer.merged_adapters, numbers]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in model.named_modules() if is_adapted(layer))


def keep_targets_of(model_class: type) -> None:
    """Lets peft leave the targets of these models as they were written, when it makes an adapter and when it loads one.

    peft takes `gate_proj`, `up_proj` and `down_proj` of any "deepseek_v2" for the routed experts of transformers 4, and
    drops the dense and shared MLPs that have these names (github.com/huggingface/peft/issues/3711). It does so before
    it looks at any module, so one function of peft is replaced by one that asks for the model's class first; models of
    other classes, transformers' own among them, are converted as before.

    A peft without that function (huggingface/peft#3715 takes it away) is left as it is.
    TODO: drop it when a peft with that change is required.
    """
    conversion = import_module("peft.utils.transformers_weight_conversion")
    convert: Callable | None = getattr(conversion, "_convert_peft_config_moe", None)
    if convert is None or hasattr(convert, "__wrapped__"):
        return

    @functools.wraps(convert)
    def convert_others(peft_config, model) -> None:
        if not isinstance(model, model_class):
            convert(peft_config, model)

    conversion._convert_peft_config_moe = convert_others
