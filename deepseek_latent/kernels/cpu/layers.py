"""Linear layers, norms, routers, MLPs and experts with our operators, as functions that replace methods of modules.

Letters: m tokens, d model width.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ...attention.attention import DeepseekV2Attention
from ...compat.bound_functions import replaces_method
from ...compat.hooks import has_hooks
from ...experts.dropping import TokenDropping
from ...experts.moe import SILU, DeepseekV2MLP, DeepseekV2MoE
from ...experts.routed import DeepseekV2Experts
from ...experts.router import DeepseekV2MoEGate
from ...experts.weights import StoredExperts
from .attention import choose_path, project, rotate
from .experts import CpuExperts, multiply_by_experts, readable_experts
from .library import multiply, operators
from .support import kernel_supports, kernel_weights


@replaces_method()
def linear(module: nn.Linear, x: Tensor) -> Tensor:
    if not kernel_supports(x, module.weight):
        return nn.Linear.forward(module, x)
    return multiply(x, module.weight, module.bias)


@replaces_method()
def rms_norm(module: nn.RMSNorm, x: Tensor) -> Tensor:
    if len(module.normalized_shape) > 1 or module.eps is None or not kernel_supports(x, module.weight):
        return nn.RMSNorm.forward(module, x)
    return operators.rms_norm(x.contiguous(), module.weight, module.eps)


@replaces_method()
def router_logits(gate: DeepseekV2MoEGate, hidden_states: Tensor) -> Tensor:
    wide = hidden_states.float()
    if not (kernel_supports(hidden_states, gate.weight) or kernel_supports(wide, gate.weight)):
        return DeepseekV2MoEGate.logits(gate, hidden_states)
    # float32 times the weight as it is, so that neither is rounded
    return multiply(wide, gate.weight, None)


@replaces_method()
def mlp(module: DeepseekV2MLP, x: Tensor) -> Tensor:
    """Computes few tokens in one call, if the projections do nothing but multiply."""
    weights_and_scales = weights_of_mlp(module, x)
    if weights_and_scales is None:
        return DeepseekV2MLP.forward(module, x)
    return operators.mlp(x.reshape(-1, x.shape[-1]).contiguous(), *weights_and_scales).view(x.shape)


def weights_of_mlp(module: DeepseekV2MLP, x: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
    """gate, up and down, and the scales of int8 ones; None if the MLP does anything that our operators do not."""
    if type(module.act_fn) is not SILU or has_hooks(module.act_fn):
        return None
    return kernel_weights(x, module.gate_proj, module.up_proj, module.down_proj)


@replaces_method()
def moe(module: DeepseekV2MoE, hidden_states: Tensor, dropping: TokenDropping | None = None) -> Tensor:
    """Computes routed and shared experts of few tokens in one call, if neither is wrapped or has hooks."""
    stored = _weights_of_all_experts(module, hidden_states)
    if stored is None:
        return DeepseekV2MoE.forward(module, hidden_states, dropping)
    routed, shared = stored
    tokens = hidden_states.flatten(0, 1)
    _, weights, experts = module.gate(tokens, dropping)
    return multiply_by_experts(tokens, routed, experts, weights, shared).view_as(hidden_states)


def _weights_of_all_experts(
    module: DeepseekV2MoE, x: Tensor
) -> tuple[StoredExperts, tuple[list[Tensor], list[Tensor]]] | None:
    """Routed experts and the weights and scales of shared ones, if one call can multiply tokens x by both."""
    routed_module, shared_module = module.experts, module.shared_experts
    if type(routed_module) is not DeepseekV2Experts or type(shared_module) is not DeepseekV2MLP:
        return None
    if routed_module.weights.operators is not CpuExperts or has_hooks(routed_module) or has_hooks(shared_module):
        return None
    shared = weights_of_mlp(shared_module, x)
    routed = None if shared is None else readable_experts(routed_module.weights, x)
    return None if routed is None or routed.gate_up.dtype != shared[0][0].dtype else (routed, shared)


# the methods that are replaced, by the class of the module
REPLACEMENTS: dict[type[nn.Module], dict[str, Callable]] = {
    nn.Linear: {"forward": linear},
    nn.RMSNorm: {"forward": rms_norm},
    DeepseekV2MLP: {"forward": mlp},
    DeepseekV2MoE: {"forward": moe},
    DeepseekV2MoEGate: {"logits": router_logits},
    DeepseekV2Attention: {"rotate": rotate, "project": project, "choose_path": choose_path},
}
