"""`optimize_for_inference` makes the layers of a model compute with our operators; `undo` reverts that."""

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn
from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel

from ..compat.accelerate import is_offloaded
from ..compat.bound_functions import bind, has_bound_functions, unbind
from ..compat.hooks import has_own_forward
from ..compat.other_classes import check_is_own_class
from ..compat.tensor_parallel import is_split
from ..experts.moe import SILU, DeepseekV2MLP
from ..experts.packed import PackedWeights
from ..experts.routed import DeepseekV2Experts, not_stacked
from ..experts.trained import TrainedWeights
from ..experts.weights import StackedWeights
from ..generation import LatentGenerationMixin
from ..modeling_deepseek_v2 import DeepseekV2DecoderLayer
from .cpu.experts import CpuExperts
from .cpu.int8 import to_int8
from .cpu.layers import REPLACEMENTS
from .cpu.library import WithOperators, load_operators
from .cpu.support import DTYPES
from .gpu.replayed_steps import ReplayedSteps

GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# classes whose weights `weights="int8"` rounds; not the router, which is small, and whose choices matter
ROUNDED_CLASSES = (nn.Linear, DeepseekV2Experts)


def _is_tied(module: nn.Module, model: PreTrainedModel) -> bool:
    return getattr(module, "weight", None) is model.get_input_embeddings().weight


@dataclass(frozen=True, eq=False)
class Optimized:
    """What `optimize_for_inference` did to a model; `undo()` reverts it."""

    instructions: str
    modules: tuple[nn.Module, ...]
    replaying: LatentGenerationMixin | None = None

    def undo(self) -> None:
        """Raises ValueError if weights are in int8, since rounding cannot be undone."""
        if any(map(_was_rounded, self.modules)):
            raise ValueError("int8 weights cannot be undone; load the model again.")
        for module in self.modules:
            if isinstance(module, DeepseekV2Experts):
                module.weights.operators = None
            unbind(module)
        if self.replaying is not None:
            self.replaying.replayed_steps = None

    def __repr__(self) -> str:
        counts = Counter(map(_name_of, filter(_is_optimized, self.modules)))
        changed = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"Optimized({self.instructions}; {changed or 'nothing'})"


