"""The router of DeepSeekMoE, which chooses the experts of each token.

Letters: e routed experts, d model width, k experts per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from ..configuration_deepseek_v2 import DeepseekV2Config
from .dropping import TokenDropping


class DeepseekV2MoEGate(nn.Module):
    """Scores every expert for every token and picks k of them.

    `greedy` takes the k best of all experts. `group_limited_greedy` is the paper's device-limited routing: it keeps
    the `topk_group` groups whose best expert scores highest, and takes the k best experts of these groups.
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.2.1, eqs. 21-22, and 2.2.2.
    """

    def __init__(self, config: DeepseekV2Config):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.is_grouped = config.topk_method == "group_limited_greedy"
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.normalizes_gates = config.normalizes_gates
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor, dropping: TokenDropping | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[tokens d] to router logits [tokens e], weights [tokens k] and experts [tokens k]; in float32.

        A choice that `dropping` drops gets the weight 0.
        """
        logits = self.logits(hidden_states)
        weights, experts = self.choose(logits)
        if dropping is not None:
            weights = weights * dropping.kept(logits.softmax(dim=-1), experts)
        return logits, weights, experts

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts [tokens k] for router logits [tokens e]."""
        scores = logits.softmax(dim=-1)
        if self.is_grouped:
            scores = scores * self._mask_of_best_groups(scores)
        weights, experts = scores.topk(self.num_experts_per_tok, dim=-1, sorted=False)
        if self.normalizes_gates:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        elif self.routed_scaling_factor != 1:
            weights = weights * self.routed_scaling_factor
        return weights, experts

    def logits(self, hidden_states: Tensor) -> Tensor:
        # autocast would turn the product back into half precision
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.weight.float())

    def _mask_of_best_groups(self, scores: Tensor) -> Tensor:
        """[tokens e], 1 for every expert of the groups that are kept and 0 elsewhere."""
        best_in_group = torch.unflatten(scores, -1, (self.n_group, -1)).amax(dim=-1)
        kept = best_in_group.topk(self.topk_group, dim=-1, sorted=False).indices
        mask = torch.zeros_like(best_in_group).scatter_(-1, kept, 1.0)
        return mask.repeat_interleave(scores.shape[-1] // self.n_group, dim=-1)
