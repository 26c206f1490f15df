"""Routed experts in 8 or 4 bits: the frozen stacks, which take most of a model's memory, in packed storage.

`bitsandbytes` and torchao pack linear layers and leave stacked experts as they are. This packs the experts only, so
that both can be combined. Adapters are peft's, in full precision, and are computed beside the packed weights.

Letters: e routed experts, d model width, f width of one expert.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..compat.hooks import has_hooks
from ..compat.tensor_parallel import Split, take_part
from ..compat.torch import take_out
from .codec import GROUP_SIZE, Packed, pack
from .names import STACKED
from .products import grouped_product
from .weights import ExpertWeights, StackedWeights, StoredExperts, split_weights

if TYPE_CHECKING:
    from .routed import DeepseekV2Experts

EXPERTS_UNPACKED_AT_ONCE = 4


class StandIn(nn.Parameter):
    """A parameter in the place of a packed weight: it has the weight's shape and no memory of its own.

    Its dtype is uint8, so that an accidental product fails. Reading `data` unpacks the experts, since peft merges
    adapters into it.
    """

    def __new__(cls, experts: "DeepseekV2Experts", weight_name: str, shape: torch.Size, device: torch.device):
        nothing = torch.zeros((), dtype=torch.uint8, device=device)
        made = super().__new__(cls, nothing.expand(shape), requires_grad=False)
        made.experts, made.weight_name = experts, weight_name
        return made

    @property
    def data(self) -> Tensor:
        if isinstance(self.experts.weights, PackedWeights):
            self.experts.weights = StackedWeights()
        return getattr(self.experts, self.weight_name).data

    @data.setter
    def data(self, merged: Tensor) -> None:
        getattr(self.experts, self.weight_name).data = merged

    def __deepcopy__(self, memo: dict) -> "StandIn":
        copied = StandIn(copy.deepcopy(self.experts, memo), self.weight_name, self.shape, self.device)
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol):
        return StandIn, (self.experts, self.weight_name, self.shape, self.device)


class PackedWeights(ExpertWeights):
    """Frozen experts in 8 or 4 bits (NF4); a few at a time are unpacked for their tokens, also in the backward pass.

    The module of the experts holds codes and scales as buffers. A state dict holds these as well, unless `saves_dense`
    asks for the stacked weights as they were rounded.
    """

    why_no_adapters = (
        "packed experts can only take adapters beside their products, which hooks on the experts or this kind of "
        "adapter prevent; remove the hooks, or unpack_experts(model)."
    )
    way_back = "unpack_experts(model)"

    def __init__(self, bits: int, group: int | None = GROUP_SIZE, *, saves_dense: bool = False):
        self.bits, self.group, self.saves_dense = bits, group, saves_dense
        self._split: dict[str, Split] = {}

    @property
    def split(self) -> dict[str, Split]:
        return self._split

    @property
    def name(self) -> str:
        return f"packed in {self.bits} bits"

    @property
    def why_no_saving(self) -> str | None:
        if self.saves_dense:
            return None
        return (
            f"expected routed experts that a checkpoint can hold, and they are {self.name}; call "
            "unpack_experts(model) first, or save the adapter alone, from the model that peft returned."
        )

    @property
    def unsaved(self) -> tuple[str, ...]:
        return () if self.saves_dense else STACKED

    def take_over(self) -> None:
        experts = self.experts
        self._split = split_weights(experts)
        # both before either is replaced, so that experts are never packed by half
        both = {name: pack(take_part(experts, name), self.bits, self.group) for name in STACKED}
        for name, packed in both.items():
            weight = getattr(experts, name)
            for part, tensor in packed._asdict().items():
                experts.register_buffer(f"{part}_of_{name}", tensor, persistent=not self.saves_dense)
            setattr(experts, name, StandIn(experts, name, weight.shape, weight.device))

    def give_back(self) -> None:
        for name, weight in {name: self.dense(name) for name in STACKED}.items():
            weight = self._split[name].whole(weight) if name in self._split else weight
            setattr(self.experts, name, nn.Parameter(weight, requires_grad=False))
            for part in Packed._fields:
                delattr(self.experts, f"{part}_of_{name}")

    def packed(self, name: str) -> Packed:
        return Packed(*(getattr(self.experts, f"{part}_of_{name}") for part in Packed._fields))

    def dense(self, name: str) -> Tensor:
        return self.packed(name).unpacked()

    @property
    def dtype(self) -> torch.dtype:
        return self.experts.scales_of_down_proj.dtype

    @property
    def allows_adapters(self) -> bool:
        return not has_hooks(self.experts)

    def stored(self) -> StoredExperts | None:
        if self.bits != 8:
            return None
        gate_up, down = map(self.packed, STACKED)
        return StoredExperts(gate_up.codes, down.codes, (gate_up.scales, down.scales))

    def plain_product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        return _PackedProduct.apply(x, *self.packed(name), ends)

    def after_save(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        super().after_save(state_dict, prefix)
        if self.saves_dense:
            state_dict |= {prefix + name: self.dense(name) for name in STACKED}

    @contextmanager
    def protected_from_casts(self) -> Iterator[None]:
        # casting or moving a stand-in would allocate memory for it
        stand_ins = take_out(self.experts, [*STACKED])
        try:
            yield
        finally:
            for name, stand_in in stand_ins.items():
                device = self.experts.scales_of_down_proj.device
                setattr(self.experts, name, StandIn(self.experts, name, stand_in.shape, device))


class _PackedProduct(torch.autograd.Function):
    """Grouped products by a packed weight; keeps neither rows nor unpacked weights for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales, ends)
        ctx.dtype = x.dtype
        y = x.new_empty(len(x), codes.shape[1], dtype=scales.dtype)
        for rows, weight, ends_here in _unpacked_where_needed(Packed(codes, scales), ends):
            y[rows] = grouped_product(x[rows], weight, ends_here)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        codes, scales, ends = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        packed = Packed(codes, scales)
        dx = dy.new_empty(len(dy), packed.width)
        for rows, weight, ends_here in _unpacked_where_needed(packed, ends):
            dx[rows] = grouped_product(dy[rows], weight.transpose(1, 2), ends_here)
        return dx.to(ctx.dtype), None, None, None


def _unpacked_where_needed(packed: Packed, ends: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields, for a few experts with rows at a time: the slice of rows, the weights [g out in], the end offsets [g]."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    with_rows = [expert for expert, count in enumerate(counts) if count]
    start = 0
    for first in range(0, len(with_rows), EXPERTS_UNPACKED_AT_ONCE):
        chosen = with_rows[first : first + EXPERTS_UNPACKED_AT_ONCE]
        end = start + sum(counts[expert] for expert in chosen)
        # a slice of neighbors copies nothing
        are_neighbors = chosen[-1] - chosen[0] < len(chosen)
        where = slice(chosen[0], chosen[-1] + 1) if are_neighbors else chosen
        yield slice(start, end), Packed(packed.codes[where], packed.scales[where]).unpacked(), ends[where] - start
        start = end
