"""The model's layers as they compute by our operators."""

import torch
from torch import Tensor, nn

from ...attention.attention import DeepseekV2Attention
from ...attention.ops import UpProjection, absorbed_attention
from ...cache.segments import Latents, Segment, SplitSegment
from ...compat.hooks import has_hooks
from ...experts.dropping import TokenDropping
from ...experts.moe import DeepseekV2MLP, DeepseekV2MoE
from ...experts.routed import DeepseekV2Experts
from ...experts.router import DeepseekV2MoEGate
from .int8 import Int8Linear, codes_and_scales
from .library import multiply, multiply_by_experts, operators

# tokens up to which reading the weights takes longer than multiplying by them; dot products, in products.cpp
FEW = 8
DTYPES = (torch.bfloat16, torch.float32)
# in which torch would emulate products on this CPU; known once the operators are loaded
SLOW_IN_TORCH: set[torch.dtype] = set()


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether our operators compute x [.. k] times this weight, and sooner than torch."""
    if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu") or x.numel() == 0:
        return False
    # a quantizer's or a sharded weight is another type
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_contiguous():
        return False
    if {x.device.type, weight.device.type} != {"cpu"} or x.dtype != weight.dtype or x.dtype not in DTYPES:
        return False
    return x.dtype in SLOW_IN_TORCH or x.numel() <= FEW * x.shape[-1]


class KernelLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not _takes(x, self.weight):
            return super().forward(x)
        return multiply(x, self.weight, self.bias)


class KernelRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if len(self.normalized_shape) > 1 or self.eps is None or not _takes(x, self.weight):
            return super().forward(x)
        return operators.rms_norm(x.contiguous(), self.weight, self.eps)


class KernelGate(DeepseekV2MoEGate):
    def logits(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        if not (_takes(hidden_states, self.weight) or _takes(wide, self.weight)):
            return super().logits(hidden_states)
        # float32 times the weight as it is, so that neither is rounded
        return multiply(wide, self.weight, None)


def _stored(x: Tensor, *projections: nn.Module) -> tuple[list[Tensor], list[Tensor]] | None:
    """Weights, and the scales of int8 ones, of projections of few tokens x that do nothing but multiply, all alike."""
    if x.numel() > FEW * x.shape[-1]:
        return None
    for projection in projections:
        if type(projection) is not type(projections[0]) or projection.bias is not None or has_hooks(projection):
            return None
    if type(projections[0]) is Int8Linear:
        weights, scales = zip(*map(codes_and_scales, projections))
        return list(weights), list(scales)
    if type(projections[0]) is not KernelLinear:
        return None
    weights = [projection.weight for projection in projections]
    return (weights, []) if all(_takes(x, weight) for weight in weights) else None


class KernelMLP(DeepseekV2MLP):
    """In one call for few tokens, where its projections do nothing but multiply."""

    def stored(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
        return None if has_hooks(self.act_fn) else _stored(x, self.gate_proj, self.up_proj, self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        stored = self.stored(x)
        if stored is None:
            return super().forward(x)
        return operators.mlp(x.reshape(-1, x.shape[-1]).contiguous(), *stored).view(x.shape)


class KernelMoE(DeepseekV2MoE):
    """Routed and shared experts in one call for few tokens, where neither is wrapped or watched."""

    def forward(self, hidden_states: Tensor, dropping: TokenDropping | None = None) -> Tensor:
        from .experts import CpuExperts, readable_experts

        is_ours = type(self.experts) is DeepseekV2Experts and self.experts.weights.operators is CpuExperts
        if not is_ours or type(self.shared_experts) is not KernelMLP:
            return super().forward(hidden_states, dropping)
        watched = has_hooks(self.experts) or has_hooks(self.shared_experts)
        shared = None if watched else self.shared_experts.stored(hidden_states)
        routed = None if shared is None else readable_experts(self.experts.weights, hidden_states)
        if routed is None or routed.gate_up.dtype != shared[0][0].dtype:
            return super().forward(hidden_states, dropping)
        routed = (routed.gate_up, routed.down, *(scale.squeeze(-1).float() for scale in routed.scales))
        tokens = hidden_states.flatten(0, 1)
        _, weights, experts = self.gate(tokens, dropping)
        return multiply_by_experts(tokens, routed, experts, weights, shared).view_as(hidden_states)


class KernelAttention(DeepseekV2Attention):
    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.jit.is_tracing():
            return DeepseekV2Attention.rotate(x, cos, sin)
        if x.device.type != "cpu" or x.dtype not in DTYPES or x.stride(-1) != 1:
            return DeepseekV2Attention.rotate(x, cos, sin)
        return operators.rotate(x, cos, sin)

    def project(self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In one call for few tokens, where the projections do nothing but multiply."""
        last, norm = self.q_proj if self.q_lora_rank is None else self.q_b_proj, self.kv_a_layernorm
        is_plain = type(norm) is KernelRMSNorm and not has_hooks(norm) and _takes(hidden_states, norm.weight)
        stored = _stored(hidden_states, last, self.kv_a_proj_with_mqa) if is_plain else None
        if stored is None:
            return super().project(hidden_states, rotation)
        (q, kv_a), (q_scales, kv_a_scales) = stored[0], stored[1] or (None, None)
        queries, rows = operators.project(
            self.query_input(hidden_states),
            q,
            q_scales,
            hidden_states,
            kv_a,
            kv_a_scales,
            norm.weight,
            norm.eps,
            *rotation,
            self.qk_head_dim,
        )
        queries = torch.unflatten(queries, -1, (-1, self.qk_head_dim))
        q_content, q_rotary = queries.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        return q_content, q_rotary, *rows[:, None].split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)

    def choose_path(self, s: int, t: int, mask):
        path = super().choose_path(s, t, mask)
        return attend_in_place if path is absorbed_attention else path


