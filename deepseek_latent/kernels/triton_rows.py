"""What one token's row needs between two products, in one launch each: add and norm, norm with rotation, the router.

Letters: m tokens, b batch, s tokens of a sequence, d model width, h heads, n content, r rotary, c latent width,
e routed experts, k experts per token, t rows of a cache's buffer.

These kernels move a few kilobytes, so what they cost is latency: a program issues all its loads before the first use,
and nothing here waits for the host. Grids depend on shapes only, so every launch may be captured in a CUDA graph.
With `overlap=True` a launch hides behind the kernel ahead of it, see `launch_options`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..latent_format import PLANE, IntegerFormat
from .triton_overlap import launch_options, wait_for_inputs

# 16 bytes of half precision, what one thread loads at a time
VECTOR = 8
# above this, matrix units beat products that share no weight among tokens
MOST_SPLIT_TOKENS = 16


def add_rms_norm(
    x: Tensor,  # [.. d]
    residual: Tensor,  # [.. d]
    weight: Tensor,  # [d]
    eps: float,
    *,
    overlap: bool = False,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor]:  # [.. d], [.. d]
    """x + residual as torch adds them, and `nn.RMSNorm` of what that rounds to, both in the dtype of x.

    As in torch, the norm is computed in float32 and rounded once, after its weight.
    """
    assert residual.shape == x.shape
    assert residual.dtype == x.dtype
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch_rms_norm(x, residual, weight, eps, total, normed, overlap, num_warps)
    return total, normed


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, overlap: bool = False, num_warps: int | None = None) -> Tensor:
    """`nn.RMSNorm` of x [.. d]."""
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, None, weight, eps, None, normed, overlap, num_warps)
    return normed


def _launch_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor | None,
    normed: Tensor,
    overlap: bool,
    num_warps: int | None,
) -> None:
    d = x.shape[-1]
    # a view, so that rows of any stride are read where they lie, and what would need a copy is an error
    rows = x.view(-1, d)
    others = rows if residual is None else residual.view(-1, d)
    assert rows.stride(1) == others.stride(1) == weight.stride(0) == 1
    assert weight.shape == (d,)
    if rows.shape[0] == 0:
        return
    block = triton.next_power_of_2(d)
    _rms_norm_kernel[(rows.shape[0],)](
        rows,
        others,
        weight,
        normed if total is None else total,
        normed,
        rows.stride(0),
        others.stride(0),
        eps,
        D=d,
        BLOCK=block,
        ADDS=residual is not None,
        num_warps=num_warps or min(max(block // (32 * VECTOR), 1), 16),
        **launch_options(x, overlap),
    )


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    total,
    normed,
    x_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    scale = tl.load(weight + column, mask=inside, other=0.0)
    wait_for_inputs(OVERLAPS)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if ADDS:
        other = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
        # the norm sees the sum as it is handed on
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(total + row * D + column, value, mask=inside)
    wide = value.to(tl.float32)
    result = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps) * scale.to(tl.float32)
    tl.store(normed + row * D + column, result.to(normed.dtype.element_ty), mask=inside)


def norm_rotate_write(
    queries: Tensor,  # [b s h n+r]  rotary parts are rotated in place
    compressed: Tensor,  # [b s c+r]
    norm_weight: Tensor,  # [c]
    eps: float,
    cos: Tensor,  # [b or 1 s r/2]  float32
    sin: Tensor,  # [b or 1 s r/2]  float32
    rows: Tensor,  # [b t row_width]  written in place
    start: Tensor | int,
    *,
    bits: int | None = None,
    overlap: bool = False,
    heads_per_program: int = 16,
    num_warps: int = 4,
) -> None:
    """Rotates the queries, and writes normed latents and rotated keys to rows start .. start+s-1 of a cache's buffer.

    Rows are as `LatentFormat` has them, or with bits 8 or 4 the bytes of `IntegerFormat`, bit by bit. `start` is one
    number, or one integer on the device, which must not reach past the buffer: what would is not written.
    Norm and rotation in float32, each rounded once to the dtype of the inputs, as `nn.RMSNorm` and `rotate` do.
    """
    c = norm_weight.shape[0]
    r = compressed.shape[-1] - c
    s = compressed.shape[1]
    assert start.numel() == 1 if isinstance(start, Tensor) else 0 <= start <= rows.shape[1] - s
    latent, scales, k_rotary = parts_of_rows(rows, c, r, compressed.dtype, bits)
    inputs = queries, compressed, norm_weight, cos, sin
    _launch_norm_rotate(inputs, (latent, scales, k_rotary), eps, start, bits, overlap, heads_per_program, num_warps)


def norm_rotate(
    queries: Tensor,  # [b s h n+r]  rotary parts are rotated in place
    compressed: Tensor,  # [b s c+r]
    norm_weight: Tensor,  # [c]
    eps: float,
    cos: Tensor,  # [b or 1 s r/2]  float32
    sin: Tensor,  # [b or 1 s r/2]  float32
    *,
    overlap: bool = False,
    heads_per_program: int = 16,
    num_warps: int = 4,
) -> tuple[Tensor, Tensor]:  # [b s c], [b s r]
    """`norm_rotate_write` without a cache: rotates the queries, returns normed latents and rotated keys."""
    b, s, width = compressed.shape
    c = norm_weight.shape[0]
    latent, k_rotary = (compressed.new_empty(b, s, x) for x in (c, width - c))
    inputs = queries, compressed, norm_weight, cos, sin
    _launch_norm_rotate(inputs, (latent, latent, k_rotary), eps, 0, None, overlap, heads_per_program, num_warps)
    return latent, k_rotary


def parts_of_rows(rows: Tensor, c: int, r: int, dtype: torch.dtype, bits: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Latents or codes [b t ..], scales [b t planes] (anything without bits) and rotary keys [b t r], as views."""
    if bits is None:
        assert rows.dtype == dtype
        assert rows.shape[2] == c + r
        return rows[..., :c], rows, rows[..., c:]
    assert rows.dtype == torch.uint8
    assert bits in (8, 4)
    format = IntegerFormat(c, r, dtype, bits)
    assert rows.shape[2] == format.row_width
    scales = format._scales
    return rows, rows[..., scales].view(torch.bfloat16), rows[..., scales.stop :].view(torch.bfloat16)


