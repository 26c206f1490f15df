"""The way to a model whose layers compute by our operators, and back."""

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import PreTrainedModel

from ..attention.attention import DeepseekV2Attention
from ..compat.accelerate import is_offloaded
from ..compat.hooks import has_own_forward
from ..compat.torch import become
from ..experts.moe import DeepseekV2MLP, DeepseekV2MoE
from ..experts.packed import PackedWeights
from ..experts.routed import DeepseekV2Experts
from ..experts.router import DeepseekV2MoEGate
from ..experts.weights import StackedWeights
from ..generation import LatentGenerationMixin
from ..modeling_deepseek_v2 import DeepseekV2DecoderLayer
from .cpu.experts import CpuExperts
from .cpu.int8 import Int8Linear, to_int8
from .cpu.layers import (
    DTYPES,
    SLOW_IN_TORCH,
    KernelAttention,
    KernelGate,
    KernelLinear,
    KernelMLP,
    KernelMoE,
    KernelRMSNorm,
)
from .cpu.library import load_operators, operators
from .gpu.replayed_steps import ReplayedSteps

REPLACEMENTS = {
    nn.Linear: KernelLinear,
    nn.RMSNorm: KernelRMSNorm,
    DeepseekV2MLP: KernelMLP,
    DeepseekV2MoE: KernelMoE,
    DeepseekV2MoEGate: KernelGate,
    DeepseekV2Attention: KernelAttention,
}
ORIGINALS = {ours: original for original, ours in REPLACEMENTS.items()}
GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# the router stays as it is: it is small, and decides
INT8 = (nn.Linear, DeepseekV2Experts)


def _is_tied(module: nn.Module, model: PreTrainedModel) -> bool:
    return getattr(module, "weight", None) is model.get_input_embeddings().weight


@dataclass(frozen=True, eq=False)
class Optimized:
    """What `optimize_for_inference` did; `undo()` takes it back."""

    instructions: str
    modules: tuple[nn.Module, ...]
    replaying: LatentGenerationMixin | None = None

    def undo(self) -> None:
        """Raises ValueError where weights are in int8: what was rounded away is gone."""
        if any(isinstance(module, Int8Linear) or _is_int8(module) for module in self.modules):
            raise ValueError("int8 weights cannot be undone; load the model again.")
        for module in self.modules:
            if isinstance(module, DeepseekV2Experts):
                module.weights.operators = None
            else:
                become(module, _kind_of(module))
        if self.replaying is not None:
            self.replaying.replayed_steps = None

    def __repr__(self) -> str:
        active = [type(module) for module in self.modules if _is_ours(module)]
        counts = Counter(kind.__name__.removeprefix("Kernel").removeprefix("Gpu") for kind in active)
        changed = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"Optimized({self.instructions}; {changed or 'nothing'})"


