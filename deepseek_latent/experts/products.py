"""Routed experts as grouped products: tokens in the order of experts, so that each weight meets its rows at once.

How a weight is multiplied (as it is, with adapters beside it, out of packed storage) is a `Product` of its own.

Letters: m tokens, e experts, k experts per token, d model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..compat.transformers import grouped_linear

# rows [mk in] in the order of experts, "gate_up_proj" or "down_proj", and where each expert's rows end [e], to [mk out]
Product = Callable[[Tensor, str, Tensor], Tensor]


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [mk in] times the weights [e out in] of their experts."""
    return grouped_linear(x, weight, ends)


def routed_sum(
    product: Product,
    act_fn: nn.Module,
    hidden_states: Tensor,  # [m d]
    top_k_index: Tensor,  # [m k]
    top_k_weights: Tensor,  # [m k]
    *,
    num_experts: int,
) -> Tensor:  # [m d]
    """The weighted sum of every token's experts."""
    num_tokens, k = top_k_index.shape
    in_a_row, order = top_k_index.flatten().sort(stable=True)
    # no size that depends on data, so that it compiles into one graph
    numbers = torch.arange(num_experts, device=order.device)
    ends = torch.searchsorted(in_a_row, numbers, right=True, out_int32=True)
    gate, up = product(hidden_states[order // k], "gate_up_proj", ends).chunk(2, dim=-1)
    rows = product(act_fn(gate) * up, "down_proj", ends)
    # back into the order of tokens, so that a token's experts are summed without atomic additions
    in_order = torch.empty_like(order).index_copy_(0, order, torch.arange(order.shape[0], device=order.device))
    weighed = rows[in_order].view(num_tokens, k, -1) * top_k_weights[..., None]
    return weighed.sum(dim=1).to(hidden_states.dtype)
