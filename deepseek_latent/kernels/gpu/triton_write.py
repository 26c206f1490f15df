"""Normalizes latents, rotates queries and keys, and writes rows to the cache, in one launch.

Letters: b batch, s tokens of a sequence, h heads, n/r content and rotary width per head, c latent width, u unquantized
channels, t rows of the cache's buffer.

The kernel moves a few kilobytes, so its cost is latency: a program issues all its loads before the first use, and
nothing waits for the host. Grids depend on shapes only, so every launch can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cache.format import PLANE, IntegerFormat
from .triton_overlap import launch_options, wait_for_inputs
from .triton_row import rotate_heads, write_row

# heads whose queries one program rotates
HEADS = 16


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
    num_unquantized: int = 0,
) -> None:
    """Rotates queries, and writes normalized latents and rotated keys to rows start .. start+s-1 of a cache's buffer.

    Rows are bit for bit what `LatentFormat` writes or, with bits 8 or 4, what `IntegerFormat` writes with these bits
    and `num_unquantized`. `start` is a number or an integer on the device; on the device it cannot be checked, so rows
    past the end of the buffer are not written. Norm and rotation run in float32 and are each rounded once to the dtype
    of the inputs, as `nn.RMSNorm` and `rotate` do.
    """
    c = norm_weight.shape[0]
    r = compressed.shape[-1] - c
    s = compressed.shape[1]
    assert start.numel() == 1 if isinstance(start, Tensor) else 0 <= start <= rows.shape[1] - s
    outputs = parts_of_rows(rows, c, r, compressed.dtype, bits, num_unquantized)
    _launch_norm_rotate((queries, compressed, norm_weight, cos, sin), outputs, eps, start, bits, num_unquantized)


def norm_rotate(
    queries: Tensor,  # [b s h n+r]  rotary parts are rotated in place
    compressed: Tensor,  # [b s c+r]
    norm_weight: Tensor,  # [c]
    eps: float,
    cos: Tensor,  # [b or 1 s r/2]  float32
    sin: Tensor,  # [b or 1 s r/2]  float32
) -> tuple[Tensor, Tensor]:  # [b s c], [b s r]
    """Rotates the queries, and returns the normalized latents and rotated keys that `norm_rotate_write` would write."""
    b, s, width = compressed.shape
    c = norm_weight.shape[0]
    latent, k_rotary = (compressed.new_empty(b, s, x) for x in (c, width - c))
    # without bits, no scales are written, so any tensor can take their place
    _launch_norm_rotate((queries, compressed, norm_weight, cos, sin), (latent, latent, k_rotary), eps, 0, None)
    return latent, k_rotary


def parts_of_rows(
    rows: Tensor, c: int, r: int, dtype: torch.dtype, bits: int | None, u: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of latents or codes [b t ..], of scales [b t planes] and of what is in bfloat16 beside codes [b t u+r]."""
    if bits is None:
        assert u == 0
        assert rows.dtype == dtype
        assert rows.shape[2] == c + r
        # without bits, no scales are written, so any tensor can take their place
        return rows[..., :c], rows, rows[..., c:]
    assert rows.dtype == torch.uint8
    assert bits in (8, 4)
    format = IntegerFormat(c, r, dtype, u, bits)
    assert rows.shape[2] == format.row_width
    scales = format._scales
    return rows, rows[..., scales].view(torch.bfloat16), rows[..., scales.stop :].view(torch.bfloat16)


def _launch_norm_rotate(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, Tensor, Tensor],
    eps: float,
    start: Tensor | int,
    bits: int | None,
    u: int = 0,
) -> None:
    queries, compressed, norm_weight, cos, sin = inputs
    latent, scales, in_bfloat16 = outputs
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
    assert latent.stride(2) == scales.stride(2) == in_bfloat16.stride(2) == 1
    if b * s == 0:
        return
    heads = min(HEADS, triton.next_power_of_2(h))
    _norm_rotate_kernel[(s, 1 + triton.cdiv(h, heads), b)](
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
        in_bfloat16.stride(0),
        eps,
        LATENT_STRIDE=latent.stride(1),
        SCALES_STRIDE=scales.stride(1),
        KEY_STRIDE=in_bfloat16.stride(1),
        START_IS_POINTER=isinstance(start, Tensor),
        H=h,
        N=width - r,
        R=r,
        C=c,
        U=u,
        BITS=bits or 0,
        PLANE=PLANE,
        PLANES=triton.next_power_of_2(triton.cdiv(c, PLANE)),
        R_BLOCK=triton.next_power_of_2(r),
        HEADS=heads,
        num_warps=4,
        # torch rounds a product before it adds it, and the same bytes need the same roundings
        enable_fp_fusion=False,
        **launch_options(queries),
    )


# one compiled kernel serves every length and every place in the cache
@triton.jit(do_not_specialize=["start", "num_rows"])
def _norm_rotate_kernel(
    queries,
    compressed,
    norm_weight,
    cos,
    sin,
    latent,
    scales,
    in_bfloat16,
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
    U: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    R_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Programs [s, 1 + blocks of heads, b]: part 0 writes a token's latent and key, the others rotate its queries."""
    token, part, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    angle = sequence * cos_b + token * cos_s
    if part > 0:
        wait_for_inputs(OVERLAPS)
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        row = queries + sequence * queries_b + token * queries_s
        rotate_heads(row, cos + angle, sin + angle, head, H, N, R, R_BLOCK)
    else:
        source = compressed + sequence * compressed_b + token * compressed_s
        latent += sequence * latent_b
        scales += sequence * scales_b
        in_bfloat16 += sequence * key_b
        write_row(
            source,
            norm_weight,
            cos + angle,
            sin + angle,
            latent,
            scales,
            in_bfloat16,
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
            U,
            BITS,
            PLANE,
            PLANES,
            R_BLOCK,
            OVERLAPS,
        )
