"""The chosen experts, the shared experts or a dense MLP for few tokens; each weight is read once, as it is stored.

Reading the weights takes most of the time, so each program streams a block of rows of one weight. For a single token it
computes a matrix-vector product in registers ("vector"). For more tokens it multiplies rows of one expert with all
tokens that chose this expert, on tensor cores ("matrix"), so that every chosen expert is read once.

Only addresses and masks depend on data: grids follow from shapes, and no two programs add to the same element.

Letters: m tokens, e routed experts, k experts per token, d model width, f width of one expert, g width of the shared
experts together.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...experts.codec import Packed
from .triton_matrix import activate_matrix, down_matrix, sum_parts
from .triton_packed import as_kernel_weight, nf4_table, shape_of
from .triton_tiles import Norm, Tiles, block_at_once, block_of, check, dot_dtype, is_vector, tokens_at_once
from .triton_vector import activate_vector, down_vector

# columns of the shared experts' down projection that one program of a matrix product takes; one routed expert of
# DeepSeek-V2-Lite has 1408, so that all programs have the same work
PIECE = 1408
# elements of one output token that a program of `sum_parts` takes
SUM_BLOCK = 256


class Plan(NamedTuple):
    """The tiles of the two products of an expert."""

    inner: Tiles  # gate and up
    outer: Tiles  # down


# the fastest on an H200 at DeepSeek-V2-Lite's widths
VECTOR = Plan(Tiles(2, 2048, 4, 1), Tiles(8, 512, 4, 4))
MATRIX = Plan(Tiles(64, 128, 4, 3), Tiles(64, 128, 4, 4))
MATRIX_FOR_MANY = Plan(Tiles(64, 64, 4, 4), Tiles(64, 64, 4, 4))


def plan_for(m: int, dtype: torch.dtype) -> Plan:
    """A single token shares no expert with other tokens, so tensor cores only help several tokens."""
    if m == 1:
        return VECTOR
    plan = MATRIX if m <= 32 else MATRIX_FOR_MANY
    if dtype != torch.float32:
        return plan
    # as many bytes of shared memory as in half precision
    return Plan(*(tiles._replace(width=tiles.width // 2) for tiles in plan))


def experts(
    x: Tensor,  # [m d]
    gate_up: Tensor | Packed,  # [e 2f d]  gate rows first
    down: Tensor | Packed,  # [e d f]
    chosen: Tensor,  # [m k]  int64, a token chooses no expert twice
    weights: Tensor,  # [m k]  float32
    shared: tuple[Tensor, Tensor, Tensor] | None = None,  # gate [g d], up [g d], down [d g]
    residual: Tensor | None = None,  # [m d]
    *,
    norm: Norm | None = None,
    plan: Plan | None = None,
) -> Tensor:  # [m d]  in the dtype of x
    """The weighted sum of each token's experts, plus the shared experts, plus the residual.

    A norm is applied to x first, but not to the residual; only a vector plan takes one. A choice below 0 or past the
    last expert belongs to another rank and adds nothing. Sums are in float32 and their order depends on shapes only;
    activations between the two products are in the dtype of x, and so is what shared experts add to packed ones.
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.2.1, eq. 20.
    """
    assert chosen.shape == weights.shape == (len(x), chosen.shape[1])
    for choice, dtype in ((chosen, torch.int64), (weights, torch.float32)):
        assert choice.is_contiguous()
        assert choice.dtype == dtype
    if shared is not None and isinstance(down, Packed):
        # a program reads one kind of weights
        residual, shared = mlp(x, *shared, residual=residual, norm=norm, plan=plan), None
    return _swiglu(x, (gate_up, down, chosen, weights), shared, residual, norm, plan)


def mlp(
    x: Tensor,  # [m d]
    gate: Tensor,  # [g d]
    up: Tensor,  # [g d]
    down: Tensor,  # [d g]
    residual: Tensor | None = None,  # [m d]
    *,
    norm: Norm | None = None,
    plan: Plan | None = None,
) -> Tensor:  # [m d]  in the dtype of x
    """down(silu(gate x) * up x) plus the residual, as `experts` computes shared experts."""
    return _swiglu(x, None, (gate, up, down), residual, norm, plan)


def _swiglu(
    x: Tensor,
    routed: tuple[Tensor | Packed, Tensor | Packed, Tensor, Tensor] | None,  # gate_up, down, chosen, weights
    shared: tuple[Tensor, Tensor, Tensor] | None,
    residual: Tensor | None,
    norm: Norm | None,
    plan: Plan | None,
) -> Tensor:
    m, d = x.shape
    gate_up, down, chosen, weights = routed or (None, None, None, None)
    gate, up, shared_down = shared or (None, None, None)
    e, _, f = shape_of(down) if routed else (0, d, 0)
    gate_up = as_kernel_weight(gate_up, (e, 2 * f, d), x.dtype)
    down = as_kernel_weight(down, (e, d, f), x.dtype)
    assert gate_up.bits == down.bits
    g = shared_down.shape[1] if shared else 0
    check(x, shared or (), norm)
    assert shared is None or (gate.shape == up.shape == (g, d) and shared_down.shape == (d, g))
    assert residual is None or (residual.shape == (m, d) and residual.stride(1) == 1)
    k = chosen.shape[1] if routed else 0
    # the activations of routed pairs [mk f], then those of the shared experts [m g]
    hidden = x.new_empty(m * (k * f + g))
    out = x.new_empty(m, d)
    table = nf4_table(x.device) if down.bits == 4 else None
    inputs = (chosen, weights, gate_up.tensor, gate_up.scales, table, gate, up)
    outputs = (chosen, down.tensor, down.scales, table, shared_down)
    added = (residual, 0 if residual is None else residual.stride(0))
    sizes = (m, e, d, f, g)
    kinds = {"K": k, "SHARED": shared is not None, "BITS": down.bits}
    group_sizes = gate_up.group_size, down.group_size

    plan = plan or plan_for(m, x.dtype)
    assert norm is None or is_vector(plan.inner)
    if is_vector(plan.inner):
        _launch_vector(x, norm, inputs, outputs, added, hidden, out, sizes, kinds, group_sizes, plan)
    else:
        _launch_matrix(x, inputs, outputs, added, hidden, out, sizes, kinds, group_sizes, plan)
    return out


def _launch_vector(x, norm, inputs, outputs, added, hidden, out, sizes, kinds, group_sizes, plan: Plan) -> None:
    """Computes each token separately."""
    m, e, d, f, g = sizes
    inner, outer = plan
    weight, eps = norm or (None, 0.0)
    blocks = kinds["K"] * triton.cdiv(f, inner.rows) + triton.cdiv(g, inner.rows)
    block = block_at_once(inner, d) | {"GROUP_SIZE": group_sizes[0]}
    activate_vector[blocks, m](x, x.stride(0), weight, *inputs, hidden, m, e, f, g, eps, **kinds, **block)
    grid = triton.cdiv(d, outer.rows), m
    block = block_of(outer, f, g) | {"GROUP_SIZE": group_sizes[1]}
    down_vector[grid](hidden, *outputs, *added, out, *sizes, **kinds, **block)


def _launch_matrix(x, inputs, outputs, added, hidden, out, sizes, kinds, group_sizes, plan: Plan) -> None:
    """Computes all tokens that chose the same expert together."""
    m, e, d, f, g = sizes
    k, (inner, outer) = kinds["K"], plan
    tokens = tokens_at_once(m)
    tiles = triton.cdiv(m, tokens)
    # tokens that chose the same expert are a group; there are no more groups than pairs of token and choice, or experts
    groups = min(min(tokens, m) * k, e)
    of_groups = {"TOKENS": tokens, "BY_PAIR": groups < e, "K_PADDED": triton.next_power_of_2(max(k, 1))}
    kinds = kinds | of_groups | {"DOT": dot_dtype(out)}
    blocks = groups * triton.cdiv(f, inner.rows) + triton.cdiv(g, inner.rows)
    block = block_of(inner, d) | {"GROUP_SIZE": group_sizes[0]}
    activate_matrix[blocks, tiles](x, x.stride(0), *inputs, hidden, *sizes, groups, **kinds, **block)
    piece = triton.cdiv(PIECE, outer.width) * outer.width
    pieces = triton.cdiv(g, piece)
    # a row for each routed pair [mk d], then for each piece of the shared experts the rows of all tokens [m d]
    parts = out.new_empty(m * (k + pieces), d, dtype=torch.float32)
    grid = triton.cdiv(d, outer.rows) * (groups + pieces), tiles
    block = block_of(outer, f, g) | {"PIECE": piece, "GROUP_SIZE": group_sizes[1]}
    down_matrix[grid](hidden, *outputs, parts, *sizes, groups, **kinds, **block)
    sums = {"K": k, "PIECES": pieces, "BLOCK": SUM_BLOCK}
    sum_parts[m, triton.cdiv(d, SUM_BLOCK)](parts, outputs[0], *added, out, m, e, d, **sums)
