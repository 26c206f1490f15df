"""Attention with our operators: its projections, its rotation, and the reading of the cache.

Letters: b batch, s new tokens, t all visible tokens, h heads, d model width, n/r/v content, rotary and value width per
head, c latent width.
"""

import torch
from torch import Tensor, nn

from ...attention.attention import DeepseekV2Attention
from ...attention.ops import UpProjection, absorbed_attention
from ...cache.segments import Latents
from ...compat.bound_functions import replaces_method
from ...compat.hooks import has_hooks
from ..cached_latents import bits_of, stored_parts
from .library import operators
from .support import DTYPES, kernel_supports, kernel_weights

MIN_RUN = 16  # rows


@replaces_method()
def rotate(attention: DeepseekV2Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if torch.is_grad_enabled() or torch.jit.is_tracing():
        return DeepseekV2Attention.rotate(x, cos, sin)
    if x.device.type != "cpu" or x.dtype not in DTYPES or x.stride(-1) != 1:
        return DeepseekV2Attention.rotate(x, cos, sin)
    return operators.rotate(x, cos, sin)


@replaces_method()
def project(
    attention: DeepseekV2Attention, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Projects few tokens in one call, if the projections do nothing but multiply."""
    last = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
    norm = attention.kv_a_layernorm
    is_plain = type(norm) is nn.RMSNorm and not has_hooks(norm) and kernel_supports(hidden_states, norm.weight)
    weights_and_scales = kernel_weights(hidden_states, last, attention.kv_a_proj_with_mqa) if is_plain else None
    if weights_and_scales is None:
        return DeepseekV2Attention.project(attention, hidden_states, rotation)
    (q, kv_a), (q_scales, kv_a_scales) = weights_and_scales[0], weights_and_scales[1] or (None, None)
    queries, rows = operators.project(
        attention.query_input(hidden_states),
        q,
        q_scales,
        hidden_states,
        kv_a,
        kv_a_scales,
        norm.weight,
        norm.eps,
        *rotation,
        attention.qk_head_dim,
        [] if q_scales is not None else runs_to_read(attention, q),
    )
    queries = torch.unflatten(queries, -1, (-1, attention.qk_head_dim))
    q_content, q_rotary = queries.split((attention.qk_nope_head_dim, attention.qk_rope_head_dim), dim=-1)
    latent, k_rotary = rows[:, None].split((attention.kv_lora_rank, attention.qk_rope_head_dim), dim=-1)
    return q_content, q_rotary, latent, k_rotary


def runs_to_read(attention: DeepseekV2Attention, q: Tensor) -> list[int]:
    """First row and number of rows of each run outside of which q [h(n+r) a] is zero; empty if all of q is to be read.

    In a model that was converted from grouped queries, a query is zero outside of the key of its group. The weight is
    searched again if torch has counted a change of it. The operator finds changes that torch does not count, such as
    those by peft's merging through `.data`.
    """
    if torch.compiler.is_compiling():
        return []
    state = (q.data_ptr(), q.shape, None if q.is_inference() else q._version)
    known = vars(attention).get("_runs_to_read")
    if known is None or known[0] != state:
        known = attention._runs_to_read = (state, find_runs(q))
    return known[1]


def find_runs(weight: Tensor) -> list[int]:
    first_column = weight[:, 0] != 0
    if first_column.all():
        return []
    has_numbers = (weight != 0).any(dim=1)
    starts_and_ends = torch.nn.functional.pad(has_numbers.int(), (1, 1)).diff().nonzero().view(-1, 2)
    starts_and_counts = torch.stack((starts_and_ends[:, 0], starts_and_ends.diff(dim=1)[:, 0]), dim=1)
    num_rows = int(has_numbers.sum())
    # few zeros, or zeros between short runs, are read as fast as they are skipped
    if num_rows == 0 or num_rows > 0.75 * len(weight) or num_rows < MIN_RUN * len(starts_and_counts):
        return []
    return starts_and_counts.flatten().tolist()


@replaces_method()
def choose_path(attention: DeepseekV2Attention, s: int, t: int, mask):
    path = DeepseekV2Attention.choose_path(attention, s, t, mask)
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
    """`absorbed_attention` with our operators, in float32 throughout."""
    pairs, bits = [stored_parts(segment) for segment in latents.segments], bits_of(latents)
    if any(x.device.type != "cpu" or x.dtype not in DTYPES for x in (q_content, w_uk.weight, pairs[0][1])):
        return absorbed_attention(q_content, q_rotary, latents, w_uk, w_uv, mask=mask, scale=scale)
    cached = (*map(list, zip(*pairs)), scale, additive_mask(mask), bits)
    if not w_uk.factors:
        return operators.attention(q_content, q_rotary, w_uk.weight, w_uv.weight, *cached)
    q_content_flat, (b, s) = q_content.flatten(0, 1), q_content.shape[:2]
    absorbed = torch.unflatten(operators.absorb(q_content_flat, w_uk.weight), 0, (b, s))
    context = operators.attend(w_uk.with_adapters_absorbed(absorbed, q_content), q_rotary, *cached)
    expanded = torch.unflatten(operators.expand(context.flatten(0, 1), w_uv.weight), 0, (b, s))
    return w_uv.with_adapters_expanded(expanded, context)


def additive_mask(mask: Tensor | None) -> Tensor | None:
    """A boolean or additive mask as a float32 mask to add to scores, -inf where a query may not look."""
    if mask is None:
        return None
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
    shown = torch.zeros(mask.shape) if mask.dtype == torch.bool else mask.float()
    return shown.masked_fill(hidden, -torch.inf)
