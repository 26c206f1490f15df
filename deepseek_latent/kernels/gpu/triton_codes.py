"""How a kernel reads the codes of cached rows, and converts them to operands of products.

Codes are read into registers as words of four bytes, one tile ahead, because Triton prefetches only operands that a
product takes as they were loaded, not operands that are converted first. Scales multiply scores and weights, never
elements.
"""

# Triton cannot compile (*tuple, x)
# ruff: noqa: RUF005, SIM300

import triton
import triton.language as tl


@triton.jit
def _code_plane(x, k: tl.constexpr, BITS: tl.constexpr, BYTE_PLANES: tl.constexpr, ONES: tl.constexpr):
    """The codes of plane k, one in each byte, from the byte planes x; ONES has a 1 in every byte of an element of x."""
    SHARED: tl.constexpr = BITS // BYTE_PLANES
    if k < BYTE_PLANES:
        return x[k] & (((1 << BITS) - 1) * ONES)
    else:
        ABOVE: tl.constexpr = BITS + SHARED * (k - BYTE_PLANES)
        codes = (x[0] >> ABOVE) & (((1 << SHARED) - 1) * ONES)
        for i in tl.static_range(1, BYTE_PLANES):
            codes |= (x[i] >> (ABOVE - SHARED * i)) & ((((1 << SHARED) - 1) << (SHARED * i)) * ONES)
        return codes


@triton.jit
def _value(codes, BITS: tl.constexpr, DOT: tl.constexpr):
    """The values of codes, one code in each byte, before they are multiplied by their scale."""
    if BITS == 9:
        # shifted to where float16 has them, the bits of an e4m3 are 256 times less; `_scale` multiplies by 256
        halves = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001
        return halves.to(tl.int16).to(tl.float16, bitcast=True).to(DOT)
    else:
        # a code stands for the middle of its cell, a half integer of at most 8 bits, which bfloat16 holds exactly
        return (codes.to(tl.float32) + (0.5 - (1 << (BITS - 1)))).to(DOT)


@triton.jit
def _values(words, BITS: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr):
    """`_value` of the bytes of words [BN w], in the order of the bytes: [BN 4w]."""
    if PTX and DOT == tl.bfloat16:
        if BITS == 9:
            a, b, c, d = _float8_by_ptx(words)
        elif BITS == 8:
            a, b, c, d = _middles_by_ptx(words, BITS)
        else:
            a, b, c, d = _small_middles_by_ptx(words, BITS)
    else:
        a = _value((words & 0xFF).to(tl.uint8), BITS, DOT)
        b = _value(((words >> 8) & 0xFF).to(tl.uint8), BITS, DOT)
        c = _value(((words >> 16) & 0xFF).to(tl.uint8), BITS, DOT)
        d = _value(((words >> 24) & 0xFF).to(tl.uint8), BITS, DOT)
    values = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [words.shape[0], 4 * words.shape[1]])
    return _wall(values, PTX)


@triton.jit
def _wall(values, PTX: tl.constexpr):
    """Returns the values unchanged, but hides from Triton that they were joined.

    Otherwise Triton would treat them as elements of fewer bits, and convert them to another layout for each product.
    """
    if PTX and values.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=values.dtype, is_pure=False, pack=2)
    else:
        return values


