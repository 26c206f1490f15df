"""What this package changes in peft (0.20 and 0.21), for its own models only.

tests/compat/test_peft.py has a test for each entry.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from contextvars import ContextVar
from importlib import import_module
from itertools import product
from typing import Any

from safetensors import SafetensorError
from torch import nn

from .accelerate import has_block_hooks, hidden_device_map, is_offloaded, keep_fetched_weights, placeholder_weights
from .peft_config import is_target_module


def prevent_target_renaming(model_class: type) -> None:
    """Keeps peft from renaming the targets of these models' adapters, both new and loaded ones.

    For any model of type "deepseek_v2", peft takes `gate_proj`, `up_proj` and `down_proj` for the routed experts of
    transformers 4, and drops the dense and shared MLPs with these names (github.com/huggingface/peft/issues/3711). It
    does so before it looks at any module. So one function of peft is replaced by one that checks the model's class
    first; the adapters of other classes, including transformers' own, are converted as before.

    A peft without that function (huggingface/peft#3715 removes it) is left as it is.
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


def support_offloading(model_class: type, experts_class: type) -> None:
    """Lets peft add, load and merge LoRA on layers of these models whose weights are offloaded, for example to disk.

    Without it, three things go wrong. peft creates an adapter on the device of the weight, and that of an offloaded
    weight is "meta": so the factors have no values, and torch's products on a CPU read arbitrary memory. When peft
    loads an adapter, it removes accelerate's hooks and looks for the names of tensors in files among the modules, where
    the names of experts differ. And when it merges into offloaded experts, it looks for accelerate's hook one layer
    above, so the result is lost. Models of other classes behave as before, except that merging into an absent weight is
    refused.
    """
    tuner = import_module("peft.tuners.tuners_utils").BaseTuner
    inject = tuner.inject_adapter
    if hasattr(inject, "for_models_of"):
        return
    peft = import_module("peft")
    for kind in (peft.PeftModel, peft.PeftMixedModel):
        kind.from_pretrained = classmethod(_keeping_hooks(kind.from_pretrained.__func__, model_class))
    peft.PeftModel.load_adapter = _keeping_hooks(peft.PeftModel.load_adapter, model_class)

    @functools.wraps(inject)
    def inject_where_computed(self, model, adapter_name, *args, **kwargs):
        if not isinstance(model, model_class):
            return inject(self, model, adapter_name, *args, **kwargs)
        with placeholder_weights(model) as has_offloaded:
            if has_offloaded:
                _check_needs_no_weights(self.peft_config[adapter_name], model)
            return inject(self, model, adapter_name, *args, **kwargs)

    inject_where_computed.for_models_of = model_class
    tuner.inject_adapter = inject_where_computed
    layers = import_module("peft.tuners.lora.layer")
    for layer_class in (layers.Linear, layers.ParamWrapper):
        layer_class.merge = _with_fetched_weights(layer_class.merge, experts_class)
        layer_class.unmerge = _with_fetched_weights(layer_class.unmerge, experts_class)


def _keeping_hooks(load: Callable, model_class: type) -> Callable:
    """Wraps a function that loads an adapter, so that accelerate's hooks stay on the model."""

    @functools.wraps(load)
    def load_and_keep_hooks(*args, **kwargs):
        # the model is the first argument, the second of a class method, or a keyword
        candidates = [value for value in (*args[:2], kwargs.get("model")) if isinstance(value, nn.Module)]
        bases = [value.get_base_model() if hasattr(value, "get_base_model") else value for value in candidates]
        model = next((base for base in bases if isinstance(base, model_class)), None)
        with nullcontext() if model is None else hidden_device_map(model):
            return load(*args, **kwargs)

    return load_and_keep_hooks


def check_no_expert_dropped(dropped: Iterable[str]) -> None:
    """Raises ValueError if one of these tensors of an adapter, which no layer takes, is of routed experts."""
    check_no_lora_dropped(name for name in dropped if ".mlp.experts." in name)


def check_no_lora_dropped(dropped: Iterable[str]) -> None:
    """Raises ValueError if one of these tensors for routed experts, which no layer takes, is of an adapter."""
    name = next((name for name in dropped if ".lora_" in f".{name}"), None)
    if name is not None:
        raise ValueError(
            f"this adapter has weights for routed experts ({name}) that its config does not name, so peft would drop "
            "them silently; if it has one matrix per expert, make a copy with stacked ones by deepseek-latent convert "
            "adapter SRC OUT."
        )


def refuse_single_experts(model_class: type, experts_class: type) -> None:
    """Has peft say how to convert an adapter that matches no module of these models but separate routed experts.

    Its own error lists hundreds of targets. What matches some modules is refused once its weights are read.
    """
    tuner = import_module("peft.tuners.tuners_utils").BaseTuner
    inject = tuner.inject_adapter
    if hasattr(inject, "refuses_single_experts"):
        return

    @functools.wraps(inject)
    def inject_or_explain(self, model, adapter_name, *args, **kwargs):
        try:
            return inject(self, model, adapter_name, *args, **kwargs)
        except ValueError as error:
            name = None
            if isinstance(model, model_class):
                name = _single_expert_targeted(self.peft_config[adapter_name], model, experts_class)
            if name is None:
                raise
            raise ValueError(
                f"expected an adapter for stacked routed experts, and this one targets single ones ({name}); make a "
                "copy with stacked ones by deepseek-latent convert adapter SRC OUT, or for a new adapter use "
                "lora_config(model, routed_experts=True)."
            ) from error

    inject_or_explain.refuses_single_experts = True
    tuner.inject_adapter = inject_or_explain


def _single_expert_targeted(config: Any, model: nn.Module, experts_class: type) -> str | None:
    """A projection of a routed expert, by its name as a module of transformers 4, if only such names are targeted."""
    if config.peft_type != "LORA" or not config.target_modules:
        return None
    if any(is_target_module(config, name) for name, _ in model.named_modules()):
        return None
    # peft's wrappers stand between a module's name and that of its experts
    places = [name.replace(".base_layer", "") for name, x in model.named_modules() if isinstance(x, experts_class)]
    parts = product(places, range(model.config.n_routed_experts), ("gate_proj", "up_proj", "down_proj"))
    return next((name for name in (f"{a}.{i}.{b}" for a, i, b in parts) if is_target_module(config, name)), None)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter that transformers loaded off the layers of `model`, which peft's wrappers still surround."""
    import_module("peft.functional").delete_adapter(model, adapter_name=name, prefix="lora_")
    del model.peft_config[name]


# the adapter that PeftModel.from_pretrained adds before it calls load_adapter; None if the model had one of that name
_added_first: ContextVar[str | None] = ContextVar("_added_first", default=None)


def remove_refused_adapters(model_class: type) -> None:
    """Has peft take an adapter off these models again if its weights cannot be loaded.

    peft adds the layers of an adapter before it reads the weights, so a refused one would stay on the model and act. An
    adapter that was on the model before stays there.
    """
    peft, tuner = import_module("peft"), import_module("peft.tuners.tuners_utils").BaseTuner
    load, make = peft.PeftModel.load_adapter, peft.PeftModel.from_pretrained.__func__
    if hasattr(load, "removes_refused"):
        return

    @functools.wraps(make)
    def make_and_name_added(cls, model, model_id, adapter_name="default", *args, **kwargs):
        is_new = adapter_name not in getattr(model, "peft_config", {})
        token = _added_first.set(adapter_name if is_new else None)
        try:
            return make(cls, model, model_id, adapter_name, *args, **kwargs)
        finally:
            _added_first.reset(token)

    @functools.wraps(load)
    def load_or_remove(self, model_id, adapter_name, *args, **kwargs):
        is_ours = isinstance(self.base_model, tuner) and isinstance(self.get_base_model(), model_class)
        is_new = adapter_name not in self.peft_config or adapter_name == _added_first.get()
        try:
            result = load(self, model_id, adapter_name, *args, **kwargs)
            if is_ours:
                check_no_expert_dropped(result.unexpected_keys)
            return result
        except (ValueError, RuntimeError, OSError, SafetensorError):
            if is_ours and is_new and self.peft_config.keys() == {adapter_name}:
                self.base_model.unload()
            elif is_ours and is_new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise

    load_or_remove.removes_refused = True
    peft.PeftModel.load_adapter = load_or_remove
    peft.PeftModel.from_pretrained = classmethod(make_and_name_added)


def _check_needs_no_weights(config: Any, model: nn.Module) -> None:
    """Refuses adapters that are made from weights, since some weights of this model are offloaded."""
    is_plain = (
        config.peft_type == "LORA"
        and not config.use_dora
        and config.init_lora_weights in (True, False, None, "gaussian")
    )
    if not is_plain or config.trainable_token_indices:
        raise ValueError(
            "expected plain LoRA for a model with layers on disk or offloaded, and this adapter may be made from the "
            "weights; load the model with a device_map that offloads none."
        )
    copied = set(config.modules_to_save or ())
    offloaded = [name for name, module in model.named_modules() if is_offloaded(module) and copied & {*name.split(".")}]
    if offloaded:
        raise ValueError(
            f"expected modules_to_save that are in memory, and {offloaded[0]} is on disk or offloaded; load the model "
            "with a device_map that keeps it in memory."
        )
    if has_block_hooks(model):
        raise ValueError(
            "expected hooks that fetch each layer's own weights, and some fetch whole blocks by names that no adapter "
            "has; dispatch the model without preload_module_classes."
        )


def _with_fetched_weights(change: Callable, experts_class: type) -> Callable:
    """Wraps merging or unmerging: it is refused if the weight is absent, and its result is kept if it was fetched.

    peft fetches weights in its own methods, but looks for accelerate's hook one layer above experts, so a merge into
    them would be lost. If a merged adapter is disabled, peft unmerges it at the next call, before it fetches the weight
    to subtract it from.
    """

    @functools.wraps(change)
    def change_and_keep(self, *args, **kwargs):
        if getattr(self, "is_split", False):
            raise ValueError(
                "expected a model in one process to merge an adapter into, and this one is split over processes; save "
                "the adapter, and merge it into a model that is loaded without distributed_config."
            )
        base = self.get_base_layer()
        was_offloaded = is_offloaded(base)
        if was_offloaded and any(weight.is_meta for weight in base.parameters(recurse=False)):
            raise ValueError(
                "expected the weights of an offloaded layer to be fetched before an adapter is merged, or unmerged "
                "because it is disabled; use the methods of peft's model, such as unmerge_adapter."
            )
        weight = getattr(base, "weight", None)
        # peft would write into one number that looks like all of the weight
        if weight is not None and weight.dim() > 1 and weight.stride(-1) == 0:
            raise ValueError(
                "expected a weight to merge into, and this layer's was rounded to int8 by optimize_for_inference; "
                "merge the adapter before that, or load the model without weights='int8'."
            )
        change(self, *args, **kwargs)
        if was_offloaded and isinstance(base, experts_class):
            keep_fetched_weights(base)

    return change_and_keep
