"""LoRA on the stacked weights of routed experts, computed beside their products and never added to the weights.

peft wraps each parameter of the experts in a `ParamWrapper`, one around the other, and adds every adapter to the
weights of all experts at each call. Here the factors are read from the wrappers and multiplied by the tokens, as for
any linear layer.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.accelerate import is_offloaded
from ..compat.hooks import has_hooks
from ..compat.peft import Adapter, acting_adapters, is_lora_parameter, stacked_factors
from ..compat.tensor_parallel import Split
from .products import Product, grouped_product
from .routed import DeepseekV2Experts

# torch's grouped products take rows whose size is a multiple of 16 bytes
RANK_MULTIPLE = 8


class Factors(NamedTuple):
    """What an adapter adds to a stacked weight [e out in]: scaling times b a.

    a  [e rank in]
    b  [e out rank]
    """

    a: Tensor
    b: Tensor
    scaling: float


def with_adapters(experts: nn.Module, used_by_all: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Experts that peft may have wrapped, as a function of tokens, chosen experts and their weights.

    Adapters whose factors can be read are multiplied beside the weights. peft applies any others its own way, which is
    to add them to the stacked weights. Raises ValueError where that would be wrong.

    If processes share the experts, each has whole factors, and multiplies by those parts that belong to its weights.
    `used_by_all` returns a factor whose gradient is summed over the processes that share a batch.
    """
    if isinstance(experts, DeepseekV2Experts):
        return experts
    inner, factors = unwrapped(experts) or (experts.get_base_layer(), None)
    if not isinstance(inner, DeepseekV2Experts) or factors == {}:
        return experts
    if is_offloaded(inner) and factors is None:
        raise ValueError(
            "expected plain LoRA, unmerged and the same for all rows, on offloaded routed experts; load the "
            "model with a device_map that offloads none."
        )
    weights, split = inner.weights, inner.weights.split
    if split:
        if factors is None:
            raise ValueError(
                "expected plain LoRA, unmerged and the same for all rows, on routed experts that are split over "
                "processes; load the model in one process."
            )
        own = {name: [_part(one, split[name], used_by_all) for one in added] for name, added in factors.items()}
        return partial(inner.call_with, _product_with(weights.product, own, weights.dtype))
    # offloaded experts go this way under every implementation: to call them would fetch weights without the adapters
    if factors and (is_offloaded(inner) or weights.allows_adapters):
        return partial(weights.forward_with, _product_with(weights.product, factors, weights.dtype))
    if weights.why_no_adapters is not None:
        raise ValueError(weights.why_no_adapters)
    return experts


def unwrapped(experts: nn.Module) -> tuple[nn.Module, dict[str, list[Factors]]] | None:
    """The module inside peft's wrappers and, by parameter, what active adapters add; None if only peft can tell.

    Without a wrapper, or with all adapters off or merged, nothing is added.
    """
    factors: dict[str, list[Factors]] = {}
    while is_lora_parameter(experts):
        adapters = acting_adapters(experts)
        # peft mixes adapters in a batch by hooks
        if has_hooks(experts) or adapters is None or not all(_is_plain(one) for one in adapters):
            return None
        if adapters:
            factors[experts.parameter_name] = [Factors(*stacked_factors(experts, one), one.scaling) for one in adapters]
        experts = experts.base_layer
    return experts, factors


def _part(factors: Factors, split: Split, used_by_all: Callable[[Tensor], Tensor]) -> Factors:
    """What this process adds to its part of a stacked weight [e out in]."""
    a, b = split.part_of(used_by_all(factors.a), (0, 2)), split.part_of(used_by_all(factors.b), (0, 1))
    return Factors(a, b, factors.scaling)


def _is_plain(adapter: Adapter) -> bool:
    return all(type(x) is nn.Linear and x.bias is None and not has_hooks(x) for x in (adapter.a, adapter.b))


def _product_with(product: Product, factors: dict[str, list[Factors]], dtype: torch.dtype) -> Product:
    """`product` plus the products of the factors in `dtype`; the frozen weight costs nothing in the backward pass."""

    def multiply(x: Tensor, name: str, ends: Tensor) -> Tensor:
        y = product(x, name, ends)
        if name not in factors:
            return y
        # with fewer rows than experts, most factors have no row to multiply
        add = _product_by_row if len(x) < len(ends) else _product_by_groups
        return y + add(x.to(dtype), factors[name], ends)

    return multiply


def _product_by_groups(x: Tensor, all_factors: list[Factors], ends: Tensor) -> Tensor:
    a = torch.cat([one.a for one in all_factors], dim=1)
    b = torch.cat([one.b * one.scaling for one in all_factors], dim=2)
    missing = -a.shape[1] % RANK_MULTIPLE
    # in 16 bits, inductor gives b a layout that torch's grouped products refuse; in float32 there is a fallback
    dtype = torch.float32 if torch.compiler.is_compiling() else x.dtype
    a, b = F.pad(a, (0, 0, 0, missing)).to(dtype), F.pad(b, (0, missing)).to(dtype)
    return grouped_product(grouped_product(x.to(dtype), a, ends), b, ends).to(x.dtype)


def _product_by_row(x: Tensor, all_factors: list[Factors], ends: Tensor) -> Tensor:
    """Row by row, in the factors' own dtype: the factors that are gathered are small."""
    expert = torch.searchsorted(ends, torch.arange(x.shape[0], device=x.device), right=True)
    # rows past the last end are of no expert here, and whatever they become is not used
    expert = expert.clamp(max=len(ends) - 1)
    rows = x[..., None]
    added = [torch.bmm(b[expert], torch.bmm(a[expert], rows.to(a.dtype))) * scaling for a, b, scaling in all_factors]
    return sum(added)[..., 0].to(x.dtype)
