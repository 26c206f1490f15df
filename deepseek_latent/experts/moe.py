"""DeepSeekMoE: many narrow routed experts, a few for each token, and a shared expert for all tokens.

Letters: b batch, s tokens, d model width, k experts per token.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..compat.accelerate import weights_here
from ..compat.hooks import has_hooks
from ..compat.tensor_parallel import SharedModule
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
        return self.down_proj(self.expand(x))

    def expand(self, x: Tensor) -> Tensor:
        """act(gate x) * up x, [.. d] to [.. f]."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)


class PartsOfMLP:
    """One call of an MLP, in two parts if nothing hooks it, for expert parallelism to compute while tokens travel."""

    def __init__(self, mlp: nn.Module, x: Tensor):
        self.mlp, self.value = mlp, x
        self.left: list[Callable[[], None]] = [self._call] if has_hooks(mlp) else [self._expand, self._project]

    def _call(self) -> None:
        self.value = self.mlp(self.value)

    def _expand(self) -> None:
        self.value = self.mlp.expand(self.value)

    def _project(self) -> None:
        self.value = self.mlp.down_proj(self.value)

    def result(self) -> Tensor:
        """What calling the MLP returns; parts that nobody computed are computed now."""
        while self.left:
            self.left.pop(0)()
        return self.value


class DeepseekV2MoE(SharedModule):
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
        inner, routed = self._inner_experts(), (tokens, top_k_index, top_k_weights)
        if self.shared_experts is None:
            return self._routed(inner, *routed).view_as(hidden_states)
        if inner is None or inner.has_all:
            return self._routed(inner, *routed).view_as(hidden_states) + self.shared_experts(hidden_states)
        shared = PartsOfMLP(self.shared_experts, hidden_states)
        inner.meanwhile = shared.left
        try:
            return self._routed(inner, *routed).view_as(hidden_states) + shared.result()
        finally:
            inner.meanwhile = []

    def _inner_experts(self) -> DeepseekV2Experts | None:
        """The routed experts inside of peft's wrappers; None for experts of another class."""
        if isinstance(self.experts, DeepseekV2Experts):
            return self.experts
        inner = getattr(self.experts, "get_base_layer", lambda: None)()
        return inner if isinstance(inner, DeepseekV2Experts) else None

    def _routed(self, inner: DeepseekV2Experts | None, *routed: Tensor) -> Tensor:
        """The weighted sum of each token's experts [tokens d]."""
        tokens = routed[0]
        rows = ROWS_PER_BLOCK if tokens.device.type == "cpu" else ROWS_PER_BLOCK_OFF_CPU
        per_block = max(rows // self.num_experts_per_tok, 1)
        if inner is not None and not tokens.is_meta:
            inner.check_loaded()
        # products with adapters read the weights here, and not only in the experts' own forward
        with nullcontext() if inner is self.experts else weights_here(self.experts):
            multiply = with_adapters(self.experts, self.used_by_all)
            # every block would be an exchange, and processes may have unequal numbers of them
            is_exchanged = inner is not None and not inner.has_all
            if torch.is_grad_enabled() or torch.jit.is_tracing() or is_exchanged or tokens.shape[0] <= per_block:
                return multiply(*routed)
            blocks = zip(*(x.split(per_block) for x in routed))
            return torch.cat([multiply(*block) for block in blocks])