def optimize_for_inference(model: PreTrainedModel, weights: str | None = None, graphs: bool = False) -> Optimized:
    """Makes the layers of a model compute with our operators whenever no gradient is needed.

    Weights, names, classes and files stay as they are, and the operators read the weights as they are stored: saving,
    loading, training, adapters and `state_dict` work as before. For a model on the CPU, the first call on a machine
    takes about a minute to build the operators.

    On a CUDA device, few tokens over a `LatentCache` go through each decoder layer in a dozen launches. With `graphs`,
    `generate()` also uses a static cache if you name none, captures one decoding step over it as a CUDA graph, and
    replays it for every token.

    With `weights="int8"`, projections (except `kv_b_proj`) and experts are rounded to int8 with one scale per row, and
    take half the memory of bfloat16. That cannot be undone: such a model saves the rounded weights and cannot be
    trained. Adapters act on it, but those on linear layers cannot be merged into it.

    Raises:
        RuntimeError: if there is no C++ compiler, or if it fails; on a CUDA device, if Triton is not installed.
        TypeError: if `model` is not a model of transformers or peft, or a DeepSeek-V2 of another class than this
            package's.
        ValueError: if the model is on another device or in another dtype than bfloat16 or float32 (on a CUDA device
            also float16), for other `weights`, or for an option that this model or its device does not allow.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"expected a model of transformers or peft, got {type(model).__name__}.")
    check_is_own_class(model)
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
    if weights == "int8" and any(map(is_split, model.parameters())):
        raise ValueError("expected whole weights for weights='int8', and these are split over processes; leave it out.")
    instructions = load_operators()
    chosen = {name: module for name, module in model.named_modules() if _is_replaceable(name, module)}
    rounded = {
        name: module
        for name, module in chosen.items()
        if weights == "int8"
        and type(module) in ROUNDED_CLASSES
        and not _is_tied(module, model)
        and not _has_int8_experts(module)
    }
    for name, module in rounded.items():
        _check_can_be_rounded(name, module)
    if rounded:
        _check_is_not_in_training(model)
    # binding takes no time, rounding does; as in huggingface_hub, None means no bar if stderr is not a terminal
    has_no_bar = None if rounded else True
    for name, module in tqdm(chosen.items(), "rounding weights to int8", disable=has_no_bar, leave=False):
        if isinstance(module, DeepseekV2Experts):
            if name in rounded:
                module.weights = PackedWeights(8, group=None, saves_dense=True)
            if not has_own_forward(module):
                module.weights.operators = CpuExperts
        elif name in rounded:
            to_int8(module)
        elif not has_own_forward(module):
            bind(module, REPLACEMENTS[type(module)], WithOperators)
    return Optimized(instructions, tuple(filter(_is_optimized, model.modules())))


def _optimize_for_gpu(model: PreTrainedModel, weights: str | None, graphs: bool) -> Optimized:
    if weights is not None:
        raise ValueError("weights='int8' is for models on the CPU; leave it out on a GPU.")
    dtype = model.get_input_embeddings().weight.dtype
    if dtype not in GPU_DTYPES:
        raise ValueError(
            f"expected a model in bfloat16, float16 or float32 on a GPU, got {dtype}; load it in one of these."
        )
    if find_spec("triton") is None:
        raise RuntimeError("expected Triton, which CUDA builds of torch install, and found none; install triton.")
    replaying = _replayable_model(model) if graphs else None
    from .gpu.layers import REPLACEMENTS as GPU_REPLACEMENTS

    layers = [module for module in model.modules() if type(module) is DeepseekV2DecoderLayer]
    for layer in layers:
        if not has_own_forward(layer):
            bind(layer, GPU_REPLACEMENTS[DeepseekV2DecoderLayer])
    if replaying is not None:
        replaying.replayed_steps = ReplayedSteps
    return Optimized("Triton", tuple(layers), replaying)


def _replayable_model(model: PreTrainedModel) -> LatentGenerationMixin:
    """The causal language model in `model`. Raises ValueError if its steps cannot be captured."""
    if any(map(is_offloaded, model.modules())):
        raise ValueError(
            "expected all weights on the GPU, and some are fetched for each step, which a CUDA graph cannot do; "
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


def _is_optimized(module: nn.Module) -> bool:
    has_operators = isinstance(module, DeepseekV2Experts) and module.weights.operators is not None
    return has_operators or has_bound_functions(module)


def _name_of(module: nn.Module) -> str:
    name = type(module).__name__.removeprefix("DeepseekV2")
    return f"int8 {name}" if _is_int8_linear(module) or _has_int8_experts(module) else name


def _is_int8_linear(module: nn.Module) -> bool:
    return "weight_codes" in module._buffers


def _has_int8_experts(module: nn.Module) -> bool:
    """True for experts in 8 bits, also if `pack_experts` packed them."""
    weights = module.weights if isinstance(module, DeepseekV2Experts) else None
    return isinstance(weights, PackedWeights) and weights.bits == 8


def _was_rounded(module: nn.Module) -> bool:
    return _is_int8_linear(module) or (_has_int8_experts(module) and module.weights.saves_dense)


def _is_replaceable(name: str, module: nn.Module) -> bool:
    if isinstance(module, DeepseekV2Experts):
        return _has_int8_experts(module) or (type(module.weights) is StackedWeights and _can_be_read(module))
    # absorption reads the weight of kv_b_proj itself; adapters are small, and may be trained further
    if _is_int8_linear(module) or "kv_b_proj" in name.split(".") or ".lora_" in name:
        return False
    return type(module) in REPLACEMENTS and _can_be_read(module)


def _can_be_read(module: nn.Module) -> bool:
    # only a quantizer can read its own weights
    if any(type(weight) is not nn.Parameter for weight in module.parameters(recurse=False)):
        return False
    return not isinstance(module, (DeepseekV2Experts, DeepseekV2MLP)) or type(module.act_fn) is SILU


def _check_is_not_in_training(model: PreTrainedModel) -> None:
    """Refuses to round what an optimizer may go on training."""
    for module in model.modules():
        if isinstance(module, DeepseekV2Experts) and isinstance(module.weights, TrainedWeights):
            raise not_stacked(module.weights)


def _check_can_be_rounded(name: str, module: nn.Module) -> None:
    """Raises ValueError if a hook or a replaced `forward` would still use the weights that rounding removes."""
    if any(weight.is_meta for weight in module.parameters(recurse=False)):
        raise ValueError(
            f"expected all weights in memory, and those of {name} are on disk or on another device; load the model "
            "without device_map, or leave out weights='int8'."
        )
    if has_own_forward(module):
        raise ValueError(
            f"expected to replace what {name} computes, and its forward was replaced before, as hooks of other "
            "libraries do; leave out weights='int8'."
        )
