"""The router of a mixture of experts: the logits of all experts for each token, and the choice among them.

Letters: m tokens, d model width, e routed experts, k experts per token.

Grids depend on shapes only and nothing waits for the host, so every launch can be captured in a CUDA graph.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .triton_overlap import launch_options, wait_for_inputs
from .triton_tiles import ELEMENTS_PER_LOAD


def route(
    x: Tensor,  # [m d]
    weight: Tensor,  # [e d]
    k: int,
    n_group: int,
    topk_group: int,
    *,
    normalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # logits [m e] float32, weights [m k] float32, experts [m k] int64
    """Scores every expert for every token and picks k, as `DeepseekV2MoEGate` does; `n_group` 1 is `greedy`.

    The best expert comes first; among equal ones, the one with the lowest index.
    """
    logits = router_logits(x, weight)
    choice = choose(logits, k, n_group, topk_group, normalize=normalize, scaling_factor=scaling_factor)
    return logits, *choice


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [m d] times weight^T [e d], [m e] in float32, in which products of half precision are exact."""
    # above 16 tokens tensor cores win, since they read a weight once for all tokens of a tile
    if x.shape[0] <= 16:
        return split_logits(x, weight)
    if x.dtype == weight.dtype and x.dtype.itemsize == 2:
        return multiplied_logits(x, weight)
    return F.linear(x.float(), weight.float())


def split_logits(x: Tensor, weight: Tensor) -> Tensor:
    """`router_logits` of few tokens: a program splits the rows of one or two experts among its threads."""
    (m, d), e = x.shape, weight.shape[0]
    assert weight.shape[1] == d
    assert x.stride(1) == weight.stride(1) == 1
    logits = x.new_empty(m, e, dtype=torch.float32)
    if m == 0:
        return logits
    tokens = min(triton.next_power_of_2(m), 4)
    experts = 1 if m == 1 else 2
    _split_logits_kernel[(triton.cdiv(e, experts), triton.cdiv(m, tokens))](
        x,
        weight,
        logits,
        m,
        x.stride(0),
        weight.stride(0),
        D=d,
        E=e,
        TOKENS=tokens,
        EXPERTS=experts,
        BLOCK=min(triton.next_power_of_2(d), 32 * 4 * ELEMENTS_PER_LOAD),
        num_warps=4,
        **launch_options(x),
    )
    return logits


