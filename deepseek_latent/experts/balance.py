"""What keeps experts, devices and the traffic between devices evenly loaded in training: losses, and dropped tokens.

Experts lie on devices in their order, as the groups of device-limited routing do.

Letters: b batch, s tokens of one row, m of all, e routed experts, k experts per token, D devices, M devices per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..configuration_deepseek_v2 import DeepseekV2Config


class BalanceLosses(NamedTuple):
    """Each without its factor; 1 where load or scores are even."""

    expert: Tensor  # []
    device: Tensor  # []
    communication: Tensor  # []

    def weighed(self, config: DeepseekV2Config) -> Tensor:
        factors = (config.aux_loss_alpha, config.device_aux_loss_alpha, config.communication_aux_loss_alpha)
        return sum(factor * loss for factor, loss in zip(factors, self))


def balance_losses(
    scores: Tensor,  # [b s e]  float32, the softmax of the router before any group is left out
    chosen: Tensor,  # [b s k]  the experts each token goes to
    present: Tensor,  # [b s]  bool, False where there is padding
    *,
    num_devices: int,
    devices_per_token: int,
    sequence_wise: bool,
) -> BalanceLosses:
    """Sums of load times mean score over experts, over devices, and over devices that tokens are sent to.

    Loads count choices and carry no gradient. Over all tokens at once, or sequence by sequence and then averaged
    (`seq_aux` of the release).
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.2.3, eqs. 23-31.
    """
    if not sequence_wise:
        scores, chosen, present = (x.flatten(0, 1)[None] for x in (scores, chosen, present))
    e, k = scores.shape[-1], chosen.shape[-1]
    # a sequence of padding alone has no load, and no part in the mean
    num_tokens = present.sum(dim=1).clamp(min=1)[:, None]
    num_sequences = present.any(dim=1).sum().clamp(min=1)
    is_chosen = torch.zeros_like(scores).scatter_(-1, chosen, 1.0) * present[..., None]
    # a token is sent once to every device that has one of its experts
    is_sent = torch.unflatten(is_chosen, -1, (num_devices, -1)).amax(dim=-1)
    mean_scores = (scores * present[..., None]).sum(dim=1) / num_tokens
    load = is_chosen.sum(dim=1) * e / (k * num_tokens)
    of_devices = torch.unflatten(mean_scores, -1, (num_devices, -1)).sum(dim=-1)
    device_load = torch.unflatten(load, -1, (num_devices, -1)).mean(dim=-1)
    traffic = is_sent.sum(dim=1) * num_devices / (devices_per_token * num_tokens)
    pairs = ((load, mean_scores), (device_load, of_devices), (traffic, of_devices))
    return BalanceLosses(*((share * score).sum() / num_sequences for share, score in pairs))


def balance_of_layers(
    config: DeepseekV2Config,
    gates: Sequence,  # of all layers with experts
    router_logits: Sequence[Tensor],  # [b*s e] of each
    shape: tuple[int, int],  # b, s
    attention_mask: Tensor | None,  # [b t], 0 where there is padding
) -> BalanceLosses:
    """The losses of all layers, added up."""
    present = present_tokens(attention_mask, shape, router_logits[0].device)
    layers = []
    for gate, logits in zip(gates, router_logits):
        scores, (_, chosen) = logits.softmax(dim=-1), gate.choose(logits)
        layers.append(
            balance_losses(
                torch.unflatten(scores, 0, shape),
                torch.unflatten(chosen, 0, shape),
                present.to(logits.device),
                num_devices=config.n_group,
                devices_per_token=config.topk_group,
                sequence_wise=config.seq_aux,
            )
        )
    return BalanceLosses(*(torch.stack([x.to(present.device) for x in losses]).sum() for losses in zip(*layers)))


def present_tokens(attention_mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """[b s] bool, False where there is padding; a mask that is not [b t] says nothing about padding."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -shape[1] :].to(device).bool()
    return torch.ones(shape, dtype=torch.bool, device=device)


def share_of_batch(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """Of the tokens that a step of accumulated gradients predicts, those predicted here: so a loss counts once."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / num_items_in_batch


class TokenDropping(NamedTuple):
    """Which tokens of a training step may be sent to fewer experts than they chose, so that no device has too many.

    present  [m]  bool, False where there is padding, which takes nobody's place
    spared   [m]  bool, True in the sequences of which nothing is dropped
    """

    present: Tensor
    spared: Tensor
    num_devices: int
    capacity_factor: float

    def kept(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """[m k], False for choices that are dropped, by the router's scores [m e] and what it chose [m k].

        A device takes `capacity_factor` times its even share of all choices, those of highest score; spared ones first
        and all of them. Source: DeepSeek-V2 (arXiv:2405.04434) 2.2.4.
        """
        device = (chosen // (scores.shape[-1] // self.num_devices)).flatten()
        num_choices = self.present.sum() * chosen.shape[-1]
        capacity = (num_choices * self.capacity_factor / self.num_devices).ceil()
        # scores lie between 0 and 1, so these come before and behind all others
        rank_by = scores.gather(-1, chosen) + self.spared[:, None].float() - 2.0 * ~self.present[:, None]
        order = rank_by.flatten().argsort(descending=True, stable=True)
        on_device = F.one_hot(device[order], self.num_devices)
        place = (on_device.cumsum(dim=0) * on_device).sum(dim=-1)
        fits = torch.empty_like(order, dtype=torch.bool).index_copy_(0, order, place <= capacity)
        return fits.view_as(chosen) | (self.spared & self.present)[:, None]


def token_dropping(
    config: DeepseekV2Config,
    attention_mask: Tensor | None,  # [b t], 0 where there is padding
    inputs_embeds: Tensor,  # [b s d]
) -> TokenDropping | None:
    """For one forward pass in training; None where the config asks for none. Draws the spared sequences anew."""
    if config.device_capacity_factor is None:
        return None
    (b, s, _), device = inputs_embeds.shape, inputs_embeds.device
    spared = torch.rand(b, device=device) < config.no_drop_fraction
    present = present_tokens(attention_mask, (b, s), device)
    factor = config.device_capacity_factor
    return TokenDropping(present.flatten(), spared.repeat_interleave(s), config.n_group, factor)
