"""Multi-head Latent Attention, one query token and one head at a time."""

from typing import Any

import torch
from torch import Tensor

from .layers import in_float64, linear, rms_norm
from .rotary import rotate, softmax_scale

LATENT_NORM_EPS = 1e-6  # the released code leaves both latent norms at their class default


def attention(
    q_content: Tensor,  # [b s h n]
    q_rotary: Tensor,  # [b s h r]  rotated
    latent: Tensor,  # [b t c]  after its norm
    k_rotary: Tensor,  # [b t r]  rotated, one for all heads
    w_uk: Tensor,  # [h n c]
    w_uv: Tensor,  # [h v c]
    visible: Tensor,  # [b s t]  bool, True where a query may look
    scale: float,
) -> Tensor:  # [b s h v]
    """Eqs. 40, 42 and 44-46 as written: expand the latents into keys and values, then attend.

    Tokens a query may not see are never read. A query that sees nothing has zero context. Float64.
    """
    q_content, q_rotary, latent, k_rotary, w_uk, w_uv = (
        tensor.to(torch.float64) for tensor in (q_content, q_rotary, latent, k_rotary, w_uk, w_uv)
    )
    num_sequences, num_queries, num_heads, _ = q_content.shape
    context = latent.new_zeros(num_sequences, num_queries, num_heads, w_uv.shape[1])
    for sequence in range(num_sequences):
        for token in range(num_queries):
            seen = visible[sequence, token].nonzero().flatten()
            if len(seen) == 0:
                continue
            for head in range(num_heads):
                # eq. 40
                query = torch.cat([q_content[sequence, token, head], q_rotary[sequence, token, head]])
                key_content = latent[sequence, seen] @ w_uk[head].T  # eq. 42
                keys = torch.cat([key_content, k_rotary[sequence, seen]], dim=-1)  # eq. 44
                values = latent[sequence, seen] @ w_uv[head].T  # eq. 45
                weights = torch.softmax(keys @ query * scale, dim=0)
                context[sequence, token, head] = weights @ values  # eq. 46
    return context


def absorbed_attention(
    q_content: Tensor,  # [b s h n]
    q_rotary: Tensor,  # [b s h r]  rotated
    latent: Tensor,  # [b t c]  after its norm
    k_rotary: Tensor,  # [b t r]  rotated, one for all heads
    w_uk: Tensor,  # [h n c]
    w_uv: Tensor,  # [h v c]
    visible: Tensor,  # [b s t]  bool, True where a query may look
    scale: float,
) -> Tensor:  # [b s h v]
    """`attention` without keys or values: W^UK goes into the query, W^UV comes after the weighted sum.

    Equal because q . (W^UK c) = (q W^UK) . c, and sum_j p_j (W^UV c_j) = W^UV (sum_j p_j c_j).
    Float64. Source: paper 2.1.2, the remark after eq. 11, and the end of Appendix C.
    """
    q_content, q_rotary, latent, k_rotary, w_uk, w_uv = (
        tensor.to(torch.float64) for tensor in (q_content, q_rotary, latent, k_rotary, w_uk, w_uv)
    )
    num_sequences, num_queries, num_heads, _ = q_content.shape
    context = latent.new_zeros(num_sequences, num_queries, num_heads, w_uv.shape[1])
    for sequence in range(num_sequences):
        for token in range(num_queries):
            seen = visible[sequence, token].nonzero().flatten()
            if len(seen) == 0:
                continue
            for head in range(num_heads):
                q_absorbed = q_content[sequence, token, head] @ w_uk[head]  # [c]
                scores = latent[sequence, seen] @ q_absorbed
                scores = scores + k_rotary[sequence, seen] @ q_rotary[sequence, token, head]
                latent_context = torch.softmax(scores * scale, dim=0) @ latent[sequence, seen]  # [c]
                context[sequence, token, head] = w_uv[head] @ latent_context
    return context


