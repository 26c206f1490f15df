"""Routed experts in 8 or 4 bits for training adapters: the frozen stacks, where most of a model's memory is, packed.

`bitsandbytes` and torchao pack linear layers and leave stacked experts as they are; this packs the experts alone, so
both can be had together. Adapters are peft's, in full precision, and never need the weights they stand beside.

Letters: e routed experts, d model width, f width of one expert.
"""

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..compat.hooks import has_hooks
from ..compat.torch import become, take_out
from .moe import STACKED, DeepseekV2Experts
from .products import grouped_product

GROUP = 64  # elements of a row that share a scale, or as many of these as divide its width
AT_ONCE = 4  # experts that are unpacked together
WIDER = {2: torch.int32, 4: torch.int64}


def _normal_float() -> Tensor:
    """The 16 values of NF4 [16]: quantiles of the normal distribution, scaled to 1, with an exact zero.

    Source: QLoRA (arXiv:2305.14314) 3, with the offset of its published code.
    """
    positive, negative = (
        torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1]) for n in (9, 8)
    )
    values = torch.cat((-negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    return (values / values.abs().max()).float()


NF4 = _normal_float()
NF4_PAIRS = torch.cartesian_prod(NF4, NF4)  # [256 2], both values of every possible byte


class Packed(NamedTuple):
    """A stacked weight [e out in]: value = code's value times the scale of its group of the row.

    codes   [e out in] int8, or [e out in/2] uint8 of two indices into NF4, the even column in the high bits
    scales  [e out in/group]  in the dtype the weight had
    """

    codes: Tensor
    scales: Tensor

    @property
    def width(self) -> int:
        return self.codes.shape[-1] * (1 if self.codes.dtype == torch.int8 else 2)

    def unpacked(self) -> Tensor:
        """[.. out in], of all experts or of some."""
        dtype, in_groups = self.scales.dtype, (*self.codes.shape[:-1], self.scales.shape[-1], -1)
        if self.codes.dtype == torch.int8:
            values = self.codes.to(dtype)
        else:
            # two values are looked up as one wider number
            pairs = NF4_PAIRS.to(dtype=dtype, device=self.codes.device).view(WIDER[dtype.itemsize]).flatten()
            values = pairs.index_select(0, self.codes.flatten().int()).view(dtype)
        return values.view(in_groups).mul_(self.scales[..., None]).flatten(-2)


def pack(weight: Tensor, bits: int) -> Packed:
    """A weight [.. out in], each group rounded to the nearest values under its greatest magnitude."""
    group = math.gcd(weight.shape[-1], GROUP)
    groups = weight.unflatten(-1, (-1, group)).float()
    most = 127 if bits == 8 else 1
    # rounded first, so that codes make up for it
    scales = (groups.abs().amax(dim=-1) / most).to(weight.dtype)
    scaled = groups / torch.where(scales == 0, 1, scales.float())[..., None]
    if bits == 8:
        return Packed(scaled.round().clamp(-127, 127).to(torch.int8).flatten(-2), scales)
    between = ((NF4[1:] + NF4[:-1]) / 2).to(weight.device)
    high, low = torch.bucketize(scaled, between).to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return Packed(high << 4 | low, scales)


class StandIn(nn.Parameter):
    """In place of a packed weight: its shape for whoever asks, and no memory of its own.

    It is of a dtype that multiplies nothing. peft, which merges adapters into `data`, finds the experts unpacked there.
    """

    def __new__(cls, owner: "PackedExperts", name: str, shape: torch.Size, device: torch.device):
        nothing = torch.zeros((), dtype=torch.uint8, device=device)
        made = super().__new__(cls, nothing.expand(shape), requires_grad=False)
        made.owner, made.name_there = owner, name
        return made

    @property
    def data(self) -> Tensor:
        if isinstance(self.owner, PackedExperts):
            self.owner.unpack()
        return getattr(self.owner, self.name_there).data

    @data.setter
    def data(self, merged: Tensor) -> None:
        getattr(self.owner, self.name_there).data = merged

    def __deepcopy__(self, memo: dict) -> "StandIn":
        copied = StandIn(copy.deepcopy(self.owner, memo), self.name_there, self.shape, self.device)
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol):
        return StandIn, (self.owner, self.name_there, self.shape, self.device)


class PackedExperts(DeepseekV2Experts):
    """Frozen experts in packed storage, a few unpacked at a time where tokens meet them, in the backward pass again.

    `state_dict` has the packed storage, which no other code opens.
    """

    state = "packed; unpack_experts(model) makes stacked weights of them"

    def pack(self, bits: int) -> None:
        for name in STACKED:
            packed = pack(getattr(self, name).detach(), bits)
            for part, tensor in packed._asdict().items():
                self.register_buffer(f"{part}_of_{name}", tensor)
            weight = getattr(self, name)
            setattr(self, name, StandIn(self, name, weight.shape, weight.device))

    def packed(self, name: str) -> Packed:
        return Packed(*(getattr(self, f"{part}_of_{name}") for part in Packed._fields))

    def unpack(self) -> None:
        for name in STACKED:
            setattr(self, name, nn.Parameter(self.packed(name).unpacked(), requires_grad=False))
            for part in Packed._fields:
                delattr(self, f"{part}_of_{name}")
        become(self, DeepseekV2Experts)

    @property
    def dtype(self) -> torch.dtype:
        return self.scales_of_down_proj.dtype

    def check_weights_for_peft(self) -> None:
        raise ValueError(
            "packed experts take adapters beside their products alone, which hooks on experts prevent; remove the "
            "hooks, or unpack_experts(model)."
        )

    def check_saving(self) -> None:
        raise ValueError(
            f"routed experts are {self.state}, which a checkpoint can hold; or save the adapter alone, from the model "
            "that peft returned."
        )

    def takes_grouped_products(self) -> bool:
        return not has_hooks(self)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.multiplied_by(self.product, hidden_states, top_k_index, top_k_weights)

    def product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        return _PackedProduct.apply(x, *self.packed(name), ends)

    def _apply(self, fn, recurse: bool = True):
        # moving a stand-in would give it memory
        stand_ins = take_out(self, [*STACKED])
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, parameter in stand_ins.items():
                setattr(self, name, StandIn(self, name, parameter.shape, self.scales_of_down_proj.device))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in STACKED:
            del destination[prefix + name]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        missing_keys[:] = [key for key in missing_keys if key not in {prefix + name for name in STACKED}]


class _PackedProduct(torch.autograd.Function):
    """Grouped products by a packed weight; keeps neither rows nor unpacked weights for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales, ends)
        ctx.dtype = x.dtype
        y = x.new_empty(len(x), codes.shape[1], dtype=scales.dtype)
        for rows, weight, ends_of_some in _met(Packed(codes, scales), ends):
            y[rows] = grouped_product(x[rows], weight, ends_of_some)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        codes, scales, ends = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        packed = Packed(codes, scales)
        dx = dy.new_empty(len(dy), packed.width)
        for rows, weight, ends_of_some in _met(packed, ends):
            dx[rows] = grouped_product(dy[rows], weight.transpose(1, 2), ends_of_some)
        return dx.to(ctx.dtype), None, None, None


def _met(packed: Packed, ends: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of experts that have rows, some at a time: their rows, weights [some out in], and where each one's rows end."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    present = [expert for expert, count in enumerate(counts) if count]
    start = 0
    for some in (present[i : i + AT_ONCE] for i in range(0, len(present), AT_ONCE)):
        end = start + sum(counts[expert] for expert in some)
        # of neighbours nothing is copied
        some = slice(some[0], some[-1] + 1) if some[-1] - some[0] < len(some) else some
        yield slice(start, end), Packed(packed.codes[some], packed.scales[some]).unpacked(), ends[some] - start
        start = end
