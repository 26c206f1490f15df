"""What kernels do with one new token: normalize its latent, rotate its queries and key, and write its cache row.

Letters: h heads, n/r content and rotary width per head, c latent width, u unquantized channels. A plane is 128 elements
that share a scale.
"""

import triton
import triton.language as tl

from .triton_overlap import wait_for_inputs


@triton.jit
def write_row(
    source,
    norm_weight,
    cos,
    sin,
    latent,
    scales,
    in_bfloat16,
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
    U: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    R_BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Writes the normalized latent and the rotated key of one token to its row of one sequence's buffer.

    At `in_bfloat16` are the unquantized channels, if there are any, and after them the rotated key.
    """
    column = tl.arange(0, PLANES)[:, None] * PLANE + tl.arange(0, PLANE)[None, :]
    weight = tl.load(norm_weight + column, mask=column < C, other=0.0)
    wait_for_inputs(OVERLAPS)
    position = token + (tl.load(start).to(tl.int64) if START_IS_POINTER else start)
    is_inside = (position >= 0) & (position < num_rows)
    # loaded before the first store, since no load is moved ahead of a store
    value = tl.load(source + column, mask=column < C, other=0.0)
    in_bfloat16 += position * KEY_STRIDE
    _write_key(source + C, cos, sin, in_bfloat16 + U, is_inside, R, R_BLOCK)
    latent += position * LATENT_STRIDE
    scales += position * SCALES_STRIDE
    _write_latent(value, weight, eps, latent, scales, in_bfloat16, column, is_inside, C, U, BITS, PLANE)


@triton.jit
def rotate_heads(row, cos, sin, head, H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, R_BLOCK: tl.constexpr):
    """Rotates pairs (2i, 2i+1) of these heads, in place."""
    head, rotary, pair = head[:, None], tl.arange(0, R_BLOCK)[None, :], tl.arange(0, R_BLOCK // 2)[None, :]
    at = row + head * (N + R) + N + rotary
    inside = (head < H) & (rotary < R)
    query = tl.load(at, mask=inside, other=0.0)
    # every head loads its own angles, so that no thread takes them from another and waits for it
    angle = head * 0 + pair
    cosine = tl.load(cos + angle, mask=pair < R // 2, other=0.0)
    sine = tl.load(sin + angle, mask=pair < R // 2, other=0.0)
    even, odd = tl.split(tl.reshape(query.to(tl.float32), (head.shape[0], R_BLOCK // 2, 2)))
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), query.shape)
    tl.store(at, turned.to(query.dtype), mask=inside)


@triton.jit
def _write_key(source, cos, sin, out, is_inside, R: tl.constexpr, R_BLOCK: tl.constexpr):
    """Rotates pairs (2i, 2i+1) of the key that all heads share, and stores it."""
    pair = tl.arange(0, R_BLOCK // 2)
    even = tl.load(source + 2 * pair, mask=pair < R // 2, other=0.0)
    odd = tl.load(source + 2 * pair + 1, mask=pair < R // 2, other=0.0)
    cosine = tl.load(cos + pair, mask=pair < R // 2, other=0.0)
    sine = tl.load(sin + pair, mask=pair < R // 2, other=0.0)
    x, y = even.to(tl.float32), odd.to(tl.float32)
    inside = (pair < R // 2) & is_inside
    # rounded to the dtype of the inputs first, as torch does, also where coded rows keep the key in bfloat16
    turned_even, turned_odd = (x * cosine - y * sine).to(even.dtype), (x * sine + y * cosine).to(even.dtype)
    tl.store(out + 2 * pair, turned_even.to(out.dtype.element_ty), mask=inside)
    tl.store(out + 2 * pair + 1, turned_odd.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _write_latent(
    value, weight, eps, out, scales, unquantized, column, is_inside,
    C: tl.constexpr, U: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr,
):  # fmt: skip
    """Normalizes a latent loaded as [PLANES PLANE], and stores it, or codes, scales and unquantized channels of it."""
    wide = value.to(tl.float32)
    root = tl.rsqrt(tl.sum(tl.sum(wide * wide, axis=1), axis=0) / C + eps)
    latent = (wide * root * weight.to(tl.float32)).to(value.dtype)
    if BITS == 0:
        tl.store(out + column, latent, mask=(column < C) & is_inside)
    else:
        CODED: tl.constexpr = C - U
        coded = latent.to(tl.float32)
        if U:
            last = (column >= CODED) & (column < C)
            tl.store(unquantized + (column - CODED), coded.to(unquantized.dtype.element_ty), mask=last & is_inside)
            coded = tl.where(column < CODED, coded, 0.0)
        codes, scale = _encode(coded, BITS)
        plane = tl.arange(0, value.shape[0])
        tl.store(scales + plane, scale, mask=(plane * PLANE < CODED) & is_inside)
        _write_codes(tl.where(column < CODED, codes, 0), column, out, is_inside, CODED, BITS)


@triton.jit
def _encode(latent, BITS: tl.constexpr):
    """Codes and scales of latents [PLANES PLANE] as `IntegerFormat` computes them."""
    largest = tl.max(tl.abs(latent), axis=1)
    HALF: tl.constexpr = 1 << (BITS - 1)
    # a plane of zeros gets the smallest normal bfloat16 as its scale, because elements are divided by the scale
    scales = tl.maximum(largest * (1.004 / HALF), 1.1754943508222875e-38).to(tl.bfloat16)
    # the correctly rounded quotient, because a quotient on the border of two codes decides between them
    scaled = tl.div_rn(latent, tl.broadcast_to(scales.to(tl.float32)[:, None], latent.shape))
    codes = tl.minimum(tl.maximum(tl.floor(scaled) + HALF, 0.0), 2.0 * HALF - 1)
    return codes.to(tl.int32), scales


@triton.jit
def _write_codes(codes, column, out, is_inside, C: tl.constexpr, BITS: tl.constexpr):
    """Stores codes [PLANES PLANE] as bytes, and zeros between the last code and the first scale, as the format does."""
    PADDED: tl.constexpr = ((C * BITS + 7) // 8 + 3) // 4 * 4
    if BITS == 8:
        tl.store(out + column, codes.to(tl.uint8), mask=(column < PADDED) & is_inside)
    else:
        # a byte holds the codes of elements j and j + c/2, which are gathered since other threads computed them
        HALF: tl.constexpr = (C + 1) // 2
        WIDTH: tl.constexpr = codes.numel
        byte = tl.arange(0, WIDTH // 2)
        flat = tl.reshape(codes, (WIDTH,))
        low = tl.where(byte < HALF, tl.gather(flat, byte, 0), 0)
        high = tl.where(byte + HALF < C, tl.gather(flat, tl.minimum(byte + HALF, C - 1), 0), 0)
        tl.store(out + byte, (low | high << 4).to(tl.uint8), mask=(byte < PADDED) & is_inside)
