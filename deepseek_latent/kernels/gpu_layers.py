"""A decoder layer as it decodes on a GPU: a dozen launches, where what it is made of does nothing but its own work.

Letters: b batch, s new tokens, h heads, d model width, n/r/v content, rotary and value width per head, c latent width.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from ..balance import TokenDropping
from ..compat_accelerate import is_offloaded
from ..compat_cache_name import takes_either_cache_name
from ..hooks import has_hooks
from ..latent_attention import DeepseekV2Attention
from ..latent_cache import LatentCache
from ..latent_format import Latents
from ..modeling_deepseek_v2 import DeepseekV2DecoderLayer
from ..moe import DeepseekV2Experts, DeepseekV2MLP, DeepseekV2MoE, DeepseekV2MoEGate
from .layers import as_pair, bits_of
from .triton_attention import attend
from .triton_experts import experts, mlp
from .triton_rows import add_rms_norm, norm_rotate, norm_rotate_write, rms_norm, route

# query tokens of a sequence up to which attention absorbs here, and tokens up to which experts are read where they lie
FEW_QUERIES, FEW_TOKENS = 16, 64
DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SILU = type(ACT2FN["silu"])
# formats of rows that `norm_rotate_write` writes itself
WRITTEN = (None, 8, 4)


class GpuDecoderLayer(DeepseekV2DecoderLayer):
    """Few tokens over a `LatentCache` without gradients; everything else is computed as before."""

    @takes_either_cache_name
    def forward(
        self,
        hidden_states: Tensor,  # [b s d]
        attention_mask: Tensor | BlockMask | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        dropping: TokenDropping | None = None,
        **kwargs,
    ) -> Tensor:  # [b s d]
        up_projections = None
        if self._decodes(hidden_states, attention_mask, cache) and not kwargs.get("output_attentions"):
            up_projections = self.self_attn.up_projections()
        if up_projections is None:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                dropping=dropping,
                **kwargs,
            )
        norm = self.input_layernorm
        normed = rms_norm(hidden_states, norm.weight, norm.eps)
        attended = attention(self.self_attn, normed, position_embeddings, cache, attention_mask, *up_projections)
        norm = self.post_attention_layernorm
        hidden_states, normed = add_rms_norm(attended, hidden_states, norm.weight, norm.eps)
        return feed_forward(self.mlp, normed, hidden_states)

    def _decodes(self, x: Tensor, mask: Tensor | BlockMask | None, cache: object) -> bool:
        if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.is_autocast_enabled(x.device.type):
            return False
        if x.device.type not in DEVICES or x.dtype not in DTYPES or not 0 < x.shape[1] <= FEW_QUERIES:
            return False
        if not isinstance(cache, LatentCache) or not _is_readable(mask):
            return False
        attention, norms = self.self_attn, (self.input_layernorm, self.post_attention_layernorm)
        if attention.config.output_attentions or has_hooks(attention) or has_hooks(self.mlp):
            return False
        return all(_is_plain_norm(norm, x) for norm in (*norms, attention.kv_a_layernorm))


def _is_readable(mask: Tensor | BlockMask | None) -> bool:
    return mask is None or (
        isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1 and mask.dtype == torch.bool
    )


def _is_plain_norm(norm: nn.Module, x: Tensor) -> bool:
    return (
        type(norm) is nn.RMSNorm
        and not has_hooks(norm)
        and norm.weight.dtype == x.dtype
        and norm.weight.device == x.device
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
    """`DeepseekV2Attention.forward` by the absorbed form; its projections are called as the modules that they are."""
    project = module.q_proj if module.q_lora_rank is None else module.q_b_proj
    queries = torch.unflatten(project(module.query_input(hidden_states)), -1, (-1, module.n + module.r))
    compressed = module.kv_a_proj_with_mqa(hidden_states)
    latents = write(module, queries, compressed, rotation, cache)
    q_content, q_rotary = queries.split((module.n, module.r), dim=-1)
    pairs = [as_pair(stretch) for stretch in latents.stretches]
    context = attend(
        w_uk.absorb(q_content),
        q_rotary,
        *map(list, zip(*pairs)),
        scale=module.scaling,
        mask=mask,
        bits=bits_of(latents),
        length=None if latents.num_held is None else latents.num_held.view(1),
    )
    return module.o_proj(w_uv.expand(context).flatten(2))


def write(
    module: DeepseekV2Attention,
    queries: Tensor,  # [b s h n+r]  rotated in place
    compressed: Tensor,  # [b s c+r]
    rotation: tuple[Tensor, Tensor],
    cache: LatentCache,
) -> Latents:
    """Rotates queries and keys and puts the new tokens into the cache."""
    norm, layer = module.kv_a_layernorm, cache.layers[module.layer_idx]
    if layer.bits in WRITTEN and not cache.offloading:
        rows, start = layer.claim(*compressed[:, None].split((module.c, module.r), dim=-1))
        norm_rotate_write(queries, compressed, norm.weight, norm.eps, *rotation, rows, start, bits=layer.bits)
        return layer.latents
    latent, k_rotary = norm_rotate(queries, compressed, norm.weight, norm.eps, *rotation)
    return cache.append(latent[:, None], k_rotary[:, None], module.layer_idx)


def feed_forward(module: DeepseekV2MLP | DeepseekV2MoE, x: Tensor, residual: Tensor) -> Tensor:
    """residual + module(x), [b s d], in two launches for few tokens, and one or two for the router."""
    tokens, added = x.flatten(0, 1), residual.flatten(0, 1)
    if len(tokens) > FEW_TOKENS:
        return residual + module(x)
    if isinstance(module, DeepseekV2MLP):
        weights = _weights_of(module, x)
        return residual + module(x) if weights is None else mlp(tokens, *weights, residual=added).view_as(x)
    shared = () if module.shared_experts is None else _weights_of(module.shared_experts, x)
    if shared is None or not _are_plain_experts(module.experts, x):
        return residual + module(x)
    _, weights, chosen = _routed(module.gate, tokens)
    stacked = module.experts.gate_up_proj, module.experts.down_proj
    return experts(tokens, *stacked, chosen, weights, shared or None, residual=added).view_as(x)


def _routed(gate: DeepseekV2MoEGate, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # whoever watches the router sees its own call
    if type(gate) is not DeepseekV2MoEGate or has_hooks(gate):
        return gate(tokens)
    n_group, topk_group = (gate.n_group, gate.topk_group) if gate.is_grouped else (1, 1)
    choice = {"normalise": gate.is_normalised, "scaling_factor": gate.routed_scaling_factor}
    return route(tokens, gate.weight, gate.num_experts_per_tok, n_group, topk_group, **choice)


def _weights_of(module: DeepseekV2MLP, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """gate, up and down of an MLP whose parts do nothing but multiply."""
    parts = module.gate_proj, module.up_proj, module.down_proj
    if type(module) is not DeepseekV2MLP or has_hooks(module) or type(module.act_fn) is not SILU:
        return None
    for part in parts:
        if type(part) is not nn.Linear or part.bias is not None or has_hooks(part) or not _is_plain(part.weight, x):
            return None
    return tuple(part.weight for part in parts)


def _are_plain_experts(module: nn.Module, x: Tensor) -> bool:
    if type(module) is not DeepseekV2Experts or type(module.act_fn) is not SILU or is_offloaded(module):
        return False
    return module.takes_grouped_products() and all(_is_plain(w, x) for w in (module.gate_up_proj, module.down_proj))


def _is_plain(weight: Tensor, x: Tensor) -> bool:
    is_here = type(weight) in (nn.Parameter, Tensor) and weight.device == x.device
    return is_here and weight.dtype == x.dtype and weight.is_contiguous()
