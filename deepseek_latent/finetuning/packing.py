"""Packs the routed experts of a model in 8 or 4 bits, and unpacks them to stacked weights."""

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..compat.other_classes import check_is_own_class
from ..compat.peft import has_merged_adapters
from ..compat.tensor_parallel import local_shape
from ..experts.names import STACKED
from ..experts.packed import PackedWeights
from ..experts.routed import DeepseekV2Experts, check_plain, check_stacked
from ..experts.weights import StackedWeights
from ..modeling_deepseek_v2 import moe_layers


def pack_experts(model: PreTrainedModel, bits: int = 4) -> None:
    """Packs the routed experts of `model` in 8 bits or in 4 (NF4), with one scale per 64 elements of a row.

    They take 0.52 or 0.27 of their memory in bfloat16, and more where 64 does not divide their widths. They are frozen
    from then on. Adapters may be added before or after. Save the adapter: a packed model cannot be saved as a whole.
    `unpack_experts` makes stacked weights again, with the values that packing rounded to; so does merging an adapter
    into the experts.

    Raises ValueError, before anything is changed, for other `bits`, and where the experts are missing, not plain, or
    have merged adapters.
    """
    if bits not in (8, 4):
        raise ValueError(f"experts are packed in 8 or 4 bits, got {bits!r}.")
    found = []
    for moe in moe_layers(model).values():
        # adapters may be wrapped around the experts
        experts, *copies = [module for module in moe.modules() if isinstance(module, DeepseekV2Experts)]
        if copies:
            raise ValueError(
                "expected experts that are frozen, and peft trains a copy of them; leave them out of modules_to_save."
            )
        if any(has_merged_adapters(module) for module in moe.experts.modules()):
            raise ValueError(
                "expected experts without merged adapters; call unmerge_adapter or merge_and_unload first."
            )
        # each process packs its part of what they share
        check = check_stacked if experts.weights.split else check_plain
        check(experts)
        if any(local_shape(getattr(experts, name))[-1] % 2 for name in STACKED):
            raise ValueError(
                "expected experts of even widths, since two elements are packed in a byte, got an odd width."
            )
        if bits == 4 and experts.weights.dtype == torch.float64:
            raise ValueError("expected experts of at most 32 bits to pack in 4, got torch.float64; convert the model.")
        found.append(experts)
    # as in huggingface_hub, None means no bar if stderr is not a terminal
    for experts in tqdm(found, f"packing experts in {bits} bits", disable=None, leave=False):
        experts.weights = PackedWeights(bits)


def unpack_experts(model: PreTrainedModel) -> None:
    """Makes stacked weights of packed experts, with the values that packing rounded to.

    Then adapters can be merged and the model saved. Raises TypeError for a DeepSeek-V2 of another class than this
    package's.
    """
    check_is_own_class(model)
    for module in model.modules():
        if isinstance(module, DeepseekV2Experts) and isinstance(module.weights, PackedWeights):
            module.weights = StackedWeights()
