"""Absorbed attention of few query tokens over cached latents on a GPU; latents are read once, as they are stored.

Letters: b batch, s query tokens, h heads, t cached tokens, c latent width, r rotary width, u unquantized channels.

A row is one head of one query token; all rows of a sequence read the same latents. The cache is cut into splits, a
program attends to each of them, and their partial sums are combined. The grid depends on shapes only, so a captured
graph stays correct while `length` grows.

A piece is a group of a latent's elements that share one scale, 128 of them at DeepSeek-V2's widths, or the unquantized
channels, which have no scale. Programs keep one accumulator per piece, since Triton's shapes are powers of two and
512 + 64 would be padded to 1024. Scales multiply scores and weights, never elements. The softmax has base 2 and a
running maximum (Milakov and Gimelshein, arXiv:1805.02867). Everything but the operands of products is in float32.
Source: DeepSeek-V2 (arXiv:2405.04434) 2.1.2; splits as in Flash-Decoding (Dao et al., 2023).
"""

import math
from functools import cache

import torch
import triton
from torch import Tensor

from .triton_layout import has_words, layout
from .triton_overlap import launch_options
from .triton_splits import _attend_to_splits, _combine
from .triton_tiles import dot_dtype
from .triton_tiling import Tiling, columns_of, fitting, registers, shared_memory, tiling

LOG2_E = 1.4426950408889634


def attend(
    q_absorbed: Tensor,  # [b s h c]
    q_rotary: Tensor,  # [b s h r]  rotated
    latents: list[Tensor],  # one or two segments of tokens, [b t c] or [1 t c], or bytes of codes and scales
    k_rotary: list[Tensor],  # [b t u+r]  of the same tokens; with codes, the last u channels of the latents come first
    *,
    scale: float,
    mask: Tensor | None = None,  # [b 1 s t] or [1 1 s t]  bool, True where a query may look
    bits: str = "",
    length: Tensor | None = None,  # [1]  tokens that the last segment holds
    first: Tensor | None = None,  # [b]  tokens before this one are hidden
    cut: Tiling | None = None,
) -> Tensor:  # [b s h c]
    """Weighted sums of latents, in the dtype of the queries; without a mask attention is causal.

    Tokens after `length` and before `first` are never read. A query that sees no token gives zeros. The host does not
    wait: `length` and `first` stay on the device, and the kernel decides how many splits share the work.
    """
    if q_absorbed.numel() == 0 or all(latent.shape[1] == 0 for latent in latents):
        return q_absorbed.new_zeros(q_absorbed.shape)
    given = {"scale": scale, "mask": mask, "bits": bits, "length": length, "first": first, "cut": cut}
    parts, sizes = attend_in_splits(q_absorbed, q_rotary, latents, k_rotary, **given)
    return parts if sizes is None else combine(parts, sizes, q_absorbed.dtype, overlap=True)


