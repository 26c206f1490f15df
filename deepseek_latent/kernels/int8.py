"""Weights in int8, one float32 scale per row: half the bytes to read for a token, and half the memory.

Letters: n rows of a weight, k their width, e experts, d model width, f width of an expert.
"""

import torch
from torch import Tensor, nn

from ..moe import DeepseekV2Experts

operators = torch.ops.deepseek_latent


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
    """`codes` [n k] and `scales` [n] stand for the weight, of which the shape is left."""

    def forward(self, x: Tensor) -> Tensor:
        _check_gradient()
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        y = operators.linear(tokens, self.codes, self.scales).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int8Experts(DeepseekV2Experts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        _check_gradient()
        return operators.experts(
            hidden_states.contiguous(),
            self.gate_up_codes,
            self.down_codes,
            top_k_index,
            top_k_weights.float(),
            self.gate_up_scales,
            self.down_scales,
        )


def to_int8(module: nn.Linear | DeepseekV2Experts) -> None:
    """Replaces the weights of a layer for good; what would need them, saving above all, is refused from then on."""
    if isinstance(module, nn.Linear):
        weights = {"weight": ("codes", "scales")}
        module.__class__ = Int8Linear
    else:
        weights = {name: (f"{name[:-5]}_codes", f"{name[:-5]}_scales") for name in ("gate_up_proj", "down_proj")}
        module.__class__ = Int8Experts
    for name, names in weights.items():
        weight = getattr(module, name)
        for buffer_name, buffer in zip(names, rounded(weight.detach())):
            module.register_buffer(buffer_name, buffer, persistent=False)
        setattr(module, name, nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False))
    module.register_state_dict_pre_hook(_refuse_state_dict)


def _check_gradient() -> None:
    if torch.is_grad_enabled():
        raise ValueError("int8 weights carry no gradient: generate or evaluate under torch.no_grad().")


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ValueError(
        f"{prefix}weight is held in int8 only: this model can neither be saved nor named in a file of cached tokens; "
        "load it again without weights='int8'."
    )
