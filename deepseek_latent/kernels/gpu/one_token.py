"""One token passes a decoder layer in nine launches instead of fourteen, if the parts are plain (`plain.py`).

Letters: h heads, d model width, n/r/v content, rotary and value width per head, c latent width.
"""

import torch
from torch import Tensor, nn

from ...attention.attention import DeepseekV2Attention
from ...attention.ops import UpProjection
from ...cache.latent_cache import LatentCache
from ...cache.layer import LatentCacheLayer
from ...experts.moe import DeepseekV2MLP, DeepseekV2MoE
from ...experts.router import DeepseekV2MoEGate
from .plain import (
    attention_inputs,
    is_plain,
    is_plain_gate,
    is_plain_norm,
    weights_of,
    weights_of_experts,
    weights_of_mlp,
)
from .triton_attention import attend_in_splits, combine
from .triton_experts import experts, mlp
from .triton_one_token import expand, is_combined_by_expand, rotate_write_absorb
from .triton_project import project
from .triton_router import choose
from .triton_tiles import Norm, Tiles

# the cache_dtype of rows that kernels write themselves, and the bits of a code
BITS_WRITTEN_BY_KERNELS = {None: None, "int8": 8, "int4": 4}
# True if a kernel starts before the one ahead of it has ended
OVERLAPS = True
# a router has few rows, so each program takes one
ROUTER_TILES = Tiles(1, 2048, 4, 1)


def attend_one_token(
    module: DeepseekV2Attention,
    norm: nn.RMSNorm,
    x: Tensor,  # [1 1 d]  before the norm
    rotation: tuple[Tensor, Tensor],  # cos, sin [1 1 r/2]
    cache: LatentCache,
    mask: Tensor | None,  # [1 1 1 t] boolean
    w_uk: UpProjection,
    w_uv: UpProjection,
) -> Tensor | None:  # [1 1 d]
    """x + module(norm(x)), or None if a part does more than multiply by its weight."""
    layer, kv_a_norm = cache.layers[module.layer_idx], module.kv_a_layernorm
    weights = _projections_of(module, x)
    is_written = layer.cache_dtype in BITS_WRITTEN_BY_KERNELS and not cache.offloading
    if weights is None or not is_written or not _are_plain(w_uk, w_uv, x):
        return None
    options, row = {"overlap": OVERLAPS}, x.view(1, -1)
    *query_weights, kv_a_proj, o_proj = weights
    queries, compressed = project(row, [query_weights[0], kv_a_proj], Norm(norm.weight, norm.eps), **options)
    if len(query_weights) == 2:
        q_a_norm = module.q_a_layernorm
        (queries,) = project(queries, [query_weights[1]], Norm(q_a_norm.weight, q_a_norm.eps), **options)
    queries, compressed = queries.view(1, 1, -1, module.qk_head_dim), compressed.view(1, 1, -1)
    rows, start = layer.claim(*compressed[:, None].split((module.kv_lora_rank, module.qk_rope_head_dim), dim=-1))
    written = rows, start, w_uk.weight
    kv_a_norm = Norm(kv_a_norm.weight, kv_a_norm.eps)
    given = row_options(layer) | options
    q_absorbed = rotate_write_absorb(queries, compressed, kv_a_norm, *rotation, *written, **given)
    q_rotary, cached = queries[..., module.qk_nope_head_dim :], attention_inputs(layer.latents)
    parts, sizes = attend_in_splits(q_absorbed, q_rotary, scale=module.scaling, mask=mask, **cached, **options)
    if sizes is not None and not is_combined_by_expand(parts, w_uv.weight):
        parts, sizes = combine(parts, sizes, x.dtype, **options), None
    context = expand(parts, sizes, w_uv.weight, **options)
    (out,) = project(context, [o_proj], residual=row, **options)
    return out.view_as(x)


def row_options(layer: LatentCacheLayer) -> dict:
    """The arguments of `norm_rotate_write` and `rotate_write_absorb` that describe the rows of this layer's cache."""
    bits = BITS_WRITTEN_BY_KERNELS[layer.cache_dtype]
    return {"bits": bits, "num_unquantized": layer.num_unquantized if bits else 0}


def feed_forward_one_token(
    module: DeepseekV2MLP | DeepseekV2MoE,
    norm: nn.RMSNorm,
    x: Tensor,  # [1 1 d]  before the norm
) -> Tensor | None:  # [1 1 d]
    """x + module(norm(x)), or None if a part does more than multiply by its weight."""
    row, norm = x.view(1, -1), Norm(norm.weight, norm.eps)
    if isinstance(module, DeepseekV2MLP):
        weights = weights_of_mlp(module, x)
        return None if weights is None else mlp(row, *weights, residual=row, norm=norm).view_as(x)
    gate, shared = module.gate, ()
    if module.shared_experts is not None:
        shared = weights_of_mlp(module.shared_experts, x)
    stacked = weights_of_experts(module.experts, x)
    if shared is None or stacked is None:
        return None
    if not is_plain_gate(gate) or not is_plain(gate.weight, x):
        return None
    (logits,) = project(row, [gate.weight], norm, dtype=torch.float32, tiles=ROUTER_TILES, overlap=OVERLAPS)
    weights, chosen = choose(logits, **router_options(gate), overlap=OVERLAPS)
    return experts(row, *stacked, chosen, weights, shared or None, residual=row, norm=norm).view_as(x)


def router_options(gate: DeepseekV2MoEGate) -> dict:
    """The arguments of `route` and `choose` that describe how the gate chooses experts."""
    n_group, topk_group = (gate.n_group, gate.topk_group) if gate.is_grouped else (1, 1)
    options = {"k": gate.num_experts_per_tok, "n_group": n_group, "topk_group": topk_group}
    return options | {"normalize": gate.normalizes_gates, "scaling_factor": gate.routed_scaling_factor}


def _projections_of(module: DeepseekV2Attention, x: Tensor) -> tuple[Tensor, ...] | None:
    """The weights of the query projections, of `kv_a_proj_with_mqa` and of `o_proj`; None if one is not plain."""
    if module.q_lora_rank is None:
        return weights_of(x, module.q_proj, module.kv_a_proj_with_mqa, module.o_proj)
    if not is_plain_norm(module.q_a_layernorm, x):
        return None
    return weights_of(x, module.q_a_proj, module.q_b_proj, module.kv_a_proj_with_mqa, module.o_proj)


def _are_plain(w_uk: UpProjection, w_uv: UpProjection, x: Tensor) -> bool:
    """True if no adapter acts on the up-projections, and kernels can read their rows."""
    weights = w_uk.weight, w_uv.weight
    return not (w_uk.factors or w_uv.factors) and all(
        type(w) in (nn.Parameter, Tensor) and w.dtype == x.dtype and w.device == x.device and w.stride(2) == 1
        for w in weights
    )
