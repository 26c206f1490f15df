"""Packs the routed experts of a model, and makes stacked weights of them again."""

from transformers import PreTrainedModel

from ..compat.peft import has_merged_adapters
from ..compat.torch import become
from ..experts.moe import STACKED, DeepseekV2Experts, check_plain
from ..experts.packed import PackedExperts
from ..modeling_deepseek_v2 import moe_layers


def pack_experts(model: PreTrainedModel, bits: int = 4) -> None:
    """Packs the routed experts of `model` in 8 bits or in 4 (NF4), with a scale per 64 elements of a row.

    What remains of them is 0.52 or 0.27 of bfloat16; more where 64 does not divide their widths. They are frozen from
    then on; adapters go on top, made before or after. Save the adapters: a packed model is saved by nothing else.
    `unpack_experts` makes stacked weights again, rounded as they were packed; merging adapters into experts does, too.

    Raises ValueError for other `bits`, and for experts that are not plain or not there or have adapters merged, before
    anything is changed.
    """
    if bits not in (8, 4):
        raise ValueError(f"experts are packed in 8 or 4 bits, got {bits!r}.")
    found = []
    for moe in moe_layers(model).values():
        # adapters may stand around them
        experts, *copies = [module for module in moe.modules() if isinstance(module, DeepseekV2Experts)]
        if copies:
            raise ValueError("expected experts that are frozen, and peft trains a copy of them (modules_to_save).")
        if any(has_merged_adapters(module) for module in moe.experts.modules()):
            raise ValueError(
                "expected experts without merged adapters; call unmerge_adapter or merge_and_unload first."
            )
        check_plain(experts)
        found.append(experts)
    for experts in found:
        if any(getattr(experts, name).shape[-1] % 2 for name in STACKED):
            raise ValueError("experts of an odd width cannot be packed in pairs.")
    for experts in found:
        become(experts, PackedExperts)
        experts.pack(bits)


def unpack_experts(model: PreTrainedModel) -> None:
    """Gives packed experts stacked weights again, as rounded; then adapters can be merged and the model saved."""
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.unpack()
