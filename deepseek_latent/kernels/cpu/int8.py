"""Weights in int8, one float32 scale per row: half the bytes to read for a token, and half the memory.

Letters: n rows of a weight, k their width, e experts, d model width, f width of an expert.
"""

import torch
from torch import Tensor, nn

from ...compat.torch import become
from .library import multiply


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [.. n k] as codes in int8 and scales [.. n]; an element moves by 1/254 of its row's largest at most."""
    largest = weight.abs().amax(dim=-1).float()
    scales = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    # a few rows at a time, since float32 takes four times the room of what is made
    for some, scale, out in zip(*(x.flatten(0, -2).split(4096) for x in (weight, scales[..., None], codes))):
        out.copy_((some.float() / scale).round_())
    return codes, scales


class Int8Linear(nn.Linear):
    """`codes` [n k] and `scales` [n] stand for the weight; in its place is one NaN that looks like all of it."""

    def forward(self, x: Tensor) -> Tensor:
        codes, scales = codes_and_scales(self)
        return multiply(x, codes, self.bias, scales)


def codes_and_scales(linear: Int8Linear) -> tuple[Tensor, Tensor]:
    _check(linear.weight)
    return linear.weight_codes, linear.weight_scales.float()


WEIGHTS = {Int8Linear: ("weight",)}


def to_int8(module: nn.Linear) -> None:
    """Replaces the weights of a layer for good; a `state_dict` gives what they were rounded to."""
    become(module, Int8Linear)
    for name in WEIGHTS[type(module)]:
        weight = getattr(module, name).detach()
        codes, scales = rounded(weight)
        module.register_buffer(f"{name}_codes", codes, persistent=False)
        module.register_buffer(f"{name}_scales", scales, persistent=False)
        # of the device, dtype and shape that others ask for, without the memory; writing to it is an error of torch's
        stand_in = weight.new_full((), torch.nan).expand(weight.shape)
        setattr(module, name, nn.Parameter(stand_in, requires_grad=False))
    module.register_state_dict_post_hook(_give_rounded)


def _check(weight: Tensor) -> None:
    if torch.is_grad_enabled():
        raise ValueError("int8 weights carry no gradient: generate or evaluate under torch.no_grad().")
    if weight.stride(-1) != 0:
        raise ValueError(
            "a weight was changed since it was rounded to int8, as merging an adapter or LoRA on routed experts does; "
            "do that first, or load the model without weights='int8'."
        )


def _give_rounded(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
    for name in WEIGHTS[type(module)]:
        codes, scales = getattr(module, f"{name}_codes"), getattr(module, f"{name}_scales")
        state_dict[prefix + name] = (codes * scales[..., None]).to(getattr(module, name).dtype)
