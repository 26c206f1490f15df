"""What this package leans on in peft beyond its documented interface, each thing once (peft 0.20 to 0.21).

Layers are told by the names of their classes, since a checkpoint's own code must load where peft is not installed.
tests/test_compat.py holds a canary for each thing said here.
"""

import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from .compat_accelerate import is_offloaded, keep_changed, lost_its_hooks, stand_ins


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


def acts_on_some_tokens(layer: nn.Module) -> bool:
    """Whether an activated LoRA (aLoRA) is at work, which finds its tokens by their place from the end."""
    if getattr(layer, "disable_adapters", True):
        return False
    kinds = getattr(layer, "lora_variant", {})
    activated = [name for name, kind in kinds.items() if type(kind).__name__ == "ALoraLinearVariant"]
    # of mixed batches, a hook says which adapters are at work
    is_mixed = bool(layer._forward_pre_hooks)
    return bool(activated) and (is_mixed or any(name in layer.active_adapters for name in activated))


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


def adapt_offloaded(model_class: type, experts_class: type) -> None:
    """Has peft make LoRA for layers of these models that lie on disk, or elsewhere, where accelerate computes them.

    peft makes it where the weight is, and of one that is only there during a call there is nothing but its shape: the
    factors came to nothing, and torch's products on a CPU read any memory in their place. And what it merges into
    offloaded experts was forgotten, since it looks for accelerate's hook one layer above. Models of other classes are
    left as they are.
    """
    tuner = import_module("peft.tuners.tuners_utils").BaseTuner
    inject = tuner.inject_adapter
    if hasattr(inject, "__wrapped__"):
        return

    @functools.wraps(inject)
    def inject_where_computed(self, model, adapter_name, *args, **kwargs):
        if not isinstance(model, model_class):
            return inject(self, model, adapter_name, *args, **kwargs)
        if any(isinstance(module, experts_class) and lost_its_hooks(module, model) for module in model.modules()):
            raise ValueError(
                "expected layers that accelerate brings in from disk, and PeftModel.from_pretrained has taken its "
                "hooks off; open the model again and call model.load_adapter(folder) instead."
            )
        with stand_ins(model) as some_are_away:
            if some_are_away and not _reads_no_weights(self.peft_config[adapter_name]):
                raise ValueError(
                    "expected plain LoRA for a model with layers on disk or offloaded, since other adapters read the "
                    "weights when they are made; load the model with a device_map that offloads none."
                )
            return inject(self, model, adapter_name, *args, **kwargs)

    tuner.inject_adapter = inject_where_computed
    wrapper = import_module("peft.tuners.lora.layer").ParamWrapper
    wrapper.merge = _and_kept(wrapper.merge, experts_class)
    wrapper.unmerge = _and_kept(wrapper.unmerge, experts_class)


def _reads_no_weights(config: Any) -> bool:
    plainly = (True, False, None, "gaussian")
    return config.peft_type == "LORA" and not config.use_dora and config.init_lora_weights in plainly


def _and_kept(change: Callable, experts_class: type) -> Callable:
    """Merging into a parameter, or taking that back."""

    @functools.wraps(change)
    def change_and_keep(self, *args, **kwargs):
        experts = self.get_base_layer()
        is_away = isinstance(experts, experts_class) and is_offloaded(experts)
        if is_away and self.get_param().is_meta:
            raise ValueError("expected offloaded experts to be brought in; merge by methods of peft's model.")
        change(self, *args, **kwargs)
        if is_away:
            keep_changed(experts)

    return change_and_keep
