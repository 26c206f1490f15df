"""How the routed experts of a layer are stored and multiplied: one object decides both, and may be exchanged.

Letters: m tokens, e experts, k experts per token, d model width, f width of one expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..compat.hooks import has_hooks
from ..compat.tensor_parallel import Split, split_of
from ..compat.transformers import experts_name
from .names import STACKED
from .products import Product, grouped_product, routed_sum

if TYPE_CHECKING:
    from .routed import DeepseekV2Experts


class StoredExperts(NamedTuple):
    """The tensors that operators multiply by: stacked weights, or codes with their scales.

    gate_up  [e 2f d]
    down     [e d f]
    scales   none, or [e 2f groups] and [e d groups], one per group of neighbors in a row
    """

    gate_up: Tensor
    down: Tensor
    scales: tuple[Tensor, ...] = ()


class ExpertOperators(Protocol):
    """Functions that multiply stored experts instead of torch; each returns None where it cannot."""

    @staticmethod
    def product(weights: "ExpertWeights", x: Tensor, name: str, ends: Tensor) -> Tensor | None: ...

    @staticmethod
    def forward(weights: "ExpertWeights", x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor | None: ...


def split_weights(experts: nn.Module) -> dict[str, Split]:
    """How each stacked weight is divided among processes; empty for whole ones."""
    found = {name: split_of(getattr(experts, name)) for name in STACKED}
    return {name: split for name, split in found.items() if split is not None}


class ExpertWeights:
    """How one layer's routed experts are stored, and how tokens are multiplied by them.

    `DeepseekV2Experts.weights` holds one. Assigning another one stores the same experts another way:

        experts.weights = PackedWeights(bits=4)

    The tensors themselves are parameters and buffers of the experts, where torch, peft and files look for them.
    """

    name = "stacked"
    # the call that makes stacked weights of these; None for stacked weights
    way_back: str | None = None
    # why peft must not add to the stacked weights, and the way back; None where it may
    why_no_adapters: str | None = None
    # why a checkpoint cannot hold these, and the way back; None where it can
    why_no_saving: str | None = None
    # parameters of the experts that `state_dict` leaves out
    unsaved: tuple[str, ...] = ()
    # functions to use in place of torch; set by `optimize_for_inference`
    operators: type[ExpertOperators] | None = None

    experts: "DeepseekV2Experts"

    def take_over(self) -> None:
        """Stores the stacked weights of `self.experts` this way."""

    def give_back(self) -> None:
        """Leaves stacked weights in `self.experts` again."""

    def sync(self) -> None:
        """Brings the stacked weights up to date."""

    @contextmanager
    def protected_from_casts(self) -> Iterator[None]:
        """Inside, the experts have only tensors that `.to()` and similar calls may convert."""
        yield

    def after_save(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Changes the entries of a state dict that start with `prefix`, those of the experts, to what files hold."""
        for name in self.unsaved:
            del state_dict[prefix + name]

    def after_load(self, loaded: set[str]) -> None:
        """Takes over the stacked weights after a state dict with these names was loaded into them."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which tokens are multiplied."""
        return self.experts.down_proj.dtype

    @property
    def split(self) -> dict[str, Split]:
        """How each stacked weight is divided among processes; empty for whole ones."""
        return {}

    @property
    def is_plain(self) -> bool:
        """Whether these are stacked weights, all of them in memory, with neither hooks nor a replaced `forward`."""
        return False

    @property
    def allows_adapters(self) -> bool:
        """Whether the products of adapters may be added to `product`."""
        return False

    def stored(self) -> StoredExperts | None:
        """The tensors for operators; None where there is no operator for their format."""
        return None

    def dense(self, name: str) -> Tensor:
        """The stacked weight `name` [e out in], computed where it is not stored."""
        raise NotImplementedError

    def plain_product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        """A `Product` (products.py) of these weights, computed by torch alone."""
        raise NotImplementedError

    def plain_forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`forward`, computed by torch alone."""
        return self.forward_with(self.plain_product, x, top_k_index, top_k_weights)

    def product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        """A `Product` of these weights, by an operator if one can compute it."""
        product = None if self.operators is None else self.operators.product(self, x, name, ends)
        return self.plain_product(x, name, ends) if product is None else product

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [m d], their experts [m k] and the weights of these [m k] to the weighted sum [m d]."""
        routed = x, top_k_index, top_k_weights
        total = None if self.operators is None else self.operators.forward(self, *routed)
        return self.plain_forward(*routed) if total is None else total

    def forward_with(self, product: Product, *routed: Tensor) -> Tensor:
        """The result of `forward`, computed with `product` for the matrix products."""
        sizes = {"num_experts": self.experts.num_experts, "some_elsewhere": not self.experts.has_all}
        return routed_sum(product, self.experts.act_fn, *routed, **sizes)


class StackedWeights(ExpertWeights):
    """The two stacked weights as they are, multiplied the way that `experts_implementation` names."""

    @property
    def split(self) -> dict[str, Split]:
        return split_weights(self.experts)

    @property
    def is_plain(self) -> bool:
        weights = [getattr(self.experts, name) for name in STACKED]
        num_experts = self.experts.config.n_routed_experts
        # a rank of expert parallelism has fewer experts, and a quantizer's weight is of another type
        is_whole = all(
            type(weight) in (nn.Parameter, Tensor) and weight.shape[0] == num_experts and not weight.is_meta
            for weight in weights
        )
        return is_whole and not has_hooks(self.experts)

    @property
    def allows_adapters(self) -> bool:
        # generate() puts the second name in the place of the first while it decodes on a GPU
        return self.is_plain and experts_name(self.experts.config) in ("grouped_mm", "batched_mm")

    def stored(self) -> StoredExperts:
        return StoredExperts(self.experts.gate_up_proj, self.experts.down_proj)

    def dense(self, name: str) -> Tensor:
        return getattr(self.experts, name)

    def plain_product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        return grouped_product(x, getattr(self.experts, name), ends)

    def plain_forward(self, *routed: Tensor) -> Tensor:
        # torch's grouped products do not take float64, and ours do
        if self.dtype == torch.float64 and experts_name(self.experts.config) == "grouped_mm":
            return self.forward_with(self.plain_product, *routed)
        return self.experts.forward_stacked(*routed)
