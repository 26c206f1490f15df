"""Routed experts of which some are trained, as expert-specialised fine-tuning does it, with gradients for these alone.

Letters: n trained experts of a layer, d model width, f width of one expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..compat.torch import become, take_out, version_of
from .moe import STACKED, DeepseekV2Experts
from .products import grouped_product

SAMPLED = 1009  # one weight of so many is compared; a prime divides no width


class TrainedExperts(DeepseekV2Experts):
    """Routed experts of which some are trained and the others frozen.

    trained               [n]       their numbers
    trained_gate_up_proj  [n 2f d]  float32, what the optimiser sees
    trained_down_proj     [n d f]

    The stacked weights of all experts follow at each call, rounded to their dtype. So generating, saving and converting
    see the trained model, and `state_dict` is that of a model without these parameters.
    """

    state = "in training by ESFT; end that with merge_experts(model)"

    def start(self, trained: Sequence[int]) -> None:
        self.trained = [*trained]
        for name in STACKED:
            stacked = getattr(self, name)
            self.register_parameter(f"trained_{name}", nn.Parameter(stacked.detach()[self.trained].float()))
        self.write()

    def finish(self) -> None:
        self.write()
        for name in STACKED:
            delattr(self, f"trained_{name}")
        del self.trained, self.written
        become(self, DeepseekV2Experts)

    def write(self) -> None:
        """Puts the trained experts into the stacked weights."""
        for name in STACKED:
            # not seen by autograd, which would find the weight changed between two passes and their gradients
            stacked = getattr(self, name).data
            stacked[self.trained] = getattr(self, f"trained_{name}").detach().to(stacked.dtype)
        self.written = [(version_of(slot), _sampled(slot).clone()) for slot in self.slots()]

    def slots(self) -> list[nn.Parameter]:
        return [getattr(self, f"trained_{name}") for name in STACKED]

    def is_written(self) -> bool:
        # fused optimisers and `data` count no version
        return len(self.written) > 0 and all(
            version_of(slot) == version and torch.equal(_sampled(slot), sample)
            for slot, (version, sample) in zip(self.slots(), self.written)
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # where a step may follow, what is written is little beside what is computed
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.is_written():
            self.write()
        routed = (hidden_states, top_k_index, top_k_weights)
        return self.multiplied_by(self.product, *routed) if torch.is_grad_enabled() else super().forward(*routed)

    def check_weights_for_peft(self) -> None:
        raise ValueError(f"experts take no adapters while they are {self.state}, with or without the adapters.")

    def takes_grouped_products(self) -> bool:
        # with adapters beside them, the trained ones would get no gradient
        return False

    def product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        return _ProductWithTrained.apply(x, getattr(self, f"trained_{name}"), getattr(self, name), ends, self.trained)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.write()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in STACKED:
            del destination[f"{prefix}trained_{name}"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        # of a file with some experts alone, the others come from the stacks
        self.write()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        for name in STACKED:
            if f"{prefix}trained_{name}" in missing_keys:
                missing_keys.remove(f"{prefix}trained_{name}")
            # where other weights come alone, these keep what 16 bits would round
            if prefix + name in state_dict:
                with torch.no_grad():
                    getattr(self, f"trained_{name}").copy_(getattr(self, name)[self.trained])

    def _apply(self, fn, recurse: bool = True):
        """Moves the trained experts along, and leaves them in float32."""
        slots = take_out(self, [f"trained_{name}" for name in STACKED])
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, slot in slots.items():
                slot.data = slot.data.to(self.gate_up_proj.device)
                if slot.grad is not None:
                    slot.grad.data = slot.grad.data.to(slot.device)
                self.register_parameter(name, slot)
            self.written = []


def _sampled(slot: Tensor) -> Tensor:
    """Of every row and column something; a step of an optimiser moves nearly all."""
    return slot.detach().flatten()[::SAMPLED]


class _ProductWithTrained(torch.autograd.Function):
    """Grouped products by stacked weights, whose gradient is that of some of them."""

    @staticmethod
    def forward(ctx, x: Tensor, trained_weight: Tensor, weight: Tensor, ends: Tensor, trained: list[int]) -> Tensor:
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, weight, ends)
        ctx.trained = trained
        return grouped_product(x, weight, ends)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, ends = ctx.saved_tensors
        dx = of_trained = None
        if ctx.needs_input_grad[0]:
            dx = grouped_product(dy, weight.transpose(1, 2), ends)
        if ctx.needs_input_grad[1]:
            bounds = [0, *ends.tolist()]
            rows = [slice(bounds[expert], bounds[expert + 1]) for expert in ctx.trained]
            of_trained = torch.stack([dy[of_one].T @ x[of_one] for of_one in rows]).float()
        return dx, of_trained, None, None, None
