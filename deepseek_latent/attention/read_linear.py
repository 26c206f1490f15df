"""Reads the weight that a linear layer applies, with its LoRA adapters, if it can be read exactly."""

from torch import Tensor, nn

from ..compat.hooks import has_hooks
from ..compat.peft import acting_adapters, is_lora_linear
from ..compat.transformers import local_rows


def read_linear(linear: nn.Module) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
    """Returns the weight [out in] of `linear`, and pairs (B [out k], A [k in]) whose products are added to it.

    It reads a plain Linear, a Linear that tensor parallelism splits by rows (the result has this process's rows), and
    peft's plain LoRA on a plain Linear. For anything else that may wrap a projection (DoRA, 8-bit weights, hooks, other
    sharding, active dropout, offloaded weights) it returns None, since only the module's own forward has its effect.
    Global hooks on all modules, which profilers register, are not considered, and a weight that is read skips them.
    """
    if type(linear) is nn.Linear:
        weight = _plain_weight(linear) if _is_local(linear) else local_rows(linear)
        return None if weight is None else (weight, [])
    # .weight of a LoRA layer is the base weight, so the adapters' products must be added
    if not is_lora_linear(linear) or has_hooks(linear):
        return None
    weight, adapters = _plain_weight(linear.base_layer), acting_adapters(linear)
    if weight is None or adapters is None:
        return None
    factors = [(_plain_weight(adapter.b), _plain_weight(adapter.a)) for adapter in adapters]
    if any(factor is None for pair in factors for factor in pair):
        return None
    return weight, [(b * adapter.scaling, a) for (b, a), adapter in zip(factors, adapters)]


def _is_local(linear: nn.Linear) -> bool:
    return type(linear.weight) in (nn.Parameter, Tensor)


def _plain_weight(linear: nn.Module) -> Tensor | None:
    if type(linear) is not nn.Linear or linear.bias is not None or has_hooks(linear) or not _is_local(linear):
        return None
    weight = linear.weight
    return None if weight.is_meta or not weight.is_floating_point() else weight
