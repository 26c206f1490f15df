"""What this package leans on in peft beyond its documented interface, each thing once (peft 0.20 to 0.21).

Layers are told by the names of their classes, since a checkpoint's own code must load where peft is not installed.
tests/compat/test_canaries.py holds a canary for each thing said here.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from .accelerate import is_offloaded, keep_changed, loads_whole_blocks, stand_ins, without_device_map


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
    if convert is None or hasattr(convert, "for_models_of"):
        return

    @functools.wraps(convert)
    def convert_others(peft_config, model) -> None:
        if not isinstance(model, model_class):
            convert(peft_config, model)

    convert_others.for_models_of = model_class
    conversion._convert_peft_config_moe = convert_others


def adapt_offloaded(model_class: type, experts_class: type) -> None:
    """Has peft make LoRA for layers of these models that lie on disk, or elsewhere, where accelerate computes them.

    peft makes it where the weight is, and of one that is only there during a call there is nothing but its shape: the
    factors came to nothing, and torch's products on a CPU read any memory in their place. Where it loads one, it takes
    accelerate's hooks off and looks for the files' names among modules, of which experts are none. And what it merges
    into offloaded experts was forgotten, since it looks for accelerate's hook one layer above. Models of other classes
    are left as they are, except that merging into a weight that is not there is refused for them too.
    """
    tuner = import_module("peft.tuners.tuners_utils").BaseTuner
    inject = tuner.inject_adapter
    if hasattr(inject, "for_models_of"):
        return
    peft = import_module("peft")
    for kind in (peft.PeftModel, peft.PeftMixedModel):
        kind.from_pretrained = classmethod(_as_it_is_dispatched(kind.from_pretrained.__func__, model_class))
    peft.PeftModel.load_adapter = _as_it_is_dispatched(peft.PeftModel.load_adapter, model_class)

    @functools.wraps(inject)
    def inject_where_computed(self, model, adapter_name, *args, **kwargs):
        if not isinstance(model, model_class):
            return inject(self, model, adapter_name, *args, **kwargs)
        with stand_ins(model) as some_are_away:
            if some_are_away:
                _check_can_be_made_without_weights(self.peft_config[adapter_name], model)
            return inject(self, model, adapter_name, *args, **kwargs)

    inject_where_computed.for_models_of = model_class
    tuner.inject_adapter = inject_where_computed
    layers = import_module("peft.tuners.lora.layer")
    for layer_class in (layers.Linear, layers.ParamWrapper):
        layer_class.merge = _where_weights_are(layer_class.merge, experts_class)
        layer_class.unmerge = _where_weights_are(layer_class.unmerge, experts_class)


def _as_it_is_dispatched(load: Callable, model_class: type) -> Callable:
    """Loading an adapter, which leaves the hooks of accelerate where they are."""

    @functools.wraps(load)
    def load_as_it_is(*args, **kwargs):
        # of a class method the model is the second argument, or has a name
        candidates = [one for one in (*args[:2], kwargs.get("model")) if isinstance(one, nn.Module)]
        bases = [one.get_base_model() if hasattr(one, "get_base_model") else one for one in candidates]
        model = next((base for base in bases if isinstance(base, model_class)), None)
        with nullcontext() if model is None else without_device_map(model):
            return load(*args, **kwargs)

    return load_as_it_is


def _check_can_be_made_without_weights(config: Any, model: nn.Module) -> None:
    """Refuses adapters that would be made of numbers that are not there, while some weights lie elsewhere."""
    plainly = (True, False, None, "gaussian")
    is_plain = config.peft_type == "LORA" and not config.use_dora and config.init_lora_weights in plainly
    if not is_plain or config.trainable_token_indices:
        raise ValueError(
            "expected plain LoRA for a model with layers on disk or offloaded, and this adapter may be made of the "
            "weights; load the model with a device_map that offloads none."
        )
    copied = set(config.modules_to_save or ())
    away = [name for name, module in model.named_modules() if is_offloaded(module) and copied & {*name.split(".")}]
    if away:
        raise ValueError(
            f"expected modules_to_save that are in memory, and {away[0]} is on disk or offloaded; load the model with "
            "a device_map that keeps it."
        )
    if loads_whole_blocks(model):
        raise ValueError(
            "expected hooks that bring in each layer's own weights, and some bring in whole blocks, in which they find "
            "no adapter; dispatch the model without preload_module_classes."
        )


def _where_weights_are(change: Callable, experts_class: type) -> Callable:
    """Merging, or taking that back: refused where the weight is elsewhere, and kept for later where it was fetched.

    peft fetches weights for its own methods, and looks for accelerate's hook one layer above, so that of experts what
    was merged would be forgotten. Where a merged adapter is disabled, it takes merging back at the next call, before
    the weight is fetched, and would subtract from nothing.
    """

    @functools.wraps(change)
    def change_and_keep(self, *args, **kwargs):
        base = self.get_base_layer()
        is_away = is_offloaded(base)
        if is_away and any(weight.is_meta for weight in base.parameters(recurse=False)):
            raise ValueError(
                "expected an offloaded layer to be brought in for merging, or for taking it back as a disabled adapter "
                "does; use the methods of peft's model, such as unmerge_adapter."
            )
        change(self, *args, **kwargs)
        if is_away and isinstance(base, experts_class):
            keep_changed(base)

    return change_and_keep
