"""Counts which experts the routers of a model choose on a text, and measures how even the choices are.

Letters: l layers with experts, m tokens, e routed experts, k experts per token, D devices (groups of experts).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..experts.dropping import padding_mask_as_bool
from ..modeling_deepseek_v2 import DeepseekV2Model, moe_layers

WINDOW = 1024  # tokens per forward pass


class RouterCounts:
    """Sums over the tokens that pass a model's gates while they are watched; padding is not counted.

    layers   [l]    their numbers
    choices  [l e]  how often an expert was chosen, dropped choices included
    weights  [l e]  the sum of the weights with which an expert was chosen
    sent     [l D]  how many tokens have a choice on a device
    dropped  [l]    how many choices were dropped (`device_capacity_factor`)

    Raises ValueError for a model without experts.
    """

    def __init__(self, model: nn.Module):
        layers = moe_layers(model)
        self._backbone = next(module for module in model.modules() if isinstance(module, DeepseekV2Model))
        # peft may have wrapped a gate, and then calls the wrapper
        self.layers, self._gates = list(layers), [moe.gate for moe in layers.values()]
        config = self._backbone.config
        e, groups, self.num_experts_per_tok = config.n_routed_experts, config.n_group, config.num_experts_per_tok
        self.gate_scaling = 1.0 if config.normalizes_gates else config.routed_scaling_factor
        # greedy routing may come with a number of groups that does not divide the experts
        self.widths = (e, e, groups if e % groups == 0 else 1, 1)
        # the sums are on the gates' device, so that the host does not wait for it at every layer
        device = next(self._gates[0].parameters()).device
        self.sums = torch.zeros(len(layers), sum(self.widths), dtype=torch.float64, device=device)
        self.choices, self.weights, self.sent, dropped = self.sums.split(self.widths, dim=1)
        self.dropped = dropped[:, 0]

    def reset(self) -> None:
        self.sums.zero_()

    @contextmanager
    def watching(self, *, only_training: bool = False) -> Iterator[None]:
        """Inside, every forward pass of the model is counted."""
        is_token: list[Tensor] = []
        # gates not yet counted in this pass: recomputing activations calls them a second time
        not_counted: set[int] = set()

        def remember_padding(backbone, args, kwargs):
            tokens = kwargs.get("input_ids", args[0] if args else None)
            tokens = kwargs["inputs_embeds"] if tokens is None else tokens
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            is_token[:] = [padding_mask_as_bool(mask, tokens.shape[:2], tokens.device).flatten()]
            not_counted.update(range(len(self._gates)))

        def count(row: int):
            def hook(gate, inputs, output):
                if row not in not_counted or (only_training and not gate.training):
                    return
                not_counted.remove(row)
                _, weights, experts = output
                self._add(row, weights.detach(), experts, is_token[0].to(experts.device))

            return hook

        handles = [self._backbone.register_forward_pre_hook(remember_padding, with_kwargs=True)]
        handles += [gate.register_forward_hook(count(row)) for row, gate in enumerate(self._gates)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, row: int, weights: Tensor, experts: Tensor, is_token: Tensor) -> None:
        """Counts weights and experts [m k] of the tokens where `is_token` [m]."""
        e, num_devices = self.choices.shape[1], self.sent.shape[1]
        counts = is_token[:, None].double().expand(experts.shape)
        on_device = F.one_hot(experts // (e // num_devices), num_devices).amax(dim=1) * is_token[:, None]
        choices, weighted = torch.zeros(2, e, dtype=torch.float64, device=experts.device)
        choices.index_add_(0, experts.flatten(), counts.flatten())
        weighted.index_add_(0, experts.flatten(), (weights * counts).flatten())
        dropped = ((weights == 0) * counts).sum()[None]
        self.sums[row] += torch.cat((choices, weighted, on_device.sum(dim=0).double(), dropped)).to(self.sums.device)


class Activity(NamedTuple):
    """How the gates of all layers with experts respond to a text.

        layers   [l]    their numbers
        shares   [l e]  each expert's share of all choices; 1/e where choices are even
        weights  [l e]  the mean weight with which an expert was chosen, 0 where it never was
        gates    [l e]  the mean gate value over all tokens, 0 where not chosen, without `routed_scaling_factor`

    Rows are layers.
    """

    layers: list[int]
    shares: Tensor
    weights: Tensor
    gates: Tensor

    def load(self) -> Tensor:
        """[l]: the choices of the busiest expert divided by an even share; 1 is even."""
        return load_of_busiest(self.shares)

    def entropy(self) -> Tensor:
        """[l]: the entropy of the shares divided by that of even shares; 1 is even, 0 is one expert for all tokens."""
        return relative_entropy(self.shares)

    def unused(self) -> Tensor:
        """[l]: how many experts were never chosen."""
        return (self.shares == 0).sum(dim=1)

    def distance(self, other: "Activity") -> Tensor:
        """[l]: the total variation between the shares here and in `other`; 0 is equal, 1 means no expert in both."""
        return (self.shares - other.shares).abs().sum(dim=1) / 2


@torch.no_grad()
def activity_of(model: PreTrainedModel, ids: Tensor) -> Activity:
    """Runs `model` over ids [b s] without padding, and returns what its routers chose.

    Raises ValueError for a model without experts and for ids of another shape.
    """
    counts = RouterCounts(model)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        given = f"shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"expected token ids as a tensor [b s] of at least one token, got {given}.")
    _count(model, counts, ids)
    return _activity(counts, counts.sums, ids.numel())


@torch.no_grad()
def activity_of_halves(model: PreTrainedModel, ids: Tensor) -> tuple[Activity, Activity, Activity]:
    """The result of `activity_of`, then that of each half of the text alone. A half has whole windows of WINDOW tokens.

    Raises ValueError as `activity_of` does, and for a text of less than two windows.
    """
    if ids.shape[-1] < 2 * WINDOW:
        raise ValueError(f"expected a text of at least {2 * WINDOW:,} tokens to halve, got {ids.shape[-1]:,}.")
    middle = ids.shape[1] // WINDOW // 2 * WINDOW
    counts, first = RouterCounts(model), ids[:, :middle]
    _count(model, counts, first)
    sums_of_first = counts.sums.clone()
    _count(model, counts, ids[:, middle:])
    return (
        _activity(counts, counts.sums, ids.numel()),
        _activity(counts, sums_of_first, first.numel()),
        _activity(counts, counts.sums - sums_of_first, ids.numel() - first.numel()),
    )


def _count(model: PreTrainedModel, counts: RouterCounts, ids: Tensor) -> None:
    was_training = model.training
    model.eval()
    try:
        with counts.watching():
            # as in huggingface_hub, None means no bar if stderr is not a terminal
            for window in tqdm(ids.split(WINDOW, dim=1), "counting choices", disable=None, leave=False):
                model(window.to(model.device), use_cache=False)
    finally:
        model.train(was_training)


def _activity(counts: RouterCounts, sums: Tensor, num_tokens: int) -> Activity:
    choices, weights, *_ = sums.cpu().split(counts.widths, dim=1)
    gates = weights / num_tokens / counts.gate_scaling
    return Activity(counts.layers, choices / choices.sum(dim=1, keepdim=True), weights / choices.clamp(min=1), gates)


def load_of_busiest(shares: Tensor) -> Tensor:
    """[l n] to [l]: the greatest share divided by an even share; 1 is even."""
    return shares.amax(dim=1) * shares.shape[1]


def relative_entropy(shares: Tensor) -> Tensor:
    """[l n] to [l]: the entropy divided by that of even shares; 1 is even, 0 is one share for all."""
    return torch.special.entr(shares).sum(dim=1) / max(math.log(shares.shape[1]), 1e-12)