def optimize_for_inference(model: PreTrainedModel, weights: str | None = None, graphs: bool = False) -> Optimized:
    """Lets the layers of a model compute by our operators wherever no gradient is wanted.

    Weights, names and files stay as they are, and the operators read the weights where they lie: saving, loading,
    training, adapters and `state_dict` need no undoing. The first call on a machine takes half a minute to build them.

    On a CUDA device, few tokens over a `LatentCache` go through each decoder layer in a dozen launches. With `graphs`,
    `generate()` also takes a static cache where none is named, captures one step of decoding over it as a CUDA graph
    and replays that for every token.

    With `weights="int8"`, projections (but `kv_b_proj`) and experts are rounded to int8 with a scale per row and take
    half the memory of bfloat16. That cannot be undone; such a model gives the rounded weights when it is saved, cannot
    be trained, and adapters act on it but cannot be merged into it.

    Raises:
        RuntimeError: without a C++ compiler, or if it fails.
        TypeError: for what is no model.
        ValueError: for a model on another device or in another dtype than bfloat16 or float32 (on a CUDA device also
            float16), other `weights`, or what only the other kind of device has.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"expected a model of transformers or peft, got {type(model).__name__}.")
    if weights not in (None, "int8"):
        raise ValueError(f"weights must be None (as they are) or 'int8', got {weights!r}.")
    weight = model.get_input_embeddings().weight
    if weight.device.type == "cuda":
        return _optimize_for_gpu(model, weights, graphs)
    if graphs:
        raise ValueError(f"graphs=True captures CUDA graphs, and this model is on {weight.device}; move it to a GPU.")
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        raise ValueError(
            f"expected a model on the CPU in bfloat16 or float32, got {weight.dtype} on {weight.device}; load "
            "it with dtype=torch.bfloat16."
        )
    instructions = load_operators()
    if not operators.has_bfloat16_products():
        SLOW_IN_TORCH.add(torch.bfloat16)
    chosen = {name: module for name, module in model.named_modules() if _is_replaceable(name, module)}
    rounded = {
        name: module
        for name, module in chosen.items()
        if weights == "int8" and _kind_of(module) in INT8 and not _is_tied(module, model)
    }
    for name, module in rounded.items():
        _check_can_be_rounded(name, module)
    for name, module in chosen.items():
        if isinstance(module, DeepseekV2Experts):
            if name in rounded:
                module.weights = PackedWeights(8, None, saves_dense=True)
            module.weights.operators = CpuExperts
        elif name in rounded:
            to_int8(module)
        elif not has_own_forward(module):
            become(module, REPLACEMENTS[_kind_of(module)])
    ours = (*ORIGINALS, Int8Linear)
    return Optimized(
        instructions, tuple(module for module in model.modules() if type(module) in ours or _has_operators(module))
    )


def _optimize_for_gpu(model: PreTrainedModel, weights: str | None, graphs: bool) -> Optimized:
    if weights is not None:
        raise ValueError("weights='int8' is for models on the CPU; leave it out on a GPU.")
    dtype = model.get_input_embeddings().weight.dtype
    if dtype not in GPU_DTYPES:
        raise ValueError(
            f"expected a model in bfloat16, float16 or float32 on a GPU, got {dtype}; load it in one of these."
        )
    if find_spec("triton") is None:
        raise RuntimeError("expected Triton, which CUDA builds of torch install beside them, and found none.")
    replaying = _what_can_be_replayed(model) if graphs else None
    from .gpu.layers import GpuDecoderLayer

    layers = [module for module in model.modules() if type(module) in (DeepseekV2DecoderLayer, GpuDecoderLayer)]
    for layer in layers:
        if not has_own_forward(layer):
            become(layer, GpuDecoderLayer)
    if replaying is not None:
        replaying.replayed_steps = ReplayedSteps
    return Optimized("Triton", tuple(layers), replaying)


def _what_can_be_replayed(model: PreTrainedModel) -> LatentGenerationMixin:
    """The causal language model in `model`. Raises ValueError where no step of it could be captured."""
    if any(map(is_offloaded, model.modules())):
        raise ValueError(
            "expected all weights on the GPU, and some are fetched for each step, which no CUDA graph can do; "
            "leave out graphs=True, or load the model without offloading."
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"expected all weights on one GPU, where a CUDA graph is captured, and they are on {len(devices)} devices; "
            "leave out graphs=True."
        )
    found = next((module for module in model.modules() if isinstance(module, LatentGenerationMixin)), None)
    if found is None:
        raise ValueError(
            f"expected a model that generates, whose steps can be replayed, got {type(model).__name__}; leave out "
            "graphs=True."
        )
    return found


def _kind_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was optimised."""
    if type(module).__name__ == "GpuDecoderLayer":
        return DeepseekV2DecoderLayer
    return ORIGINALS.get(type(module), type(module))


def _is_ours(module: nn.Module) -> bool:
    return type(module) is Int8Linear or _has_operators(module) or _kind_of(module) is not type(module)


def _has_operators(module: nn.Module) -> bool:
    return isinstance(module, DeepseekV2Experts) and module.weights.operators is not None


def _is_int8(module: nn.Module) -> bool:
    return isinstance(module, DeepseekV2Experts) and isinstance(module.weights, PackedWeights)


def _is_replaceable(name: str, module: nn.Module) -> bool:
    kind = _kind_of(module)
    # absorption reads the weights of a bare kv_b_proj; adapters are small, and may go on being trained
    if isinstance(module, DeepseekV2Experts):
        return isinstance(module.weights, StackedWeights) and _is_readable(module)
    if kind not in REPLACEMENTS or "kv_b_proj" in name.split(".") or ".lora_" in name:
        return False
    return _is_readable(module)


def _is_readable(module: nn.Module) -> bool:
    # a quantizer's weights are its own to read
    if any(type(weight) is not nn.Parameter for weight in module.parameters(recurse=False)):
        return False
    return not hasattr(module, "act_fn") or type(module.act_fn) is type(ACT2FN["silu"])


def _check_can_be_rounded(name: str, module: nn.Module) -> None:
    """Refuses what would go on being multiplied by weights that are no longer there."""
    if any(weight.is_meta for weight in module.parameters(recurse=False)):
        raise ValueError(
            f"expected all weights in memory, and those of {name} are on disk or on another device; load the model "
            "without device_map, or leave out weights='int8'."
        )
    if has_own_forward(module):
        raise ValueError(
            f"expected to replace what {name} computes, and its forward was replaced before, as tensor parallelism "
            "does; leave out weights='int8'."
        )