def _launch_norm_rotate(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, Tensor, Tensor],
    eps: float,
    start: Tensor | int,
    bits: int | None,
    overlap: bool,
    heads_per_program: int,
    num_warps: int,
) -> None:
    queries, compressed, norm_weight, cos, sin = inputs
    latent, scales, k_rotary = outputs
    (b, s, h, width), c = queries.shape, norm_weight.shape[0]
    r = compressed.shape[-1] - c
    assert compressed.shape == (b, s, c + r)
    assert queries.dtype == compressed.dtype
    assert latent.shape[0] == b
    assert queries.stride()[2:] == (width, 1)
    assert compressed.stride(2) == norm_weight.stride(0) == 1
    assert cos.shape == sin.shape
    assert cos.shape[0] in (1, b)
    assert cos.shape[1:] == (s, r // 2)
    assert cos.stride() == sin.stride()
    assert cos.stride(2) == 1
    assert cos.dtype == sin.dtype == torch.float32
    assert latent.stride(2) == scales.stride(2) == k_rotary.stride(2) == 1
    if b * s == 0:
        return
    heads_per_program = min(heads_per_program, triton.next_power_of_2(h))
    _norm_rotate_kernel[(s, 1 + triton.cdiv(h, heads_per_program), b)](
        *inputs,
        *outputs,
        start,
        latent.shape[1],
        *queries.stride()[:2],
        *compressed.stride()[:2],
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        latent.stride(0),
        scales.stride(0),
        k_rotary.stride(0),
        eps,
        LATENT_STRIDE=latent.stride(1),
        SCALES_STRIDE=scales.stride(1),
        KEY_STRIDE=k_rotary.stride(1),
        START_IS_POINTER=isinstance(start, Tensor),
        H=h,
        N=width - r,
        R=r,
        C=c,
        BITS=bits or 0,
        PLANE=PLANE,
        PLANES=triton.next_power_of_2(triton.cdiv(c, PLANE)),
        R_BLOCK=triton.next_power_of_2(r),
        HEADS=heads_per_program,
        num_warps=num_warps,
        # torch rounds a product before it adds, and so must we to write the same bytes
        enable_fp_fusion=False,
        **launch_options(queries, overlap),
    )


# one compiled kernel for every length and every place in the cache
@triton.jit(do_not_specialize=["start", "num_rows"])
def _norm_rotate_kernel(
    queries,
    compressed,
    norm_weight,
    cos,
    sin,
    latent,
    scales,
    k_rotary,
    start,
    num_rows,
    queries_b,
    queries_s,
    compressed_b,
    compressed_s,
    cos_b,
    cos_s,
    latent_b,
    scales_b,
    key_b,
    eps,
    LATENT_STRIDE: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    START_IS_POINTER: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    R_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Programs [s, 1 + blocks of heads, b]: the first of a token is for its latent and key, the others for queries."""
    token, part, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    angle = sequence * cos_b + token * cos_s
    if part > 0:
        wait_for_inputs(OVERLAPS)
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        row = queries + sequence * queries_b + token * queries_s
        turn_heads(row, cos + angle, sin + angle, head, H, N, R, R_BLOCK)
    else:
        source = compressed + sequence * compressed_b + token * compressed_s
        latent += sequence * latent_b
        scales += sequence * scales_b
        k_rotary += sequence * key_b
        write_row(
            source,
            norm_weight,
            cos + angle,
            sin + angle,
            latent,
            scales,
            k_rotary,
            start,
            token,
            num_rows,
            eps,
            LATENT_STRIDE,
            SCALES_STRIDE,
            KEY_STRIDE,
            START_IS_POINTER,
            R,
            C,
            BITS,
            PLANE,
            PLANES,
            R_BLOCK,
            OVERLAPS,
        )


@triton.jit
def write_row(
    source,
    norm_weight,
    cos,
    sin,
    latent,
    scales,
    k_rotary,
    start,
    token,
    num_rows,
    eps,
    LATENT_STRIDE: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    START_IS_POINTER: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    R_BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The latent and the key of one token, normed and rotated, to its row of one sequence's buffer."""
    column = tl.arange(0, PLANES)[:, None] * PLANE + tl.arange(0, PLANE)[None, :]
    weight = tl.load(norm_weight + column, mask=column < C, other=0.0)
    wait_for_inputs(OVERLAPS)
    position = token + (tl.load(start).to(tl.int64) if START_IS_POINTER else start)
    is_inside = (position >= 0) & (position < num_rows)
    # before the first store, which no later load may overtake
    value = tl.load(source + column, mask=column < C, other=0.0)
    _write_key(source + C, cos, sin, k_rotary + position * KEY_STRIDE, is_inside, R, R_BLOCK)
    latent += position * LATENT_STRIDE
    scales += position * SCALES_STRIDE
    _write_latent(value, weight, eps, latent, scales, column, is_inside, C, BITS, PLANE)


@triton.jit
def turn_heads(row, cos, sin, head, H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, R_BLOCK: tl.constexpr):
    """Rotates pairs (2i, 2i+1) of some heads, in place."""
    head, rotary, pair = head[:, None], tl.arange(0, R_BLOCK)[None, :], tl.arange(0, R_BLOCK // 2)[None, :]
    at = row + head * (N + R) + N + rotary
    inside = (head < H) & (rotary < R)
    query = tl.load(at, mask=inside, other=0.0)
    # angles are loaded for every head, so that each thread has those of its pairs without waiting for another
    angle = head * 0 + pair
    cosine = tl.load(cos + angle, mask=pair < R // 2, other=0.0)
    sine = tl.load(sin + angle, mask=pair < R // 2, other=0.0)
    even, odd = tl.split(tl.reshape(query.to(tl.float32), (head.shape[0], R_BLOCK // 2, 2)))
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), query.shape)
    tl.store(at, turned.to(query.dtype), mask=inside)


@triton.jit
def _write_key(source, cos, sin, out, is_inside, R: tl.constexpr, R_BLOCK: tl.constexpr):
    """Rotates pairs (2i, 2i+1) of the key that all heads share."""
    pair = tl.arange(0, R_BLOCK // 2)
    even = tl.load(source + 2 * pair, mask=pair < R // 2, other=0.0)
    odd = tl.load(source + 2 * pair + 1, mask=pair < R // 2, other=0.0)
    cosine = tl.load(cos + pair, mask=pair < R // 2, other=0.0)
    sine = tl.load(sin + pair, mask=pair < R // 2, other=0.0)
    x, y = even.to(tl.float32), odd.to(tl.float32)
    inside = (pair < R // 2) & is_inside
    # through the dtype of the inputs, also where coded rows keep the key in bfloat16
    turned_even, turned_odd = (x * cosine - y * sine).to(even.dtype), (x * sine + y * cosine).to(even.dtype)
    tl.store(out + 2 * pair, turned_even.to(out.dtype.element_ty), mask=inside)
    tl.store(out + 2 * pair + 1, turned_odd.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _write_latent(
    value, weight, eps, out, scales, column, is_inside, C: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr
):
    """Norms what was loaded from columns [PLANES PLANE], and stores it as it is or as codes and scales."""
    wide = value.to(tl.float32)
    root = tl.rsqrt(tl.sum(tl.sum(wide * wide, axis=1), axis=0) / C + eps)
    latent = (wide * root * weight.to(tl.float32)).to(value.dtype)
    if BITS == 0:
        tl.store(out + column, latent, mask=(column < C) & is_inside)
    else:
        codes, scale = _coded(latent.to(tl.float32), BITS)
        plane = tl.arange(0, value.shape[0])
        tl.store(scales + plane, scale, mask=(plane * PLANE < C) & is_inside)
        _write_codes(tl.where(column < C, codes, 0), column, out, is_inside, C, BITS)


@triton.jit
def _coded(latent, BITS: tl.constexpr):
    """Codes and scales of latents [PLANES PLANE] as `IntegerFormat` computes them."""
    largest = tl.max(tl.abs(latent), axis=1)
    HALF: tl.constexpr = 1 << (BITS - 1)
    # the smallest normal bfloat16 stands in for the scale of zeros
    scales = tl.maximum(largest * (1.004 / HALF), 1.1754943508222875e-38).to(tl.bfloat16)
    # rounded as IEEE has it, since a quotient on a cell's border decides the code
    scaled = tl.div_rn(latent, tl.broadcast_to(scales.to(tl.float32)[:, None], latent.shape))
    codes = tl.minimum(tl.maximum(tl.floor(scaled) + HALF, 0.0), 2.0 * HALF - 1)
    return codes.to(tl.int32), scales


@triton.jit
def _write_codes(codes, column, out, is_inside, C: tl.constexpr, BITS: tl.constexpr):
    """Codes [PLANES PLANE] as bytes, with the format's zeros where codes end before scales begin."""
    PADDED: tl.constexpr = ((C * BITS + 7) // 8 + 3) // 4 * 4
    if BITS == 8:
        tl.store(out + column, codes.to(tl.uint8), mask=(column < PADDED) & is_inside)
    else:
        # a byte holds the codes of elements j and j + c/2, which other threads computed
        HALF: tl.constexpr = (C + 1) // 2
        WIDTH: tl.constexpr = codes.numel
        byte = tl.arange(0, WIDTH // 2)
        flat = tl.reshape(codes, (WIDTH,))
        low = tl.where(byte < HALF, tl.gather(flat, byte, 0), 0)
        high = tl.where(byte + HALF < C, tl.gather(flat, tl.minimum(byte + HALF, C - 1), 0), 0)
        tl.store(out + byte, (low | high << 4).to(tl.uint8), mask=(byte < PADDED) & is_inside)


def route(
    x: Tensor,  # [m d]
    weight: Tensor,  # [e d]
    k: int,
    n_group: int,
    topk_group: int,
    *,
    normalise: bool,
    scaling_factor: float,
    overlap: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # logits [m e] float32, weights [m k] float32, experts [m k] int64
    """Scores every expert for every token and picks k, as `DeepseekV2MoEGate` does; `n_group` 1 is `greedy`.

    Chosen experts come with the best first; among equals, the lowest.
    """
    logits = router_logits(x, weight, overlap=overlap)
    options = {"normalise": normalise, "scaling_factor": scaling_factor, "overlap": overlap}
    return logits, *choose(logits, k, n_group, topk_group, **options)


def router_logits(x: Tensor, weight: Tensor, *, overlap: bool = False) -> Tensor:
    """x [m d] times weight^T [e d] in float32, [m e]: products of half precision are exact there, and so summed."""
    if x.shape[0] <= MOST_SPLIT_TOKENS:
        return split_logits(x, weight, overlap=overlap)
    if x.dtype == weight.dtype and x.dtype.itemsize == 2:
        return multiplied_logits(x, weight, overlap=overlap)
    return F.linear(x.float(), weight.float())


def split_logits(x: Tensor, weight: Tensor, *, overlap: bool = False, experts_per_program: int | None = None) -> Tensor:
    """`router_logits` of few tokens: a program has the rows of a few experts, and every thread a part of them."""
    (m, d), e = x.shape, weight.shape[0]
    assert weight.shape[1] == d
    assert x.stride(1) == weight.stride(1) == 1
    logits = x.new_empty(m, e, dtype=torch.float32)
    if m == 0:
        return logits
    tokens = min(triton.next_power_of_2(m), 4)
    experts = experts_per_program or (1 if m == 1 else 2)
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
        BLOCK=min(triton.next_power_of_2(d), 32 * 4 * VECTOR),
        num_warps=4,
        **launch_options(x, overlap),
    )
    return logits


# one compiled kernel for any number of tokens
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
    """Programs [blocks of experts, blocks of tokens]; sums per thread first, and over threads once at the end."""
    expert = (tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS))[None, :, None]
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    w_at, x_at = weight + expert.to(tl.int64) * weight_stride + column, x + token.to(tl.int64) * x_stride + column
    # unrolled, so that the loads of all steps are on their way at once
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


def multiplied_logits(
    x: Tensor,
    weight: Tensor,
    *,
    overlap: bool = False,
    block: tuple[int, int, int] | None = None,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Tensor:
    """`router_logits` of many tokens in half precision, by matrix units; a block is tokens, experts and columns."""
    (m, d), e = x.shape, weight.shape[0]
    assert weight.shape[1] == d
    assert x.stride(1) == weight.stride(1) == 1
    logits = x.new_empty(m, e, dtype=torch.float32)
    if m == 0:
        return logits
    # few programs' time is the length of their rows; many tokens should not be read again for other experts
    tokens, experts, columns = block or ((16, 16, 256) if m <= 512 else (32, 64, 128))
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
        # the interpreter multiplies the bit patterns of bfloat16
        WIDENS=not x.is_cuda,
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(x, overlap),
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
    normalise: bool,
    scaling_factor: float,
    overlap: bool = False,
) -> tuple[Tensor, Tensor]:  # weights [m k] float32, experts [m k] int64
    """Weights and experts by the router's logits, as `DeepseekV2MoEGate.choose` has them."""
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
        NORMALISES=normalise,
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
    NORMALISES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program per token; experts lie as [GROUPS_BLOCK PER_GROUP_BLOCK], so a group is a row.

    Chooses by logits as ordered integers, since a warp finds the largest of 32 integers by one instruction.
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
    if NORMALISES:
        weight = tl.div_rn(weight, tl.zeros_like(weight) + (tl.sum(weight, axis=0) + 1e-20))
    else:
        weight *= scaling_factor
    expert = picked // PER_GROUP_BLOCK * PER_GROUP + picked % PER_GROUP_BLOCK
    out = token * K + rank
    tl.store(weights + out, weight, mask=rank < K)
    tl.store(experts + out, expert.to(tl.int64), mask=rank < K)


@triton.jit
def _ordered(x):
    """float32 as integers of the same order; NaN is the largest, as for torch, so that chosen experts always exist."""
    # adding zero makes -0 equal to 0
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@triton.jit
def _logit_of(key):
    """What `_ordered` made a key of."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _lowest_place(keys, places, key):
    return tl.min(tl.where(keys == key, places, 0x7FFFFFFF), axis=0)