@triton.jit
def _middles_by_ptx(words, BITS: tl.constexpr):
    """`_value` of codes of up to 8 bits, as four bfloat16 of each word, in two and a half instructions per element.

    The bits of 2^15 as float32, with a code in their second lowest byte, are those of 2^15 + code. What is subtracted
    then is 2^15 and the offset between a code and its value.
    """
    middle = tl.full(words.shape, 32768 + (1 << (BITS - 1)) - 0.5, tl.float32)
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 a, b;
        .reg .b32 t;
        prmt.b32 t, $4, 0x47000000, 0x7404; mov.b32 a, t; sub.f32 a, a, $5;
        prmt.b32 t, $4, 0x47000000, 0x7414; mov.b32 b, t; sub.f32 b, b, $5;
        cvt.rn.bf16x2.f32 t, b, a; mov.b32 {$0, $1}, t;
        prmt.b32 t, $4, 0x47000000, 0x7424; mov.b32 a, t; sub.f32 a, a, $5;
        prmt.b32 t, $4, 0x47000000, 0x7434; mov.b32 b, t; sub.f32 b, b, $5;
        cvt.rn.bf16x2.f32 t, b, a; mov.b32 {$2, $3}, t;
        }""",
        "=h,=h,=h,=h,r,f",
        [words, middle],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _small_middles_by_ptx(words, BITS: tl.constexpr):
    """`_value` of codes of up to 6 bits, as four bfloat16 of each word, in one and a half instructions per element.

    The bits of 64 as bfloat16, with twice a code in their lowest seven, are those of 64 + code. What is subtracted then
    is 64 and the offset between a code and its value.
    """
    middle = tl.full(words.shape, (0x4280 + (1 << BITS) - 1) * 0x10001 | 0x80008000, tl.uint32)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 w, p, one;
        mov.b32 one, 0x3F803F80;
        shl.b32 w, $4, 1; or.b32 w, w, 0x80808080;
        prmt.b32 p, w, 0x42424242, 0x4140; fma.rn.bf16x2 p, p, one, $5; mov.b32 {$0, $1}, p;
        prmt.b32 p, w, 0x42424242, 0x4342; fma.rn.bf16x2 p, p, one, $5; mov.b32 {$2, $3}, p;
        }""",
        "=h,=h,=h,=h,r,r",
        [words, middle],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _float8_by_ptx(words):
    """`_value` of e4m3, as four bfloat16 of each word.

    Shifted to where bfloat16 has them, the bits of an e4m3 are 2^120 times less. A factor of 2^112 is restored here,
    and the other 2^8 by `_scale`, as for `_value`.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 p, s, factor, none;
        mov.b32 factor, 0x77807780;
        mov.b32 none, 0x80008000;
        prmt.b32 p, $4, 0, 0x1404; and.b32 s, p, 0x80008000; shr.b32 p, p, 4; and.b32 p, p, 0x07F007F0;
        or.b32 p, p, s; fma.rn.bf16x2 p, p, factor, none; mov.b32 {$0, $1}, p;
        prmt.b32 p, $4, 0, 0x3424; and.b32 s, p, 0x80008000; shr.b32 p, p, 4; and.b32 p, p, 0x07F007F0;
        or.b32 p, p, s; fma.rn.bf16x2 p, p, factor, none; mov.b32 {$2, $3}, p;
        }""",
        "=h,=h,=h,=h,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _convert(
    loaded, BITS: tl.constexpr, BYTE_PLANES: tl.constexpr, CODE_PLANES: tl.constexpr,
    DOT: tl.constexpr, WORDS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Converts loaded tiles of bytes or words to the operands of products, one per piece and code plane."""
    pieces = ()
    for j in tl.static_range(len(loaded) // BYTE_PLANES):
        for k in tl.static_range(CODE_PLANES):
            codes = loaded[j]
            if BITS < 8:
                of_piece = loaded[j * BYTE_PLANES : (j + 1) * BYTE_PLANES]
                codes = _code_plane(of_piece, k, BITS, BYTE_PLANES, 0x01010101 if WORDS else 1)
            pieces = pieces + (_values(codes, BITS, DOT, PTX) if WORDS else _value(codes, BITS, DOT),)
    return pieces


@triton.jit
def _load_pieces(
    rows, shown, BOUNDS: tl.constexpr, LEAST: tl.constexpr, BYTE_PLANES: tl.constexpr, WORDS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Loads the first piece of each byte plane, then the second of each, and so on, each as one tile.

    Bytes are loaded as words if possible, since each single byte would occupy a register of its own.
    """
    IN_ONE: tl.constexpr = 4 if WORDS else 1
    if WORDS:
        rows = tl.multiple_of(rows.to(tl.pointer_type(tl.uint32)), ALIGNMENT)
    tiles = ()
    for j in tl.static_range(len(BOUNDS) - 1):
        for i in tl.static_range(BYTE_PLANES):
            first = (i * BOUNDS[len(BOUNDS) - 1] + BOUNDS[j]) // IN_ONE
            tiles = tiles + (_load(rows, shown, first, (BOUNDS[j + 1] - BOUNDS[j]) // IN_ONE, LEAST // IN_ONE),)
    return tiles


@triton.jit
def _load_bfloat16(
    rows, shown, START: tl.constexpr, COUNT: tl.constexpr, LEAST: tl.constexpr, WORDS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Loads what rows hold in bfloat16, unquantized channels or rotary keys, as words of two if possible."""
    if WORDS:
        rows = tl.multiple_of(rows.to(tl.pointer_type(tl.uint32)), ALIGNMENT)
        return _load(rows, shown, START // 2, COUNT // 2, LEAST // 2)
    else:
        return _load(rows, shown, START, COUNT, LEAST)


@triton.jit
def _unpack(keys, DOT: tl.constexpr, WORDS: tl.constexpr, PTX: tl.constexpr):
    """Converts what `_load_bfloat16` loaded to an operand of products."""
    if WORDS:
        if PTX and DOT == tl.bfloat16:
            a, b = tl.inline_asm_elementwise(
                "mov.b32 {$0, $1}, $2;", "=h,=h,r", [keys], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
            )
        else:
            # a bfloat16 is the upper half of a float32
            a = (keys << 16).to(tl.float32, bitcast=True).to(DOT)
            b = (keys & 0xFFFF0000).to(tl.float32, bitcast=True).to(DOT)
        return _wall(tl.reshape(tl.join(a, b), [keys.shape[0], 2 * keys.shape[1]]), PTX)
    else:
        return keys.to(DOT)


@triton.jit
def _load(rows, shown, first, COUNT: tl.constexpr, LEAST: tl.constexpr):
    """Loads COUNT columns of rows as a tile [BN w], with zeros behind them; w is a power of two, LEAST or more."""
    WIDTH: tl.constexpr = max(triton.next_power_of_2(COUNT), LEAST)
    column = tl.arange(0, WIDTH)
    at = rows[:, None] + (first + column)[None, :]
    if COUNT == WIDTH:
        return tl.load(at, shown[:, None], 0)
    else:
        return tl.load(at, shown[:, None] & (column < COUNT)[None, :], 0)


@triton.jit
def _load_scales(
    rows, shown, BITS: tl.constexpr, SCALES: tl.constexpr, PIECES: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    """Loads the scales [BN] of the first SCALED pieces, in the dtype in which they are stored."""
    scales = ()
    for n in tl.static_range(SCALED):
        of_plane = (rows + SCALES).to(tl.pointer_type(tl.float32 if BITS == 9 else tl.uint16))
        scales = scales + (tl.load(of_plane + PIECES[n][0] // 128, shown, 0),)
    return scales


@triton.jit
def _scale(stored, BITS: tl.constexpr):
    """Stored scales as float32; those of fp8 also restore the factor that `_value` leaves out."""
    # a bfloat16 is the upper half of a float32
    return stored * 256.0 if BITS == 9 else (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
