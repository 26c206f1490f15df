"""What routers choose: on a text, and, by a callback that has `Trainer` log it, in training.

Letters: l layers with experts, m tokens, e routed experts, k experts per token, D devices (groups of experts).
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback

from ..experts.balance import present_tokens
from ..modeling_deepseek_v2 import DeepseekV2Model, moe_layers

if TYPE_CHECKING:  # half a second to import
    from transformers import Trainer

WINDOW = 1024  # tokens that are read at a time


class RouterCounts:
    """Sums over the tokens that pass a model's gates while they are watched; padding is no token.

    layers   [l]    their numbers
    choices  [l e]  how often an expert was chosen, whether or not that was dropped
    weights  [l e]  what a chosen expert weighed, added up
    sent     [l D]  tokens of which some choice lies on a device
    dropped  [l]    choices that were dropped (`device_capacity_factor`)

    Raises ValueError for a model without experts.
    """

    def __init__(self, model: nn.Module):
        layers = moe_layers(model)
        self._backbone = next(module for module in model.modules() if isinstance(module, DeepseekV2Model))
        # whatever peft has put around a gate is called in its place
        self.layers, self._gates = list(layers), [moe.gate for moe in layers.values()]
        config = self._backbone.config
        e, groups, self.num_experts_per_tok = config.n_routed_experts, config.n_group, config.num_experts_per_tok
        self.gate_scaling = 1.0 if config.normalizes_gates else config.routed_scaling_factor
        # greedy routing may come with groups that divide nothing
        self.widths = (e, e, groups if e % groups == 0 else 1, 1)
        # beside the gates, so that nothing waits for their device
        device = next(self._gates[0].parameters()).device
        self.sums = torch.zeros(len(layers), sum(self.widths), dtype=torch.float64, device=device)
        self.choices, self.weights, self.sent, dropped = self.sums.split(self.widths, dim=1)
        self.dropped = dropped[:, 0]

    def reset(self) -> None:
        self.sums.zero_()

    @contextmanager
    def watching(self, *, only_training: bool = False) -> Iterator[None]:
        present: list[Tensor] = []
        # gates that have not been counted in this pass: a checkpoint that recomputes calls them again
        waiting: set[int] = set()

        def remember_padding(backbone, args, kwargs):
            tokens = kwargs.get("input_ids", args[0] if args else None)
            tokens = kwargs["inputs_embeds"] if tokens is None else tokens
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            present[:] = [present_tokens(mask, tokens.shape[:2], tokens.device).flatten()]
            waiting.update(range(len(self._gates)))

        def count(row: int):
            def hook(gate, inputs, output):
                if row not in waiting or (only_training and not gate.training):
                    return
                waiting.remove(row)
                _, weights, experts = output
                self._add(row, weights.detach(), experts, present[0].to(experts.device))

            return hook

        handles = [self._backbone.register_forward_pre_hook(remember_padding, with_kwargs=True)]
        handles += [gate.register_forward_hook(count(row)) for row, gate in enumerate(self._gates)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, row: int, weights: Tensor, experts: Tensor, present: Tensor) -> None:
        """Of weights and experts [m k], those where `present` [m]."""
        e, num_devices = self.choices.shape[1], self.sent.shape[1]
        is_there = present[:, None].double().expand(experts.shape)
        on_device = F.one_hot(experts // (e // num_devices), num_devices).amax(dim=1) * present[:, None]
        choices, weighed = torch.zeros(2, e, dtype=torch.float64, device=experts.device)
        choices.index_add_(0, experts.flatten(), is_there.flatten())
        weighed.index_add_(0, experts.flatten(), (weights * is_there).flatten())
        dropped = ((weights == 0) * is_there).sum()[None]
        self.sums[row] += torch.cat((choices, weighed, on_device.sum(dim=0).double(), dropped)).to(self.sums.device)


class Activity(NamedTuple):
    """What the gates of all layers with experts do with a text; rows are layers.

    layers   [l]    their numbers
    shares   [l e]  of all choices, those that fell on an expert; evenly chosen 1/e
    weights  [l e]  mean weight where an expert was chosen, 0 where it never was
    gates    [l e]  mean over tokens of the gate value, without `routed_scaling_factor`; 0 where not chosen
    """

    layers: list[int]
    shares: Tensor
    weights: Tensor
    gates: Tensor

    def load(self) -> Tensor:
        """[l]: choices of the busiest expert over those of an even one; 1 is even."""
        return busiest(self.shares)

    def entropy(self) -> Tensor:
        """[l]: of the shares, over that of even ones; 1 is even, 0 one expert for all."""
        return evenness(self.shares)

    def unused(self) -> Tensor:
        """[l]: experts that were never chosen."""
        return (self.shares == 0).sum(dim=1)

    def distance(self, other: "Activity") -> Tensor:
        """[l]: share of choices that fall on other experts there, total variation; 0 alike, 1 disjoint."""
        return (self.shares - other.shares).abs().sum(dim=1) / 2


@torch.no_grad()
def activity_of(model: PreTrainedModel, ids: Tensor) -> Activity:
    """Over ids [b s] without padding, without gradients; ValueError for a model without experts or other shapes."""
    counts = RouterCounts(model)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        came = f"shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"expected token ids as a tensor [b s] of at least one token, got {came}.")
    was_training = model.training
    model.eval()
    try:
        with counts.watching():
            for window in ids.split(WINDOW, dim=1):
                model(window.to(model.device), use_cache=False)
    finally:
        model.train(was_training)
    choices, weights = counts.choices.cpu(), counts.weights.cpu()
    gates = weights / ids.numel() / counts.gate_scaling
    return Activity(counts.layers, choices / choices.sum(dim=1, keepdim=True), weights / choices.clamp(min=1), gates)


class RouterStatistics(TrainerCallback):
    """Has `Trainer` log, beside each training loss, what the routers did in training since the last.

    `router/load` and `router/device_load` are the busiest expert's and device's choices over those of an even one,
    `router/device_traffic` the same of tokens sent there, `router/devices_per_token` how many a token is sent to,
    `router/entropy` that of the experts' shares (1 where even), `router/unused` the experts never chosen and
    `router/dropped` the share of dropped choices: means over layers, tokens of all processes together.
    `router/load_of_worst_layer` is the greatest load of a layer.

    Use: trainer.add_callback(RouterStatistics(trainer)). Raises TypeError for anything but a `Trainer`.
    """

    def __init__(self, trainer: "Trainer"):
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(f"expected a Trainer, in whose log this writes, got {type(trainer).__name__}.")
        self.trainer = trainer
        self._watching = ExitStack()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # an earlier training may have ended by an error
        self._watching.close()
        self.counts = RouterCounts(model)
        self._watching.enter_context(self.counts.watching(only_training=True))

    def on_train_end(self, args, state, control, **kwargs):
        self._watching.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        # what is logged here comes by again
        if "loss" not in logs:
            return
        self.trainer.log(self.figures())
        self.counts.reset()

    def figures(self) -> dict[str, float]:
        counts = self.counts
        total = self.trainer.accelerator.reduce(counts.sums)
        choices, _, sent, dropped = total.split(counts.widths, dim=1)
        num_choices = choices.sum(dim=1).clamp(min=1)
        shares = choices / num_choices[:, None]
        tokens = num_choices / counts.num_experts_per_tok
        load, of_devices = busiest(shares), shares.unflatten(1, (sent.shape[1], -1)).sum(dim=-1)
        means = {
            "load": load,
            "device_load": busiest(of_devices),
            "device_traffic": busiest(sent / sent.sum(dim=1, keepdim=True).clamp(min=1)),
            "devices_per_token": sent.sum(dim=1) / tokens,
            "entropy": evenness(shares),
            "unused": (choices == 0).sum(dim=1),
            "dropped": dropped[:, 0] / num_choices,
        }
        figures = {f"router/{name}": per_layer.double().mean().item() for name, per_layer in means.items()}
        return figures | {"router/load_of_worst_layer": load.max().item()}


def busiest(shares: Tensor) -> Tensor:
    """[l n] to [l]: the greatest share over an even one; 1 is even."""
    return shares.amax(dim=1) * shares.shape[1]


def evenness(shares: Tensor) -> Tensor:
    """[l n] to [l]: entropy over that of even shares; 1 is even, 0 one for all."""
    return torch.special.entr(shares).sum(dim=1) / max(math.log(shares.shape[1]), 1e-12)
