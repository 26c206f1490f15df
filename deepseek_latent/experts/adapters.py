"""LoRA on the stacked weights of routed experts, computed beside their products: no weight with an adapter is made.

peft wraps a parameter of experts in a `ParamWrapper`, one around the other, and adds every adapter to all experts'
weights at each call. Here the wrappers are read and their factors applied to the tokens, as for any linear layer.
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
from .products import Product, grouped_product
from .routed import DeepseekV2Experts

# torch's grouped products take rows of a multiple of 16 bytes
RANK_MULTIPLE = 8


class Factors(NamedTuple):
    """What an adapter adds to a stacked weight [e out in]: scaling times b a.

    a  [e rank in]
    b  [e out rank]
    """

    a: Tensor
    b: Tensor
    scaling: float


def with_adapters(experts: nn.Module) -> Callable[..., Tensor]:
    """Experts that peft may have wrapped, as a function of tokens, chosen experts and their weights.

    Adapters whose factors can be read are multiplied beside the weights. peft applies any others its own way, which is
    to add them to the stacked weights. Raises ValueError where that would be wrong.
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
    weights = inner.weights
    # calling offloaded experts would fetch the weights without the adapters, however they are multiplied
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
    # in 16 bits, inductor lays B out as torch's grouped products refuse it; in float32 transformers has another way
    dtype = torch.float32 if torch.compiler.is_compiling() else x.dtype
    a, b = F.pad(a, (0, 0, 0, missing)).to(dtype), F.pad(b, (0, missing)).to(dtype)
    return grouped_product(grouped_product(x.to(dtype), a, ends), b, ends).to(x.dtype)


def _product_by_row(x: Tensor, all_factors: list[Factors], ends: Tensor) -> Tensor:
    """Row by row, in the factors' own dtype: the factors that are gathered are small."""
    expert = torch.searchsorted(ends, torch.arange(x.shape[0], device=x.device), right=True)
    rows = x[..., None]
    added = [torch.bmm(b[expert], torch.bmm(a[expert], rows.to(a.dtype))) * scaling for a, b, scaling in all_factors]
    return sum(added)[..., 0].to(x.dtype)