def queries_and_latents(
    config: Any,
    weights: dict[str, Tensor],  # of one layer, named after `self_attn.`, float64
    hidden: Tensor,  # [b s d]
    positions: Tensor,  # [b s]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [b s h n], [b s h r], [b s c], [b s r]
    """Everything one layer computes per token before tokens meet: q^C, q^R, c^KV after its norm, k^R.

    Source: eqs. 37-39, 41 and 43; the norms on the two latents are those of paper 3.1.2.
    """
    content, rotary = config.qk_nope_head_dim, config.qk_rope_head_dim
    if config.q_lora_rank is None:
        query = linear(weights, "q_proj", hidden)
    else:
        query_latent = linear(weights, "q_a_proj", hidden, has_bias=config.attention_bias)  # eq. 37
        query_latent = rms_norm(query_latent, weights["q_a_layernorm.weight"], LATENT_NORM_EPS)
        query = linear(weights, "q_b_proj", query_latent)  # eqs. 38, 39
    query = query.unflatten(-1, (config.num_attention_heads, content + rotary))
    q_content, q_unrotated = query.split([content, rotary], dim=-1)

    # eqs. 41 and 43, rows of W^DKV first
    latent_and_key = linear(weights, "kv_a_proj_with_mqa", hidden, has_bias=config.attention_bias)
    latent, k_unrotated = latent_and_key.split([config.kv_lora_rank, rotary], dim=-1)
    latent = rms_norm(latent, weights["kv_a_layernorm.weight"], LATENT_NORM_EPS)

    q_rotary, k_rotary = torch.empty_like(q_unrotated), torch.empty_like(k_unrotated)
    for sequence, token in torch.cartesian_prod(*map(torch.arange, positions.shape)).tolist():
        position = int(positions[sequence, token])
        q_rotary[sequence, token] = rotate(q_unrotated[sequence, token], position, config)  # eq. 39
        k_rotary[sequence, token] = rotate(k_unrotated[sequence, token], position, config)  # eq. 43
    return q_content, q_rotary, latent, k_rotary


def up_projections(config: Any, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # [h n c], [h v c]
    """W^UK and W^UV of eqs. 42 and 45. kv_b_proj holds, head by head, n key rows and then v value rows."""
    per_head = (config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim)
    kv_b = weights["kv_b_proj.weight"].unflatten(0, per_head)  # [h n+v c]
    return kv_b[:, : config.qk_nope_head_dim], kv_b[:, config.qk_nope_head_dim :]


def expanded_mla(
    config: Any,
    weights: dict[str, Tensor],  # of one layer, named after `self_attn.`: kv_b_proj.weight, ..
    hidden: Tensor,  # [b s d]
    positions: Tensor,  # [b s]  int
    visible: Tensor,  # [b s s]  bool
) -> Tensor:  # [b s d]
    """One attention layer, eqs. 37-47 as written. Float64."""
    weights = in_float64(weights)
    projected = queries_and_latents(config, weights, hidden.to(torch.float64), positions)
    context = attention(*projected, *up_projections(config, weights), visible, softmax_scale(config))
    return linear(weights, "o_proj", context.flatten(-2), has_bias=config.attention_bias)  # eq. 47


def absorbed_mla(
    config: Any,
    weights: dict[str, Tensor],  # of one layer, named after `self_attn.`: kv_b_proj.weight, ..
    hidden: Tensor,  # [b s d]
    positions: Tensor,  # [b s]  int
    visible: Tensor,  # [b s s]  bool
) -> Tensor:  # [b s d]
    """`expanded_mla` in the absorbed form: the same eqs. 37-47, attending to latents. Float64."""
    weights = in_float64(weights)
    projected = queries_and_latents(config, weights, hidden.to(torch.float64), positions)
    context = absorbed_attention(*projected, *up_projections(config, weights), visible, softmax_scale(config))
    return linear(weights, "o_proj", context.flatten(-2), has_bias=config.attention_bias)  # eq. 47
