"""Routed experts as grouped products: tokens are sorted by expert, so that each weight is read once for all its tokens.

How a weight is multiplied (as it lies in memory, with adapters beside it, from packed storage) is a `Product`.

Letters: m tokens, e experts, k experts per token, d model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..compat.transformers import grouped_linear

# product(x, name, ends) multiplies rows x [mk in], which are tokens sorted by expert, by the weight `name` of their
# experts, "gate_up_proj" or "down_proj"; ends [e] is the end offset of each expert's rows. The result is [mk out].
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
    some_elsewhere: bool = False,
) -> Tensor:  # [m d]
    """The weighted sum of every token's experts.

    With `some_elsewhere`, experts whose index is not below `num_experts` are other processes' and add nothing.
    """
    num_tokens, k = top_k_index.shape
    sorted_experts, order = top_k_index.flatten().sort(stable=True)
    # no size depends on data, so that this compiles into one graph
    numbers = torch.arange(num_experts, device=order.device)
    ends = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
    rows = hidden_states[order // k]
    if some_elsewhere:
        # products leave rows past the last end as memory was, also those of gradients
        absent = (sorted_experts >= num_experts)[:, None]
        rows, products = rows.masked_fill(absent, 0), product

        def product(*given) -> Tensor:
            return products(*given).masked_fill(absent, 0)

    gate, up = product(rows, "gate_up_proj", ends).chunk(2, dim=-1)
    rows = product(act_fn(gate) * up, "down_proj", ends)
    # back into the order of tokens, so that a token's experts are summed without atomic additions
    place_of_row = torch.empty_like(order).index_copy_(0, order, torch.arange(order.shape[0], device=order.device))
    weighted = rows[place_of_row].view(num_tokens, k, -1) * top_k_weights[..., None]
    return weighted.sum(dim=1).to(hidden_states.dtype)
