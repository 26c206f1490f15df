"""Stacked weights of which some experts are trained and the others frozen, for expert-specialized fine-tuning.

Letters: n trained experts of a layer, d model width, f width of one expert.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..compat.torch import take_out, version_of
from .names import STACKED
from .products import grouped_product
from .weights import StackedWeights

# how far apart the elements are that `_sample` compares; a prime, so that no width divides it
SAMPLE_STRIDE = 1009
TRAINED = tuple(f"trained_{name}" for name in STACKED)


class TrainedWeights(StackedWeights):
    """Stacked weights in which some experts are trained and the others are frozen.

    The module of the experts gets two more parameters, in float32, for the optimizer:

    trained_gate_up_proj  [n 2f d]
    trained_down_proj     [n d f]

    At each call these are copied into the stacked weights, rounded to their dtype. So generating, saving and converting
    use the trained model, and `state_dict` is that of a model without these parameters.
    """

    name = "in training by ESFT"
    way_back = "finish_training(model)"
    why_no_adapters = (
        "experts take no adapters while they are in training by ESFT; end the training with finish_training(model), "
        "which keeps adapters attached."
    )
    unsaved = TRAINED
    is_plain = False
    # with adapters beside them, the trained experts would get no gradient
    allows_adapters = False

    def __init__(self, trained: Sequence[int]):
        self.trained = [*trained]
        # the version and a sample of each trained parameter when it was last copied into the stacked weights
        self.synced: list[tuple[int | None, Tensor]] = []

    def take_over(self) -> None:
        chosen = [nn.Parameter(getattr(self.experts, name).detach()[self.trained].float()) for name in STACKED]
        for name, parameter in zip(TRAINED, chosen):
            self.experts.register_parameter(name, parameter)
        self.sync()

    def give_back(self) -> None:
        self.sync()
        for name in TRAINED:
            delattr(self.experts, name)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of STACKED."""
        return [getattr(self.experts, name) for name in TRAINED]

    def sync(self) -> None:
        for name, parameter in zip(STACKED, self.parameters):
            # through `data`, because autograd refuses weights that change between a forward pass and its backward pass
            stacked = getattr(self.experts, name).data
            stacked[self.trained] = parameter.detach().to(stacked.dtype)
        self.synced = [(version_of(x), _sample(x).clone()) for x in self.parameters]

    def _is_synced(self) -> bool:
        # fused optimizers and writes through `data` leave the version as it is
        return len(self.synced) > 0 and all(
            version_of(x) == version and torch.equal(_sample(x), sample)
            for x, (version, sample) in zip(self.parameters, self.synced)
        )

    def forward(self, *routed: Tensor) -> Tensor:
        # in training, always copy: this is cheap next to the forward pass
        if self.experts.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._is_synced():
            self.sync()
        return self.forward_with(self.product, *routed) if torch.is_grad_enabled() else super().forward(*routed)

    def plain_product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        trained = getattr(self.experts, f"trained_{name}")
        return _ProductWithTrained.apply(x, trained, getattr(self.experts, name), ends, self.trained)

    def after_load(self, loaded: set[str]) -> None:
        for name, parameter in zip(STACKED, self.parameters):
            # a weight that was not loaded leaves its parameter alone, which has digits that the stacked weight lost
            if name in loaded:
                with torch.no_grad():
                    parameter.copy_(getattr(self.experts, name)[self.trained])

    @contextmanager
    def protected_from_casts(self) -> Iterator[None]:
        """The trained experts move along with the others, and stay in float32."""
        kept = take_out(self.experts, [*TRAINED])
        try:
            yield
        finally:
            for name, parameter in kept.items():
                parameter.data = parameter.data.to(self.experts.gate_up_proj.device)
                if parameter.grad is not None:
                    parameter.grad.data = parameter.grad.data.to(parameter.device)
                self.experts.register_parameter(name, parameter)
            self.synced = []


def _sample(parameter: Tensor) -> Tensor:
    """A sparse sample of the parameter, to detect cheaply that the step of an optimizer changed it."""
    return parameter.detach().flatten()[::SAMPLE_STRIDE]


class _ProductWithTrained(torch.autograd.Function):
    """Grouped products by stacked weights; the gradient is that of the trained experts."""

    @staticmethod
    def forward(ctx, x: Tensor, trained_weight: Tensor, weight: Tensor, ends: Tensor, trained: list[int]) -> Tensor:
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, weight, ends)
        ctx.trained = trained
        return grouped_product(x, weight, ends)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, ends = ctx.saved_tensors
        dx = d_trained = None
        if ctx.needs_input_grad[0]:
            dx = grouped_product(dy, weight.transpose(1, 2), ends)
        if ctx.needs_input_grad[1]:
            bounds = [0, *ends.tolist()]
            rows = [slice(bounds[expert], bounds[expert + 1]) for expert in ctx.trained]
            d_trained = torch.stack([dy[of_one].T @ x[of_one] for of_one in rows]).float()
        return dx, d_trained, None, None, None