def attend_in_place(
    q_content: Tensor,  # [b s h n]
    q_rotary: Tensor,  # [b s h r]  rotated
    latents: Latents,  # t tokens
    w_uk: UpProjection,
    w_uv: UpProjection,
    *,
    mask: Tensor | None,
    scale: float,
) -> Tensor:  # [b s h v]
    """`absorbed_attention` by our operators, in float32 throughout."""
    pairs, bits = [as_pair(segment) for segment in latents.segments], bits_of(latents)
    if any(x.device.type != "cpu" or x.dtype not in DTYPES for x in (q_content, w_uk.weight, pairs[0][1])):
        return absorbed_attention(q_content, q_rotary, latents, w_uk, w_uv, mask=mask, scale=scale)
    past = (*map(list, zip(*pairs)), scale, _additive(mask), bits)
    if not w_uk.factors:
        return operators.attention(q_content, q_rotary, w_uk.weight, w_uv.weight, *past)
    q_content_flat, (b, s) = q_content.flatten(0, 1), q_content.shape[:2]
    absorbed = torch.unflatten(operators.absorb(q_content_flat, w_uk.weight), 0, (b, s))
    context = operators.attend(w_uk.with_adapters_absorbed(absorbed, q_content), q_rotary, *past)
    expanded = torch.unflatten(operators.expand(context.flatten(0, 1), w_uv.weight), 0, (b, s))
    return w_uv.with_adapters_expanded(expanded, context)


def as_pair(segment: Segment | SplitSegment) -> tuple[Tensor, Tensor]:
    """Latents [b t c], or their codes and scales in bytes, and rotary keys [b t r], where they lie."""
    if isinstance(segment, SplitSegment):
        return segment.latent, segment.k_rotary
    if segment.format.cache_dtype is None:
        return segment.latent_and_rotary()
    rotary_bytes = 2 * segment.format.rotary_width
    return segment.rows[..., :-rotary_bytes], segment.rows[..., -rotary_bytes:].view(torch.bfloat16)


def bits_of(latents: Latents) -> str:
    """The format of codes as kernels name it: "8", "6", "5", "4" or "fp8", and "" for elements that are not coded."""
    first = latents.segments[0]
    cache_dtype = first.format.cache_dtype if isinstance(first, Segment) else None
    return (cache_dtype or "").removeprefix("int")


def _additive(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
    shown = torch.zeros(mask.shape) if mask.dtype == torch.bool else mask.float()
    return shown.masked_fill(hidden, -torch.inf)
