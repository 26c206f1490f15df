"""Whether the parts of a layer do nothing but their own work, so that kernels may read their weights directly."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..compat_accelerate import is_offloaded
from ..hooks import has_hooks
from ..moe import DeepseekV2Experts, DeepseekV2MLP

SILU = type(ACT2FN["silu"])


def is_plain_norm(norm: nn.Module, x: Tensor) -> bool:
    is_its_own = type(norm) is nn.RMSNorm and not has_hooks(norm)
    return is_its_own and norm.weight.dtype == x.dtype and norm.weight.device == x.device


def is_plain(weight: Tensor, x: Tensor) -> bool:
    is_here = type(weight) in (nn.Parameter, Tensor) and weight.device == x.device
    return is_here and weight.dtype == x.dtype and weight.is_contiguous()


def weights_of(x: Tensor, *projections: nn.Module) -> tuple[Tensor, ...] | None:
    """Weights of projections, or None where one does more than multiply."""
    for part in projections:
        if type(part) is not nn.Linear or part.bias is not None or has_hooks(part) or not is_plain(part.weight, x):
            return None
    return tuple(part.weight for part in projections)


def weights_of_mlp(module: nn.Module, x: Tensor) -> tuple[Tensor, ...] | None:
    """gate, up and down of an MLP, or None where a part does more than its own work."""
    if type(module) is not DeepseekV2MLP or has_hooks(module) or type(module.act_fn) is not SILU:
        return None
    return weights_of(x, module.gate_proj, module.up_proj, module.down_proj)


def are_plain_experts(module: nn.Module, x: Tensor) -> bool:
    if type(module) is not DeepseekV2Experts or type(module.act_fn) is not SILU or is_offloaded(module):
        return False
    return module.takes_grouped_products() and all(is_plain(w, x) for w in (module.gate_up_proj, module.down_proj))
