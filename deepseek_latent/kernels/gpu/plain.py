"""What kernels read directly: the weights of plain parts, and latents as they are stored.

A part is plain if calling it does nothing but its own work: no hook, adapter, quantizer or sharding is involved.
"""

from torch import Tensor, nn

from ...cache.segments import Latents
from ...compat.accelerate import is_offloaded
from ...compat.hooks import has_hooks
from ...experts.codec import Packed
from ...experts.moe import SILU, DeepseekV2MLP
from ...experts.names import STACKED
from ...experts.packed import PackedWeights
from ...experts.routed import DeepseekV2Experts
from ...experts.router import DeepseekV2MoEGate
from ...experts.weights import StackedWeights
from ..cached_latents import bits_of, stored_parts
from .triton_packed import has_readable_groups


def is_plain_norm(norm: nn.Module, x: Tensor) -> bool:
    return type(norm) is nn.RMSNorm and not has_hooks(norm) and is_plain(norm.weight, x)


def is_plain_gate(gate: nn.Module) -> bool:
    """A router with a hook, or of another class, is called as a module, so that the hook sees the call."""
    return type(gate) is DeepseekV2MoEGate and not has_hooks(gate)


def is_plain(weight: Tensor, x: Tensor) -> bool:
    """True if a kernel can read this weight: an ordinary contiguous tensor with the device and dtype of x."""
    is_here = type(weight) in (nn.Parameter, Tensor) and weight.device == x.device
    return is_here and weight.dtype == x.dtype and weight.is_contiguous()


def weights_of(x: Tensor, *projections: nn.Module) -> tuple[Tensor, ...] | None:
    """The weights of projections, or None if one is not plain or has a bias."""
    for part in projections:
        if type(part) is not nn.Linear or part.bias is not None or has_hooks(part) or not is_plain(part.weight, x):
            return None
    return tuple(part.weight for part in projections)


def weights_of_mlp(module: nn.Module, x: Tensor) -> tuple[Tensor, ...] | None:
    """The weights of gate, up and down of an MLP, or None if a part is not plain."""
    if type(module) is not DeepseekV2MLP or has_hooks(module) or type(module.act_fn) is not SILU:
        return None
    return weights_of(x, module.gate_proj, module.up_proj, module.down_proj)


def weights_of_experts(module: nn.Module, x: Tensor) -> tuple[Tensor | Packed, Tensor | Packed] | None:
    """Gate and up, and down, of routed experts as they are stored; None if a kernel cannot read them."""
    if type(module) is not DeepseekV2Experts or type(module.act_fn) is not SILU or is_offloaded(module):
        return None
    weights = module.weights
    if type(weights) not in (StackedWeights, PackedWeights) or not weights.allows_adapters:
        return None
    if isinstance(weights, StackedWeights):
        stacked = module.gate_up_proj, module.down_proj
        return stacked if all(is_plain(weight, x) for weight in stacked) else None
    gate_up, down = (weights.packed(name) for name in STACKED)
    return (gate_up, down) if all(_is_readable(packed, x) for packed in (gate_up, down)) else None


def _is_readable(packed: Packed, x: Tensor) -> bool:
    return is_plain(packed.scales, x) and packed.codes.is_contiguous() and has_readable_groups(packed)


def attention_inputs(latents: Latents) -> dict:
    """Latents as arguments of `triton_attention.attend`: one or two segments of rows, their format and length."""
    segments, k_rotary = zip(*map(stored_parts, latents.segments))
    length = None if latents.num_held is None else latents.num_held.view(1)
    return {"latents": [*segments], "k_rotary": [*k_rotary], "bits": bits_of(latents), "length": length}
