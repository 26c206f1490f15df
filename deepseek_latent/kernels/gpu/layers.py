"""A decoder layer that decodes on a GPU in a dozen launches, if its parts are plain (`plain.py`).

Letters: b batch, s new tokens, h heads, d model width, n/r/v content, rotary and value width per head, c latent width.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache

from ...attention.attention import DeepseekV2Attention
from ...cache.latent_cache import LatentCache
from ...cache.segments import Latents
from ...compat.bound_functions import replaces_method
from ...compat.cache_name import takes_either_cache_name
from ...compat.hooks import has_hooks
from ...experts.dropping import TokenDropping
from ...experts.moe import DeepseekV2MLP, DeepseekV2MoE
from ...experts.router import DeepseekV2MoEGate
from ...modeling_deepseek_v2 import DeepseekV2DecoderLayer
from .one_token import BITS_WRITTEN_BY_KERNELS, attend_one_token, feed_forward_one_token, router_options, row_options
from .plain import attention_inputs, is_plain_gate, is_plain_norm, weights_of_experts, weights_of_mlp
from .triton_attention import attend
from .triton_experts import experts, mlp
from .triton_norm import add_rms_norm, rms_norm
from .triton_router import route
from .triton_tiling import has_room
from .triton_write import norm_rotate, norm_rotate_write

# up to this many query tokens of a sequence, attention is absorbed
MAX_ABSORBED_QUERIES = 16
# up to this many tokens, our kernels compute MLPs and experts
MAX_TOKENS_OF_EXPERTS = 64
DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@replaces_method()
@takes_either_cache_name
def decoder_layer(
    layer: DeepseekV2DecoderLayer,
    hidden_states: Tensor,  # [b s d]
    attention_mask: Tensor | BlockMask | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    dropping: TokenDropping | None = None,
    **kwargs,
) -> Tensor:  # [b s d]
    """Computes few tokens over a `LatentCache` without gradients with our kernels, all else as the layer's class."""
    up_projections = None
    if _kernels_support(layer, hidden_states, attention_mask, cache) and not kwargs.get("output_attentions"):
        up_projections = layer.self_attn.up_projections()
    if up_projections is None:
        return DeepseekV2DecoderLayer.forward(
            layer,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            dropping=dropping,
            **kwargs,
        )
    decode = decode_one_token if hidden_states.shape[:2] == (1, 1) else decode_few_tokens
    # Triton launches on the current device, which need not be the one of this layer
    with torch.cuda.device_of(hidden_states):
        return decode(layer, hidden_states, position_embeddings, cache, attention_mask, *up_projections)


REPLACEMENTS = {DeepseekV2DecoderLayer: {"forward": decoder_layer}}


def decode_few_tokens(layer: DeepseekV2DecoderLayer, x: Tensor, *attention_arguments) -> Tensor:
    """Computes the layer in about fourteen launches; a part that is not plain is called as a module."""
    norm = layer.input_layernorm
    attended = attention(layer.self_attn, rms_norm(x, norm.weight, norm.eps), *attention_arguments)
    norm = layer.post_attention_layernorm
    x, normed = add_rms_norm(attended, x, norm.weight, norm.eps)
    return feed_forward(layer.mlp, normed, x)


def decode_one_token(layer: DeepseekV2DecoderLayer, x: Tensor, *attention_arguments) -> Tensor:
    """Computes each half of the layer in fewer launches, or as `decode_few_tokens` if a part of it is not plain."""
    norm = layer.input_layernorm
    attended = attend_one_token(layer.self_attn, norm, x, *attention_arguments)
    if attended is None:
        attended = x + attention(layer.self_attn, rms_norm(x, norm.weight, norm.eps), *attention_arguments)
    norm = layer.post_attention_layernorm
    out = feed_forward_one_token(layer.mlp, norm, attended)
    return feed_forward(layer.mlp, rms_norm(attended, norm.weight, norm.eps), attended) if out is None else out


