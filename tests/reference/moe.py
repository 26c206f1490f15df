"""DeepSeekMoE: which experts a token chooses, what they add, how uneven the choice is."""

import math
from typing import Any

import torch
from torch import Tensor

from .layers import feed_forward, in_float64, weights_under


def router_scores(
    gate_weight: Tensor,  # [e d]
    tokens: Tensor,  # [.. d]
) -> Tensor:  # [.. e]
    """s_{i,t} = Softmax_i(u_t . e_i), over all experts. Float64. Source: eq. 22."""
    return torch.softmax(tokens.to(torch.float64) @ gate_weight.to(torch.float64).T, dim=-1)


def indices_of_largest(scores: Tensor, count: int) -> list[int]:
    """Where the `count` largest of scores [e] are, largest first, the lower index first among equals."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].tolist()


def limit_to_groups(
    config: Any,
    scores: Tensor,  # [e]
) -> Tensor:  # [e]
    """Scores with everything outside the `topk_group` best groups set to 0.

    A group is as good as its best expert. Source: device-limited routing, paper 2.2.2.
    """
    groups = scores.unflatten(0, (config.n_group, -1))  # [n_group, e / n_group]
    limited = torch.zeros_like(groups)
    for group in indices_of_largest(groups.max(dim=-1).values, config.topk_group):
        limited[group] = groups[group]
    return limited.flatten()


def route(
    config: Any,
    gate_weight: Tensor,  # [e d]
    token: Tensor,  # [d]
) -> dict[int, Tensor]:
    """The experts a token chooses, best first, each with its weight g_{i,t} as a float64 scalar.

    Normalized weights are not scaled by `routed_scaling_factor`, as in the released code.
    Source: eqs. 21-22, with the groups of paper 2.2.2.
    """
    scores = router_scores(gate_weight, token)
    if config.topk_method == "group_limited_greedy":
        scores = limit_to_groups(config, scores)
    elif config.topk_method != "greedy":
        raise ValueError(f"topk_method must be greedy or group_limited_greedy, got {config.topk_method!r}.")
    chosen = indices_of_largest(scores, config.num_experts_per_tok)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        total = scores[chosen].sum() + 1e-20
        return {expert: scores[expert] / total for expert in chosen}
    return {expert: scores[expert] * config.routed_scaling_factor for expert in chosen}


def moe(
    config: Any,
    weights: dict[str, Tensor],  # of one layer, named after `mlp.`: gate.weight, experts.0.up_proj.weight, ..
    hidden: Tensor,  # [b s d]
) -> Tensor:  # [b s d]
    """Shared experts plus the weighted sum of the chosen experts, without the residual u_t. Float64.

    The N_s shared experts are stored as one network of width N_s f, which is their sum.
    Source: eq. 20.
    """
    weights = in_float64(weights)
    tokens = hidden.to(torch.float64).flatten(0, -2)
    results = []
    for token in tokens:
        result = torch.zeros_like(token)
        if config.n_shared_experts:
            result = result + feed_forward(weights_under(weights, "shared_experts."), token)
        for expert, weight in route(config, weights["gate.weight"], token).items():
            result = result + weight * feed_forward(weights_under(weights, f"experts.{expert}."), token)
        results.append(result)
    return torch.stack(results).view_as(hidden)


def dropped_choices(
    scores: Tensor,  # [m e]
    chosen: Tensor,  # [m k]
    exempt: set[int],
    *,
    num_devices: int,
    capacity_factor: float,
) -> set[tuple[int, int]]:
    """The (token, expert) pairs a device leaves out, lowest affinity first, until it is within its budget.

    The budget is `capacity_factor` times the mean number of pairs per device. Source: paper 2.2.4.
    """
    experts_per_device = scores.shape[-1] // num_devices
    budget = math.ceil(capacity_factor * chosen.numel() / num_devices)
    dropped = set()
    for device in range(num_devices):
        pairs = [(t, e) for t, row in enumerate(chosen.tolist()) for e in row if e // experts_per_device == device]
        open_to_dropping = sorted((pair for pair in pairs if pair[0] not in exempt), key=lambda pair: scores[pair])
        dropped.update(open_to_dropping[: max(len(pairs) - budget, 0)])
    return dropped


def expert_balance_loss(
    scores: Tensor,  # [b s e]  s_{i,t}, before any group limit
    chosen: Tensor,  # [b s k]  int, the experts each token really used
    sequence_wise: bool,
) -> Tensor:  # []
    """sum_i f_i P_i without alpha: 1 when the load, or the score, is the same for every expert.

    f_i counts choices and has no gradient; P_i is the mean score. Over all tokens of the batch at once,
    or sequence by sequence and then averaged (`seq_aux` of the released code). Float64.
    Source: eqs. 23-25.
    """
    if not sequence_wise:
        scores, chosen = scores.flatten(0, 1)[None], chosen.flatten(0, 1)[None]
    num_sequences, num_tokens, num_experts = scores.shape
    experts_per_token = chosen.shape[-1]
    scores = scores.to(torch.float64)
    loss = scores.new_zeros(())
    for sequence in range(num_sequences):
        for expert in range(num_experts):
            times_chosen = int((chosen[sequence] == expert).sum())
            load = num_experts / (experts_per_token * num_tokens) * times_chosen  # f_i, eq. 24
            mean_score = scores[sequence, :, expert].mean()  # P_i, eq. 25
            loss = loss + load * mean_score / num_sequences  # eq. 23
    return loss


def device_balance_loss(
    scores: Tensor,  # [b s e]
    chosen: Tensor,  # [b s k]
    num_devices: int,
) -> Tensor:  # []
    """sum_i f'_i P'_i over devices that hold e / D neighboring experts each, averaged over sequences. Float64.

    f'_i is the mean load of the experts of device i, P'_i the sum of their mean scores.
    Source: eqs. 26-28.
    """
    num_sequences, num_tokens, num_experts = scores.shape
    per_device, loss = num_experts // num_devices, torch.zeros((), dtype=torch.float64)
    for sequence in range(num_sequences):
        for device in range(num_devices):
            load, mean_score = 0.0, torch.zeros((), dtype=torch.float64)
            for expert in range(device * per_device, (device + 1) * per_device):
                times_chosen = int((chosen[sequence] == expert).sum())
                load += num_experts / (chosen.shape[-1] * num_tokens) * times_chosen / per_device
                mean_score = mean_score + scores[sequence, :, expert].to(torch.float64).mean()
            loss = loss + load * mean_score / num_sequences
    return loss


def communication_balance_loss(
    scores: Tensor,  # [b s e]
    chosen: Tensor,  # [b s k]
    num_devices: int,
    devices_per_token: int,
) -> Tensor:  # []
    """sum_i f''_i P''_i, where f''_i counts the tokens that are sent to device i, each once. Float64.

    Source: eqs. 29-31.
    """
    num_sequences, num_tokens, num_experts = scores.shape
    per_device, loss = num_experts // num_devices, torch.zeros((), dtype=torch.float64)
    for sequence in range(num_sequences):
        for device in range(num_devices):
            held = range(device * per_device, (device + 1) * per_device)
            sent = sum(any(int(expert) in held for expert in token) for token in chosen[sequence])
            mean_score = sum(scores[sequence, :, expert].to(torch.float64).mean() for expert in held)
            loss = loss + num_devices / (devices_per_token * num_tokens) * sent * mean_score / num_sequences
    return loss