# one compiled kernel serves any number of tokens
@triton.jit(do_not_specialize=["m"])
def _split_logits_kernel(
    x,
    weight,
    logits,
    m,
    x_stride,
    weight_stride,
    D: tl.constexpr,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Programs [blocks of experts, blocks of tokens]; threads keep partial sums, which are added once at the end."""
    expert = (tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS))[None, :, None]
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    w_at, x_at = weight + expert.to(tl.int64) * weight_stride + column, x + token.to(tl.int64) * x_stride + column
    # unrolled, so that the loads of all steps are issued before the first is used
    parts = ()
    for first in tl.static_range(0, D, BLOCK):
        parts += (tl.load(w_at + first, mask=(expert < E) & (first + column < D), other=0.0),)
    wait_for_inputs(OVERLAPS)
    total = tl.zeros((TOKENS, EXPERTS, BLOCK), tl.float32)
    for first in tl.static_range(0, D, BLOCK):
        value = tl.load(x_at + first, mask=(token < m) & (first + column < D), other=0.0)
        total += value.to(tl.float32) * parts[first // BLOCK].to(tl.float32)
    inside = (token < m) & (expert < E)
    tl.store(logits + token * E + expert, tl.sum(total, axis=2, keep_dims=True), mask=inside)


def multiplied_logits(x: Tensor, weight: Tensor) -> Tensor:
    """`router_logits` of many tokens in half precision, on tensor cores."""
    (m, d), e = x.shape, weight.shape[0]
    assert weight.shape[1] == d
    assert x.stride(1) == weight.stride(1) == 1
    logits = x.new_empty(m, e, dtype=torch.float32)
    if m == 0:
        return logits
    # with few programs, the time is that of the loop over one row, so its steps are wide; with many tokens, a program
    # takes more experts, so that each token is read fewer times
    tokens, experts, columns = (16, 16, 256) if m <= 512 else (32, 64, 128)
    _multiplied_logits_kernel[(triton.cdiv(m, tokens), triton.cdiv(e, experts))](
        x,
        weight,
        logits,
        m,
        x.stride(0),
        weight.stride(0),
        D=d,
        E=e,
        TOKENS=tokens,
        EXPERTS=experts,
        COLUMNS=columns,
        # only Triton's interpreter takes CPU tensors, and it multiplies bfloat16 as if its bits were integers
        WIDENS=not x.is_cuda,
        num_warps=4,
        num_stages=4,
        **launch_options(x),
    )
    return logits


@triton.jit(do_not_specialize=["m"])
def _multiplied_logits_kernel(
    x,
    weight,
    logits,
    m,
    x_stride,
    weight_stride,
    D: tl.constexpr,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Programs [blocks of tokens, blocks of experts]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    column = tl.arange(0, COLUMNS)
    x_at = x + token[:, None].to(tl.int64) * x_stride + column[None, :]
    w_at = weight + expert[None, :].to(tl.int64) * weight_stride + column[:, None]
    total = tl.zeros((TOKENS, EXPERTS), tl.float32)
    wait_for_inputs(OVERLAPS)
    for first in range(0, D, COLUMNS):
        is_column = first + column < D
        value = tl.load(x_at + first, mask=(token < m)[:, None] & is_column[None, :], other=0.0)
        w = tl.load(w_at + first, mask=(expert < E)[None, :] & is_column[:, None], other=0.0)
        if WIDENS:
            value, w = value.to(tl.float32), w.to(tl.float32)
        total = tl.dot(value, w, total)
    at = logits + token[:, None].to(tl.int64) * E + expert[None, :]
    tl.store(at, total, mask=(token < m)[:, None] & (expert < E)[None, :])


def choose(
    logits: Tensor,  # [m e] float32
    k: int,
    n_group: int,
    topk_group: int,
    *,
    normalize: bool,
    scaling_factor: float,
    overlap: bool = False,
) -> tuple[Tensor, Tensor]:  # weights [m k] float32, experts [m k] int64
    """Weights and experts for the router's logits, as `DeepseekV2MoEGate.choose` gives them."""
    m, e = logits.shape
    assert e % n_group == 0
    assert k <= e
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    weights, experts = logits.new_empty(m, k), logits.new_empty(m, k, dtype=torch.int64)
    if m == 0:
        return weights, experts
    _choose_kernel[(m,)](
        logits,
        weights,
        experts,
        scaling_factor,
        K=k,
        GROUPS=n_group,
        KEPT_GROUPS=topk_group,
        PER_GROUP=e // n_group,
        GROUPS_BLOCK=triton.next_power_of_2(n_group),
        PER_GROUP_BLOCK=triton.next_power_of_2(e // n_group),
        K_BLOCK=triton.next_power_of_2(k),
        NORMALIZES=normalize,
        # one warp reduces without a barrier
        num_warps=1,
        **launch_options(logits, overlap),
    )
    return weights, experts


@triton.jit
def _choose_kernel(
    logits,
    weights,
    experts,
    scaling_factor,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    PER_GROUP_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    NORMALIZES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program per token; its logits are a tile [GROUPS_BLOCK PER_GROUP_BLOCK], and each row is a group.

    Logits are compared as integers of the same order, since a warp finds the largest of 32 integers in one instruction.
    """
    NOT_KEPT: tl.constexpr = -(1 << 31) + 1
    NO_EXPERT: tl.constexpr = -(1 << 31)
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUPS_BLOCK), tl.arange(0, PER_GROUP_BLOCK)
    exists = (group < GROUPS)[:, None] & (member < PER_GROUP)[None, :]
    at = logits + token * (GROUPS * PER_GROUP) + group[:, None] * PER_GROUP + member[None, :]
    wait_for_inputs(OVERLAPS)
    logit = tl.load(at, mask=exists, other=float("-inf"))
    keys = tl.where(exists, _ordered(logit), NO_EXPERT)
    largest = _logit_of(tl.max(tl.max(keys, axis=1), axis=0))
    total = tl.sum(tl.sum(tl.exp(logit - largest), axis=1), axis=0)
    if KEPT_GROUPS < GROUPS:
        best = tl.max(keys, axis=1)
        is_kept = group < 0
        for _ in tl.static_range(KEPT_GROUPS):
            chosen = group == _lowest_place(best, group, tl.max(best, axis=0))
            is_kept |= chosen
            best = tl.where(chosen, NO_EXPERT, best)
        keys = tl.where(is_kept[:, None] | (keys == NO_EXPERT), keys, NOT_KEPT)
    keys = tl.reshape(keys, (GROUPS_BLOCK * PER_GROUP_BLOCK,))
    place, rank = tl.arange(0, GROUPS_BLOCK * PER_GROUP_BLOCK), tl.arange(0, K_BLOCK)
    picked_keys, picked = tl.full((K_BLOCK,), NOT_KEPT, tl.int32), tl.zeros((K_BLOCK,), tl.int32)
    for i in tl.static_range(K):
        key = tl.max(keys, axis=0)
        where = _lowest_place(keys, place, key)
        picked_keys = tl.where(rank == i, key, picked_keys)
        picked = tl.where(rank == i, where, picked)
        keys = tl.where(place == where, NO_EXPERT, keys)
    power = tl.exp(_logit_of(picked_keys) - largest)
    weight = tl.where(picked_keys == NOT_KEPT, 0.0, tl.div_rn(power, tl.zeros_like(power) + total))
    if NORMALIZES:
        weight = tl.div_rn(weight, tl.zeros_like(weight) + (tl.sum(weight, axis=0) + 1e-20))
    else:
        weight *= scaling_factor
    expert = picked // PER_GROUP_BLOCK * PER_GROUP + picked % PER_GROUP_BLOCK
    out = token * K + rank
    tl.store(weights + out, weight, mask=rank < K)
    tl.store(experts + out, expert.to(tl.int64), mask=rank < K)


@triton.jit
def _ordered(x):
    """Integers that sort like these float32 numbers; NaN is the largest, as in torch, so every chosen expert exists."""
    # adding zero makes -0 equal to 0
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@triton.jit
def _logit_of(key):
    """The float32 number that `_ordered` turned into this key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _lowest_place(keys, places, key):
    return tl.min(tl.where(keys == key, places, 0x7FFFFFFF), axis=0)
