"""Weights in int8 with one float32 scale per row: a token reads half the bytes, and the model takes half the memory.

Letters: e experts, n rows of a weight, k their width.
"""

import torch
from torch import Tensor, nn

from ...compat.accelerate import forward_inside_hooks
from ...compat.bound_functions import bind, replaces_method
from ...compat.torch import become
from ...experts.moe import STACKED, DeepseekV2Experts
from .library import WithOperators, multiply, multiply_by_experts


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [.. n k] as int8 codes [.. n k] and scales [.. n].

    The largest error of an element is 1/254 of the largest magnitude in its row.
    """
    largest = weight.abs().amax(dim=-1).float()
    scales = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    # a block of rows at a time, since float32 takes four times the memory of the codes
    for rows, scale, out in zip(*(x.flatten(0, -2).split(4096) for x in (weight, scales[..., None], codes))):
        out.copy_((rows.float() / scale).round_())
    return codes, scales


@replaces_method(is_equivalent=False)
def int8_linear(module: nn.Linear, x: Tensor) -> Tensor:
    codes, scales = codes_and_scales(module)
    return multiply(x, codes, module.bias, scales)


def codes_and_scales(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    _check_stand_in(linear.weight)
    return linear.weight_codes, linear.weight_scales


def multiplies_in_int8(linear: nn.Linear) -> bool:
    """True if the layer's own `forward` multiplies by an int8 weight."""
    return "weight_codes" in linear._buffers and getattr(forward_inside_hooks(linear), "func", None) is int8_linear


class Int8Experts(DeepseekV2Experts):
    state = "rounded to int8 for inference; load the model anew"

    def takes_grouped_products(self) -> bool:
        return False

    def stored(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes and scales of both weights, by which our operators multiply any tokens x."""
        _check_stand_in(self.gate_up_proj)
        _check_stand_in(self.down_proj)
        scales = self.gate_up_proj_scales.float(), self.down_proj_scales.float()
        return self.gate_up_proj_codes, self.down_proj_codes, *scales

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return multiply_by_experts(hidden_states, self.stored(hidden_states), top_k_index, top_k_weights)


class StandIn(nn.Parameter):
    """One NaN in place of a weight in int8, expanded: its device, dtype and shape without its memory.

    torch refuses to write to it.
    """

    def __deepcopy__(self, memo: dict) -> "StandIn":
        return memo.setdefault(id(self), stand_in_for(self.data))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return stand_in_for, (self.data,)


def stand_in_for(weight: Tensor) -> StandIn:
    return StandIn(weight.new_full((), torch.nan).expand(weight.shape), requires_grad=False)


def is_int8(module: nn.Module) -> bool:
    return isinstance(module, Int8Experts) or "weight_codes" in module._buffers


def to_int8(module: nn.Linear | DeepseekV2Experts) -> None:
    """Replaces the weights of a layer for good; `state_dict` gives the values that they were rounded to."""
    if isinstance(module, nn.Linear):
        bind(module, {"forward": int8_linear}, WithOperators)
    else:
        become(module, Int8Experts)
    for name in _weights_of(module):
        weight = getattr(module, name).detach()
        codes, scales = quantize_rows(weight)
        module.register_buffer(f"{name}_codes", codes, persistent=False)
        module.register_buffer(f"{name}_scales", scales, persistent=False)
        setattr(module, name, stand_in_for(weight))
    module.register_state_dict_post_hook(_give_rounded)


def _weights_of(module: nn.Linear | DeepseekV2Experts) -> tuple[str, ...]:
    return ("weight",) if isinstance(module, nn.Linear) else STACKED


def _check_stand_in(weight: Tensor) -> None:
    if torch.is_grad_enabled():
        raise ValueError("int8 weights carry no gradient: generate or evaluate under torch.no_grad().")
    if weight.stride(-1) != 0:
        raise ValueError(
            "a weight was changed since it was rounded to int8, as merging an adapter or LoRA on routed experts does; "
            "do that first, or load the model without weights='int8'."
        )


def _give_rounded(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
    for name in _weights_of(module):
        codes, scales = getattr(module, f"{name}_codes"), getattr(module, f"{name}_scales")
        state_dict[prefix + name] = (codes * scales[..., None]).to(getattr(module, name).dtype)
