"""Weights in 8 or 4 bits per element: codes, and a scale for each group of neighbors in a row.

One codec serves packed experts in training and weights that are rounded for inference.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

GROUP_SIZE = 64  # elements of a row that share a scale; if it does not divide the width, their greatest common divisor
_INTEGER_OF_PAIR = {2: torch.int32, 4: torch.int64}  # an integer as wide as two elements, by the bytes of one


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
    """A weight [.. out in]: an element is the value of its code times the scale of its group.

    codes   [.. out in] int8, or [.. out in/2] uint8 of two indices into NF4, the even column in the high bits
    scales  [.. out in/group], in the dtype of the weight
    """

    codes: Tensor
    scales: Tensor

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def width(self) -> int:
        return self.codes.shape[-1] * 8 // self.bits

    @property
    def group_size(self) -> int:
        return self.width // self.scales.shape[-1]

    def unpacked(self) -> Tensor:
        """[.. out in] in the dtype of the scales."""
        dtype, in_groups = self.scales.dtype, (*self.codes.shape[:-1], self.scales.shape[-1], -1)
        if self.bits == 8:
            values = self.codes.to(dtype)
        else:
            # two values are looked up as one wider number
            wide = _INTEGER_OF_PAIR[dtype.itemsize]
            pairs = NF4_PAIRS.to(dtype=dtype, device=self.codes.device).view(wide).flatten()
            values = pairs.index_select(0, self.codes.flatten().int()).view(dtype)
        return values.view(in_groups).mul_(self.scales[..., None]).flatten(-2)


def pack(weight: Tensor, bits: int, group: int | None = GROUP_SIZE) -> Packed:
    """Packs a weight [.. out in], rounding each element to the nearest value that its group's scale allows.

    A group has `group` elements, or the greatest common divisor of that and the width of a row; None makes each row one
    group. The scale of a group is its greatest magnitude divided by the greatest value of a code.
    """
    width = weight.shape[-1]
    group = width if group is None else math.gcd(width, group)
    codes = weight.new_empty((*weight.shape[:-1], width * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = weight.new_empty((*weight.shape[:-1], width // group))
    # one matrix at a time, since float32 takes several times the memory of the result
    matrices = (x.flatten(0, -3) if x.dim() > 2 else x[None] for x in (weight, codes, scales))
    for matrix, codes_of_matrix, scales_of_matrix in zip(*matrices):
        _pack_matrix(matrix, bits, group, codes_of_matrix, scales_of_matrix)
    return Packed(codes, scales)


def _pack_matrix(weight: Tensor, bits: int, group: int, codes: Tensor, scales: Tensor) -> None:
    groups = torch.unflatten(weight, -1, (-1, group)).float()
    max_value = 127 if bits == 8 else 1
    # the scale is rounded before the codes are computed, so that these compensate for its rounding
    scales.copy_(groups.abs().amax(dim=-1) / max_value)
    scaled = groups / torch.where(scales == 0, 1, scales.float())[..., None]
    if bits == 8:
        codes.copy_(scaled.round_().clamp_(-127, 127).flatten(-2))
        return
    boundaries = ((NF4[1:] + NF4[:-1]) / 2).to(weight.device)
    indices = torch.bucketize(scaled, boundaries).to(torch.uint8).flatten(-2)
    high, low = torch.unflatten(indices, -1, (-1, 2)).unbind(-1)
    codes.copy_(high << 4 | low)
