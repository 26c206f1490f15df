"""The weight by which a linear layer acts at this moment, where it can be read exactly."""

from torch import Tensor, nn

from ..compat.hooks import has_hooks
from ..compat.peft import acting_adapters, is_lora_linear
from ..compat.transformers import local_rows


def effective_weight(linear: nn.Module) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
    """The weight [out in] by which `linear` acts, and pairs (B [out k], A [k in]) whose products add to it.

    Knows a bare Linear, one that tensor parallelism splits by rows, of which this process' rows are given, and peft's
    plain LoRA on a bare one. Anything else that may stand around a projection (DoRA, 8-bit weights, hooks, other ways
    of sharding, dropout at work, weights that are elsewhere) is None: its effect is known only to its own forward.
    Hooks that watch every module of the process, as profilers set them, are not looked at and not called.
    """
    if type(linear) is nn.Linear:
        weight = _bare_weight(linear) if _is_local(linear) else local_rows(linear)
        return None if weight is None else (weight, [])
    # .weight of a LoRA-wrapped layer is the base weight; the adapters' share must be added.
    if not is_lora_linear(linear) or has_hooks(linear):
        return None
    weight, adapters = _bare_weight(linear.base_layer), acting_adapters(linear)
    if weight is None or adapters is None:
        return None
    factors = [(_bare_weight(adapter.b), _bare_weight(adapter.a)) for adapter in adapters]
    if any(factor is None for pair in factors for factor in pair):
        return None
    return weight, [(b * adapter.scaling, a) for (b, a), adapter in zip(factors, adapters)]


def _is_local(linear: nn.Linear) -> bool:
    return type(linear.weight) in (nn.Parameter, Tensor)


def _bare_weight(linear: nn.Module) -> Tensor | None:
    if type(linear) is not nn.Linear or linear.bias is not None or has_hooks(linear) or not _is_local(linear):
        return None
    weight = linear.weight
    return None if weight.is_meta or not weight.is_floating_point() else weight
