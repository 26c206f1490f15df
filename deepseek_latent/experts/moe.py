"""DeepSeekMoE: many narrow routed experts, a few for each token, and a shared expert for all tokens.

Letters: b batch, s tokens, d model width, k experts per token.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..compat.accelerate import weights_here
from ..configuration_deepseek_v2 import DeepseekV2Config
from .adapters import with_adapters
from .dropping import TokenDropping
from .routed import DeepseekV2Experts
from .router import DeepseekV2MoEGate

# without gradients, at most this many rows (tokens times k) pass through the experts at once; more off the CPU, since a
# GPU reads all experts again for each block, and needs larger blocks to be busy
ROWS_PER_BLOCK = 1 << 14
ROWS_PER_BLOCK_OFF_CPU = 1 << 16

# the activation of the release, and the only one that kernels compute
SILU = type(ACT2FN["silu"])


class DeepseekV2MLP(nn.Module):
    """SwiGLU: down(act(gate x) * up x), [.. d] to [.. d]."""

    def __init__(self, config: DeepseekV2Config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DeepseekV2MoE(nn.Module):
    """Routed experts, weighted by the gate, plus the shared experts, which every token passes unweighted (eq. 20)."""

    def __init__(self, config: DeepseekV2Config):
        super().__init__()
        self.gate = DeepseekV2MoEGate(config)
        self.experts = DeepseekV2Experts(config)
        self.num_experts_per_tok = config.num_experts_per_tok
        # side by side, the shared experts are one wider MLP
        self.shared_experts = (
            None
            if config.n_shared_experts is None
            else DeepseekV2MLP(config, config.n_shared_experts * config.moe_intermediate_size)
        )

    def forward(self, hidden_states: Tensor, dropping: TokenDropping | None = None) -> Tensor:
        tokens = hidden_states.flatten(0, 1)
        _, top_k_weights, top_k_index = self.gate(tokens, dropping)
        output = self._routed(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)

    def _routed(self, tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts [tokens d]."""
        rows = ROWS_PER_BLOCK if tokens.device.type == "cpu" else ROWS_PER_BLOCK_OFF_CPU
        per_block = max(rows // self.num_experts_per_tok, 1)
        is_wrapped = not isinstance(self.experts, DeepseekV2Experts)
        inner = getattr(self.experts, "get_base_layer", lambda: None)() if is_wrapped else self.experts
        if isinstance(inner, DeepseekV2Experts) and not tokens.is_meta:
            inner.check_loaded()
        # products with adapters read the weights here, and not only in the experts' own forward
        with weights_here(self.experts) if is_wrapped else nullcontext():
            multiply = with_adapters(self.experts)
            if torch.is_grad_enabled() or torch.jit.is_tracing() or tokens.shape[0] <= per_block:
                return multiply(tokens, top_k_index, top_k_weights)
            blocks = zip(*(x.split(per_block) for x in (tokens, top_k_index, top_k_weights)))
            return torch.cat([multiply(*block) for block in blocks])
