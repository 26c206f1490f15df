"""Linear layers in int8 with one scale per row: a token reads half the bytes, and the weights take half the memory.

Letters: n rows of a weight, k their width.
"""

import torch
from torch import Tensor, nn

from ...compat.accelerate import forward_inside_hooks
from ...compat.bound_functions import bind, replaces_method
from ...experts.codec import Packed, pack
from .library import WithOperators, multiply

# rows of a weight that are rounded at a time, since float32 takes several times the memory of the codes
ROWS_AT_ONCE = 4096


@replaces_method(is_equivalent=False)
def int8_linear(module: nn.Linear, x: Tensor) -> Tensor:
    codes, scales = codes_and_scales(module)
    return multiply(x, codes, module.bias, scales)


def codes_and_scales(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """The weight as codes [n k] and scales [n 1]. Raises ValueError under autograd, or if the weight was changed."""
    _check_usable(linear.weight)
    return linear.weight_codes, linear.weight_scales


def multiplies_in_int8(linear: nn.Linear) -> bool:
    """True if the layer's own `forward` multiplies by an int8 weight."""
    return "weight_codes" in linear._buffers and getattr(forward_inside_hooks(linear), "func", None) is int8_linear


class NanWeight(nn.Parameter):
    """A parameter in the place of a weight in int8: one NaN, expanded to the weight's shape, which takes no memory.

    torch refuses to write to it in place.
    """

    def __deepcopy__(self, memo: dict) -> "NanWeight":
        return memo.setdefault(id(self), nan_weight_like(self.data))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return nan_weight_like, (self.data,)


def nan_weight_like(weight: Tensor) -> NanWeight:
    return NanWeight(weight.new_full((), torch.nan).expand(weight.shape), requires_grad=False)


def to_int8(linear: nn.Linear) -> None:
    """Replaces a layer's weight for good by codes and scales; `state_dict` has the values that it was rounded to."""
    weight = linear.weight.detach()
    parts = [pack(rows, bits=8, group=None) for rows in weight.split(ROWS_AT_ONCE)]
    codes, scales = (torch.cat(part) for part in zip(*parts))
    linear.register_buffer("weight_codes", codes, persistent=False)
    linear.register_buffer("weight_scales", scales, persistent=False)
    linear.weight = nan_weight_like(weight)
    bind(linear, {"forward": int8_linear}, WithOperators)
    linear.register_state_dict_post_hook(_save_rounded_weight)


def _check_usable(weight: Tensor) -> None:
    if torch.is_grad_enabled():
        raise ValueError(
            "int8 weights carry no gradient: generate or evaluate under torch.no_grad(), and to train, load the model "
            "without weights='int8'."
        )
    if weight.stride(-1) != 0:
        raise ValueError(
            "a weight was changed since it was rounded to int8, as merging an adapter does; do that first, or load "
            "the model without weights='int8'."
        )


def _save_rounded_weight(linear: nn.Linear, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
    rounded = Packed(linear.weight_codes, linear.weight_scales).unpacked()
    state_dict[f"{prefix}weight"] = rounded.to(linear.weight.dtype)