def _kernels_support(layer: DeepseekV2DecoderLayer, x: Tensor, mask: Tensor | BlockMask | None, cache: object) -> bool:
    if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.is_autocast_enabled(x.device.type):
        return False
    # how a kernel is launched depends on addresses, which no compiled graph knows
    if torch.compiler.is_compiling():
        return False
    if x.device.type not in DEVICES or x.dtype not in DTYPES or not 0 < x.shape[1] <= MAX_ABSORBED_QUERIES:
        return False
    if not isinstance(cache, LatentCache) or not _is_readable(mask):
        return False
    attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
    bits, unquantized = (cache.cache_dtype or "").removeprefix("int"), cache.layers[attention.layer_idx].num_unquantized
    widths = attention.kv_lora_rank, attention.qk_rope_head_dim, unquantized if bits else 0
    if not has_room(bits, *widths, x.dtype, x.device):
        return False
    if attention.config.output_attentions or has_hooks(attention) or has_hooks(layer.mlp):
        return False
    return all(is_plain_norm(norm, x) for norm in (*norms, attention.kv_a_layernorm))


def _is_readable(mask: Tensor | BlockMask | None) -> bool:
    return mask is None or (
        isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1 and mask.dtype == torch.bool
    )


def attention(
    module: DeepseekV2Attention,
    hidden_states: Tensor,  # [b s d]
    rotation: tuple[Tensor, Tensor],  # cos, sin [b s r/2]
    cache: LatentCache,
    mask: Tensor | None,  # [b 1 s t] boolean
    w_uk,
    w_uv,
) -> Tensor:  # [b s d]
    """`DeepseekV2Attention.forward` in the absorbed form; projections are called as modules, adapters included."""
    project = module.q_proj if module.q_lora_rank is None else module.q_b_proj
    queries = torch.unflatten(project(module.query_input(hidden_states)), -1, (-1, module.qk_head_dim))
    compressed = module.kv_a_proj_with_mqa(hidden_states)
    latents = write(module, queries, compressed, rotation, cache)
    q_content, q_rotary = queries.split((module.qk_nope_head_dim, module.qk_rope_head_dim), dim=-1)
    context = attend(w_uk.absorb(q_content), q_rotary, scale=module.scaling, mask=mask, **attention_inputs(latents))
    return module.o_proj(w_uv.expand(context).flatten(2))


def write(
    module: DeepseekV2Attention,
    queries: Tensor,  # [b s h n+r]  rotated in place
    compressed: Tensor,  # [b s c+r]
    rotation: tuple[Tensor, Tensor],
    cache: LatentCache,
) -> Latents:
    """Rotates queries and keys, and appends the new tokens to the cache."""
    norm, layer = module.kv_a_layernorm, cache.layers[module.layer_idx]
    if layer.cache_dtype in BITS_WRITTEN_BY_KERNELS and not cache.offloading:
        rows, start = layer.claim(*compressed[:, None].split((module.kv_lora_rank, module.qk_rope_head_dim), dim=-1))
        norm_rotate_write(queries, compressed, norm.weight, norm.eps, *rotation, rows, start, **row_options(layer))
        return layer.latents
    latent, k_rotary = norm_rotate(queries, compressed, norm.weight, norm.eps, *rotation)
    return cache.append(latent[:, None], k_rotary[:, None], module.layer_idx)


def feed_forward(module: DeepseekV2MLP | DeepseekV2MoE, x: Tensor, residual: Tensor) -> Tensor:
    """residual + module(x) [b s d]: few tokens take up to six launches, and a router one or two."""
    tokens, added = x.flatten(0, 1), residual.flatten(0, 1)
    if len(tokens) > MAX_TOKENS_OF_EXPERTS:
        return residual + module(x)
    if isinstance(module, DeepseekV2MLP):
        weights = weights_of_mlp(module, x)
        return residual + module(x) if weights is None else mlp(tokens, *weights, residual=added).view_as(x)
    shared = () if module.shared_experts is None else weights_of_mlp(module.shared_experts, x)
    stacked = weights_of_experts(module.experts, x)
    if shared is None or stacked is None:
        return residual + module(x)
    _, weights, chosen = _routed(module.gate, tokens)
    return experts(tokens, *stacked, chosen, weights, shared or None, residual=added).view_as(x)


def _routed(gate: DeepseekV2MoEGate, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return route(tokens, gate.weight, **router_options(gate)) if is_plain_gate(gate) else gate(tokens)
