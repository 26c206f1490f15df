"""The balance losses of training, which keep experts, devices and the traffic between devices evenly loaded.

Experts lie on devices in their order, as the groups of device-limited routing do.

Letters: b batch, s tokens of a sequence, e routed experts, k experts per token, D devices, M devices per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..configuration_deepseek_v2 import DeepseekV2Config
from .dropping import padding_mask_as_bool
from .router import DeepseekV2MoEGate


class BalanceLosses(NamedTuple):
    """The three losses, each without its factor; each is 1 where loads or scores are even."""

    expert: Tensor  # []
    device: Tensor  # []
    communication: Tensor  # []

    def weighted_sum(self, config: DeepseekV2Config) -> Tensor:
        """The losses times their factors of the config, added up."""
        factors = (config.aux_loss_alpha, config.device_aux_loss_alpha, config.communication_aux_loss_alpha)
        return sum(factor * loss for factor, loss in zip(factors, self))


def balance_losses(
    scores: Tensor,  # [b s e]  float32, the softmax of the router over all experts
    chosen: Tensor,  # [b s k]  the experts each token goes to
    is_token: Tensor,  # [b s]  bool, False at padding
    *,
    num_devices: int,
    devices_per_token: int,
    sequence_wise: bool,
) -> BalanceLosses:
    """Sums of load times mean score over experts, over devices, and over the devices that tokens are sent to.

    Loads count choices and carry no gradient. The losses are computed over all tokens at once, or for each sequence
    and then averaged (`seq_aux` of the release).
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.2.3, eqs. 23-31.
    """
    if not sequence_wise:
        scores, chosen, is_token = (x.flatten(0, 1)[None] for x in (scores, chosen, is_token))
    e, k = scores.shape[-1], chosen.shape[-1]
    # a sequence of nothing but padding has no load, and does not count in the mean
    num_tokens = is_token.sum(dim=1).clamp(min=1)[:, None]
    num_sequences = is_token.any(dim=1).sum().clamp(min=1)
    is_chosen = torch.zeros_like(scores).scatter_(-1, chosen, 1.0) * is_token[..., None]
    # a token is sent once to every device that has one of its experts
    is_sent = torch.unflatten(is_chosen, -1, (num_devices, -1)).amax(dim=-1)
    mean_scores = (scores * is_token[..., None]).sum(dim=1) / num_tokens
    load = is_chosen.sum(dim=1) * e / (k * num_tokens)
    device_scores = torch.unflatten(mean_scores, -1, (num_devices, -1)).sum(dim=-1)
    device_load = torch.unflatten(load, -1, (num_devices, -1)).mean(dim=-1)
    traffic = is_sent.sum(dim=1) * num_devices / (devices_per_token * num_tokens)
    pairs = ((load, mean_scores), (device_load, device_scores), (traffic, device_scores))
    return BalanceLosses(*((loads * score).sum() / num_sequences for loads, score in pairs))


def balance_losses_of_layers(
    config: DeepseekV2Config,
    gates: Sequence[DeepseekV2MoEGate],  # of all layers with experts
    router_logits: Sequence[Tensor],  # [b*s e] of each
    shape: tuple[int, int],  # b, s
    attention_mask: Tensor | None,  # [b t], 0 at padding
) -> BalanceLosses:
    """The losses of all layers, added up."""
    is_token = padding_mask_as_bool(attention_mask, shape, router_logits[0].device)
    layers = []
    for gate, logits in zip(gates, router_logits):
        scores, (_, chosen) = logits.softmax(dim=-1), gate.choose(logits)
        layers.append(
            balance_losses(
                torch.unflatten(scores, 0, shape),
                torch.unflatten(chosen, 0, shape),
                is_token.to(logits.device),
                num_devices=config.n_group,
                devices_per_token=config.topk_group,
                sequence_wise=config.seq_aux,
            )
        )
    return BalanceLosses(*(torch.stack([x.to(is_token.device) for x in losses]).sum() for losses in zip(*layers)))


def fraction_of_batch(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This micro-batch's fraction of the labels in the whole accumulation step.

    The balance losses are multiplied by it, so that they are not counted once for every micro-batch.
    """
    if num_items_in_batch is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / num_items_in_batch