def attend_in_splits(
    q_absorbed: Tensor,
    q_rotary: Tensor,
    latents: list[Tensor],
    k_rotary: list[Tensor],
    *,
    scale: float,
    mask: Tensor | None = None,
    bits: str = "",
    length: Tensor | None = None,
    first: Tensor | None = None,
    cut: Tiling | None = None,
    overlap: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`attend` without its last step: parts and sizes for `combine`, or with a single split the result and None."""
    (b, s, h, c), r = q_absorbed.shape, q_rotary.shape[3]
    pairs = [pair for pair in zip(latents, k_rotary) if pair[0].shape[1] > 0]
    u = pairs[0][1].shape[2] - r
    assert 0 <= u < c if bits else u == 0
    assert len(pairs) <= 2
    assert q_rotary.shape[:3] == (b, s, h)
    for latent, rotary in pairs:
        assert latent.shape[1] == rotary.shape[1]
        assert {latent.shape[0], rotary.shape[0]} <= {1, b}
        assert rotary.shape[2] == r + u
        assert bits or latent.shape[2] == c
    assert all(x.stride(-1) == 1 for x in (q_absorbed, q_rotary, *pairs[0], *pairs[-1]))
    assert mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    # `length` belongs to the last segment, so it means nothing if that segment is empty and was dropped above
    length = length if latents[-1].shape[1] > 0 else None

    (latent_0, rotary_0), (latent_1, rotary_1) = pairs[0], pairs[-1]
    capacity = sum(latent.shape[1] for latent, _ in pairs)
    if cut is None:
        cut = tiling(s * h, bits, q_absorbed.dtype, capacity)
        columns = columns_of(bits, c, r, u, cut.rows)
        cut = fitting(cut, columns, q_absorbed.itemsize, bool(bits), shared_memory(q_absorbed.device))
    # Triton cuts a product with no more columns than rows by its rows, so that every warp would compute all 16 of them
    form = layout(bits, c, u, least=2 * cut.rows)
    words = bool(bits) and has_words(form, r, u, alignment(latent_0, latent_1, rotary_0, rotary_1))
    if u and not words:
        # single bytes and channels take a register each, and those of 32 tokens fill the registers
        cut = cut._replace(tokens=min(cut.tokens, 32))
    num_tiles = triton.cdiv(s * h, cut.rows)
    splits = num_splits(b * num_tiles, capacity, cut, q_absorbed.device)
    if splits > 1:
        parts = q_absorbed.new_empty(b, splits, s, h, c, dtype=torch.float32)
        sizes = q_absorbed.new_empty(b, splits, s, h, dtype=torch.float32)
    else:
        parts, sizes = q_absorbed.new_empty(b, s, h, c), None

    _attend_to_splits[(num_tiles * splits * b,)](
        q_absorbed,
        q_rotary,
        latent_0,
        rotary_0,
        latent_1,
        rotary_1,
        mask.view(torch.int8) if mask is not None else None,
        length,
        first,
        parts,
        sizes,
        scale * LOG2_E,
        s,
        latent_0.shape[1],
        latent_1.shape[1] if len(pairs) > 1 else 0,
        splits,
        max(cut.tokens_per_split // cut.tokens, 1),
        *q_absorbed.stride()[:3],
        *q_rotary.stride()[:3],
        *(step for x in (latent_0, rotary_0, latent_1, rotary_1) for step in token_steps(x)),
        *((mask.stride(0) if mask.shape[0] > 1 else 0, *mask.stride()[2:]) if mask is not None else (0, 0, 0)),
        H=h,
        C=c,
        R=r,
        U=u,
        HAS_TWO=len(pairs) > 1,
        BITS=form.bits,
        BYTE_PLANES=form.byte_planes,
        CODE_PLANES=form.code_planes,
        BOUNDS=form.bounds,
        PIECES=form.pieces,
        LEAST=form.least,
        SCALES=form.scales,
        LATENT_ALIGNMENT=alignment(latent_0, latent_1),
        ROTARY_ALIGNMENT=alignment(rotary_0, rotary_1),
        DOT=dot_dtype(q_absorbed),
        WORDS=words,
        PTX=q_absorbed.is_cuda and torch.version.hip is None,
        BM=cut.rows,
        BN=cut.tokens,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        **registers(cut),
        **launch_options(q_absorbed, overlap),
    )
    return parts, sizes


def combine(
    parts: Tensor,  # [b splits s h c]  float32
    sizes: Tensor,  # [b splits s h]  base-2 logarithm of the sum of weights
    dtype: torch.dtype,
    *,
    overlap: bool = False,
) -> Tensor:  # [b s h c]
    """Combines the partial sums of `attend_in_splits` into the weighted sums over all tokens."""
    b, splits, s, h, c = parts.shape
    assert sizes.shape == (b, splits, s, h)
    assert parts.is_contiguous()
    assert sizes.is_contiguous()
    out = parts.new_empty(b, s, h, c, dtype=dtype)
    # 32 numbers per thread, so that up to 64 splits of a row are loaded before any is used
    at_once = min(triton.next_power_of_2(splits), 64)
    columns = min(4096 // at_once, triton.next_power_of_2(c))
    _combine[(b * s * h, triton.cdiv(c, columns))](
        parts,
        sizes,
        out,
        s * h,
        splits,
        C=c,
        BC=columns,
        SPLITS=triton.cdiv(splits, at_once) * at_once,
        BS=triton.next_power_of_2(splits),
        AT_ONCE=at_once,
        num_warps=4,
        **launch_options(parts, overlap),
    )
    return out


def num_splits(num_programs: int, capacity: int, cut: Tiling, device: torch.device) -> int:
    """The number of splits: never more programs than are resident at once, since one more would double the time."""
    resident = cut.programs_per_sm * num_multiprocessors(device)
    return max(min(resident // num_programs, triton.cdiv(capacity, cut.tokens_per_split)), 1)


@cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def token_steps(x: Tensor) -> tuple[int, int]:
    """Strides of sequences and of tokens; the stride of sequences is 0 if all of them share one."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def alignment(*segments: Tensor) -> int:
    """The largest number of bytes, up to the 16 of the widest load, that divides every token's address."""
    steps = [step * x.element_size() for x in segments for step in token_steps(x)]
    return math.gcd(16, *steps, *(x.data_ptr() for x in segments))
