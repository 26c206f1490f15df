"""What peft (0.21) needs to add LoRA to a model of this package that processes share.

tests/compat/test_peft.py and tests/parallel/test_lora.py have the tests.
"""

import functools
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

from .expert_parallel import EPImplementationInterface
from .peft import adapted_layers
from .tensor_parallel import is_split


def support_several_processes(model_class: type) -> None:
    """Lets peft (0.21) add LoRA to these models' layers whose weights are split over processes.

    peft makes factors as wide as this process's part of a weight, also where transformers expects the whole width, so
    that the forward pass fails. For routed experts it looks for the weight of a linear layer, and fails; their factors
    stay whole, and each process uses its part (experts/adapters.py).

    Adapters of such a model are not merged: some layers would be, and others would fail. Nor are they added where FSDP
    and tensor parallelism divide one model: Trainer averages the gradients of whole factors only (5.24).
    """
    utils = import_module("peft.tuners.tuners_utils")
    tuner = utils.BaseTuner
    inject = tuner.inject_adapter
    if hasattr(inject, "splits_over_processes"):
        return

    @functools.wraps(inject)
    def inject_into_split_model(self, model, adapter_name, *args, **kwargs):
        if not isinstance(model, model_class) or getattr(model, "_device_mesh", None) is None:
            return inject(self, model, adapter_name, *args, **kwargs)
        _check_division(model.config.distributed_config)
        plan, looks_at_parts = model._tp_plan, utils._torch_supports_distributed
        model._tp_plan = {name: style for name, style in plan.items() if ".experts." not in name}
        utils._torch_supports_distributed = False
        try:
            result = inject(self, model, adapter_name, *args, **kwargs)
        finally:
            model._tp_plan, utils._torch_supports_distributed = plan, looks_at_parts
        for _, layer in adapted_layers(model):
            layer.is_split = True
        for name, factor in model.named_parameters():
            # peft sends the random factors of the first process to the others, but not those of experts
            if ".lora_" in name and f".{adapter_name}." in name and not is_split(factor) and not factor.is_meta:
                dist.broadcast(factor.data, src=0)
        return result

    inject_into_split_model.splits_over_processes = True
    tuner.inject_adapter = inject_into_split_model


def _check_division(division: Any) -> None:
    """Raises ValueError where adapters of a model that processes share would be wrong."""
    has_plans = hasattr(import_module("peft.tuners.lora.model"), "get_tp_plan_and_mesh")
    if EPImplementationInterface is None or not has_plans:
        raise ValueError(
            "expected transformers 5.23 and peft 0.21, or newer ones, for adapters of a model that is split over "
            f"processes, got {version('transformers')} and {version('peft')}; update them."
        )
    if division.tp_size > 1 and division.dp_size > 1:
        raise ValueError(
            "expected tp_size or fsdp_size for a model with adapters, and not both, got "
            f"tp_size={division.tp_size} and fsdp_size={division.fsdp_size}, with which Trainer would average only "
            "some gradients; load the model with fsdp_size to train, or with tp_size to generate."
        )
