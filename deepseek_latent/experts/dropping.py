"""Token dropping in training: a device computes at most its capacity of choices, and drops those of lowest score.

Letters: b batch, s tokens of a sequence, m tokens of all sequences, e routed experts, k experts per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration_deepseek_v2 import DeepseekV2Config


class TokenDropping(NamedTuple):
    """Which tokens of a training step may lose choices, so that no device computes more than its capacity.

    is_token   [m]  bool, False at padding, which uses no capacity
    is_exempt  [m]  bool, True in sequences that keep all their choices
    """

    is_token: Tensor
    is_exempt: Tensor
    num_devices: int
    capacity_factor: float

    def kept(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """[m k], False for choices that are dropped, given the router's scores [m e] and what it chose [m k].

        A device's capacity is `capacity_factor` times its even share of all choices. It keeps the choices of highest
        score, those of exempt tokens first and without exception. Source: DeepSeek-V2 (arXiv:2405.04434) 2.2.4.
        """
        device = (chosen // (scores.shape[-1] // self.num_devices)).flatten()
        num_choices = self.is_token.sum() * chosen.shape[-1]
        capacity = (num_choices * self.capacity_factor / self.num_devices).ceil()
        # scores lie between 0 and 1, so exempt tokens come before all others and padding after them
        rank_by = scores.gather(-1, chosen) + self.is_exempt[:, None].float() - 2.0 * ~self.is_token[:, None]
        order = rank_by.flatten().argsort(descending=True, stable=True)
        on_device = F.one_hot(device[order], self.num_devices)
        place = (on_device.cumsum(dim=0) * on_device).sum(dim=-1)
        fits = torch.empty_like(order, dtype=torch.bool).index_copy_(0, order, place <= capacity)
        return fits.view_as(chosen) | (self.is_exempt & self.is_token)[:, None]


def token_dropping(
    config: DeepseekV2Config,
    attention_mask: Tensor | None,  # [b t], 0 at padding
    inputs_embeds: Tensor,  # [b s d]
    layers: nn.ModuleList,
) -> TokenDropping | None:
    """The dropping of one forward pass in training, with newly drawn exempt sequences; None if the config has none.

    Processes that share a batch take those that the first of them drew.
    """
    if config.device_capacity_factor is None:
        return None
    (b, s, _), device = inputs_embeds.shape, inputs_embeds.device
    is_exempt = torch.rand(b, device=device) < config.no_drop_fraction
    is_exempt = layers[config.moe_layers[0]].mlp.same_for_all(is_exempt)
    is_token = padding_mask_as_bool(attention_mask, (b, s), device)
    factor = config.device_capacity_factor
    return TokenDropping(is_token.flatten(), is_exempt.repeat_interleave(s), config.n_group, factor)


def padding_mask_as_bool(attention_mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """[b s] bool, False at padding; a mask that is not [b t] says nothing about padding."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -shape[1] :].to(device).bool()
    return torch.ones(shape, dtype=torch.bool, device=device)
