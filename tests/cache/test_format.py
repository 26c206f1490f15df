"""Rows of cached tokens: how far an element may move, which byte holds what, and what must never go unseen.

Letters: c latent width, r rotary width, m the largest magnitude of a plane of 128 latent elements.
"""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_latent import DeepseekV2Config, LatentCache
from deepseek_latent.cache.format import latent_format
from deepseek_latent.cache.layer import LatentCacheLayer
from deepseek_latent.cache.segments import Latents, Segment
from tests.support import V2, seeded

INTEGERS = (8, 6, 5, 4)
CODED = ("int8", "int6", "int5", "int4", "fp8")
FORMATS = (None, *CODED)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDTHS = (1, 3, 7, 9, 17, 40, 80, 127, 128, 129, 130, 200, 512)
# a scale is never below the smallest normal number, in bfloat16 and in float32
TINY = 2.0**-126

every_format = pytest.mark.parametrize("cache_dtype", FORMATS, ids=str)
every_code = pytest.mark.parametrize("cache_dtype", CODED, ids=str)
every_integer = pytest.mark.parametrize("bits", INTEGERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
examples = settings(deadline=None, max_examples=40, derandomize=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def decoded(cache_dtype: str | None, latent: Tensor, k_rotary: Tensor, dtype: torch.dtype | None = None):
    """The pair after `encode` and `decode`, in the dtype it came in."""
    rows_format = latent_format(cache_dtype, latent.shape[-1], k_rotary.shape[-1], latent.dtype)
    rows = rows_format.decode(rows_format.encode(latent, k_rotary), dtype or latent.dtype)
    return rows.split((latent.shape[-1], k_rotary.shape[-1]), dim=-1)


def largest_of_plane(latent: Tensor) -> Tensor:
    """m for every element [.. c], float64."""
    planes = latent.double().split(128, dim=-1)
    return torch.cat([plane.abs().amax(-1, keepdim=True).expand_as(plane) for plane in planes], dim=-1)


def allowed_error(cache_dtype: str, latent: Tensor) -> Tensor:
    """What the docstrings of IntegerFormat and Float8Format allow each element [.. c], for m in normal numbers."""
    m = largest_of_plane(latent)
    if cache_dtype == "fp8":
        # below 448 TINY the scale stands still
        return torch.maximum(latent.double().abs() / 16, m.clamp(min=448 * TINY) * 2**-18.8)
    # a cell is at least TINY wide, and half a cell is the error
    return (1.008 * m * 2.0 ** -int(cache_dtype.removeprefix("int"))).clamp(min=TINY / 2)


def assert_within_stated_error(cache_dtype: str, latent: Tensor, actual: Tensor) -> None:
    error, allowed = (actual.double() - latent.double()).abs(), allowed_error(cache_dtype, latent)
    assert (error <= allowed).all(), f"{(error / allowed).max():.4f} of what is allowed"


# tokens [c] of every kind


def one_hot(c: int, seed: int) -> Tensor:
    x = torch.zeros(c)
    x[seed % c] = noise(1, seed=seed).item()
    return x


KINDS = {
    "normal": lambda c, seed: noise(c, seed=seed),
    "unlike magnitudes": lambda c, seed: noise(c, seed=seed) * (3 * noise(c, seed=seed + 1)).exp2(),
    "one outlier": lambda c, seed: noise(c, seed=seed) + 1000 * one_hot(c, seed),
    "one-hot": one_hot,
    "constant": lambda c, seed: noise(1, seed=seed).expand(c),
    "negative": lambda c, seed: -noise(c, seed=seed).abs(),
    "on the cells' borders": lambda c, seed: torch.arange(c) % 257 / 128 - 1.0,
    "zeros": lambda c, seed: torch.zeros(c),
    "zeros but the first plane": lambda c, seed: noise(c, seed=seed) * (torch.arange(c) < 128),
}
WITHOUT_EMPTY_PLANES = sorted(KINDS.keys() - {"one-hot", "zeros", "zeros but the first plane"})


# the numbers that hypothesis likes: zeros of both signs, borders, subnormal ones
few_numbers = st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=20).map(torch.tensor)


@every_code
@pytest.mark.parametrize("exponent", [127.5, 100, 14, 0, -14, -100, -118, -124, -128, -140, -149])
def test_no_element_moves_further_than_stated(cache_dtype, exponent):
    # from what a float32 can just hold with the error to what is hardly more than zero
    for kind in KINDS:
        for c in WIDTHS:
            x = KINDS[kind](c, c).double()
            latent = (x / x.abs().max().clamp(min=1e-30) * 2.0**exponent).float()
            actual, _ = decoded(cache_dtype, latent, torch.zeros(2))
            assert torch.isfinite(actual).all()
            assert_within_stated_error(cache_dtype, latent, actual)


@every_code
@given(latent=few_numbers)
@examples
def test_no_element_of_any_few_numbers_moves_further_than_stated(cache_dtype, latent):
    actual, _ = decoded(cache_dtype, latent, torch.zeros(2))
    assert torch.isfinite(actual).all()
    assert_within_stated_error(cache_dtype, latent, actual)


@every_dtype
@every_format
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_reads_what_float64_reads_rounded_to_it(kind, cache_dtype, dtype):
    for c in WIDTHS:
        latent, k_rotary = KINDS[kind](c, c).to(dtype), noise(6, seed=c).to(dtype)
        if cache_dtype is None:
            assert torch.equal(decoded(cache_dtype, latent, k_rotary)[0], latent)
            continue
        exact, _ = decoded(cache_dtype, latent, k_rotary, torch.float64)
        assert_within_stated_error(cache_dtype, latent, exact)
        in_float32, _ = decoded(cache_dtype, latent, k_rotary, torch.float32)
        assert torch.equal(in_float32, exact.float())
        actual, _ = decoded(cache_dtype, latent, k_rotary)
        assert actual.dtype == dtype
        assert torch.equal(actual, exact if dtype == torch.float64 else in_float32.to(dtype))


@every_code
def test_the_stated_error_is_not_far_above_what_occurs(cache_dtype):
    # lest a budget ten times too wide hide a lost bit
    latent = noise(4000, 128)
    actual, _ = decoded(cache_dtype, latent, torch.zeros(4000, 2))
    error = (actual.double() - latent.double()).abs()
    assert (error / allowed_error(cache_dtype, latent)).max() > 0.9


@every_code
@every_dtype
@given(k_rotary=st.lists(st.floats(width=32), min_size=2, max_size=8).filter(lambda k: len(k) % 2 == 0))
@examples
def test_rotary_keys_are_what_bfloat16_makes_of_them(cache_dtype, dtype, k_rotary):
    k_rotary = torch.tensor(k_rotary).to(dtype)
    _, actual = decoded(cache_dtype, torch.ones(9, dtype=dtype), k_rotary)
    torch.testing.assert_close(actual, k_rotary.bfloat16().to(dtype), rtol=0, atol=0, equal_nan=True)
    _, kept = decoded(None, torch.ones(9, dtype=dtype), k_rotary)
    torch.testing.assert_close(kept, k_rotary, rtol=0, atol=0, equal_nan=True)


@every_integer
@given(latent=few_numbers)
@examples
def test_integers_keep_signs_and_order_within_a_plane(bits, latent):
    actual, _ = decoded(f"int{bits}", latent, torch.zeros(2))
    # a negative number that the division by the scale turns into zero is read as a little above
    divisible = latent.abs() > largest_of_plane(latent) * 2.0**-140
    assert (actual[divisible & (latent > 0)] > 0).all()
    assert (actual[divisible & (latent < 0)] < 0).all()
    for plane, plane_read in zip(latent.split(128), actual.split(128)):
        assert (plane_read[plane.argsort()].diff() >= 0).all()


@every_code
@given(exponent=st.integers(-60, 60), kind=st.sampled_from(WITHOUT_EMPTY_PLANES), seed=st.integers(0, 99))
@examples
def test_a_power_of_two_passes_through_unchanged(cache_dtype, exponent, kind, seed):
    # integers and floats alike divide by a plane's scale, so its exponent changes no code
    latent = KINDS[kind](200, seed)
    scaled, _ = decoded(cache_dtype, latent * 2.0**exponent, torch.zeros(2))
    assert torch.equal(scaled, decoded(cache_dtype, latent, torch.zeros(2))[0] * 2.0**exponent)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_dtype
@every_format
def test_nan_and_infinity_stay_visible_in_their_plane_and_spoil_no_other(cache_dtype, dtype, value):
    c, r = 130, 6
    latent, k_rotary = noise(5, c).to(dtype), noise(5, r, seed=1).to(dtype)
    places = [(1, 0), (2, 127), (3, 129)]
    for token, element in places:
        latent[token, element] = value
    k_rotary[4, 3] = value
    latent_read, k_read = decoded(cache_dtype, latent, k_rotary)
    for token, element in places:
        assert not torch.isfinite(latent_read[token, element])
        other_plane = slice(128, None) if element < 128 else slice(128)
        assert torch.isfinite(latent_read[token, other_plane]).all()
    assert torch.isfinite(latent_read[[0, 4]]).all()
    assert torch.isfinite(k_read[:4]).all()
    assert torch.equal(k_read[4, 3], k_rotary[4, 3]) or (math.isnan(value) and torch.isnan(k_read[4, 3]))


@every_code
def test_what_float32_cannot_hold_is_not_finite_afterwards(cache_dtype):
    latent, k_rotary = torch.full((9,), -1e300, dtype=torch.float64), torch.full((2,), 1e39, dtype=torch.float64)
    latent_read, k_read = decoded(cache_dtype, latent, k_rotary)
    assert not torch.isfinite(latent_read).any()
    assert (k_read == math.inf).all()


@pytest.mark.parametrize(
    ("cache_dtype", "size"), [("int8", 648), ("int6", 520), ("int5", 456), ("int4", 392), ("fp8", 656)]
)
def test_bytes_of_a_row_at_deepseek_v2_widths(cache_dtype, size):
    rows_format = latent_format(cache_dtype, 512, 64, torch.bfloat16)
    assert rows_format.encode(noise(3, 512), noise(3, 64)).nbytes == 3 * size
    assert rows_format.row_width * rows_format.storage_dtype.itemsize == size


@every_dtype
def test_without_bits_a_row_is_the_two_tensors_side_by_side(dtype):
    latent, k_rotary = noise(2, 5, 9).to(dtype), noise(2, 5, 4).to(dtype)
    rows = latent_format(None, 9, 4, dtype).encode(latent, k_rotary)
    assert rows.dtype == dtype
    assert torch.equal(rows, torch.cat((latent, k_rotary), dim=-1))


def test_six_bits_are_at_most_6_6_bits_per_latent_element_with_scales():
    for c in (128, 256, 384, 512, 1024, 1536):
        bytes_of_latent = latent_format("int6", c, 64, torch.bfloat16).row_width - 2 * 64
        assert 6 < bytes_of_latent * 8 / c <= 6.6


# layout, read bit by bit


def bits_of_code(bits: int, c: int, element: int) -> list[tuple[int, int]]:
    """Where an element's code lies: (byte of the row, bit of that byte), the least significant first."""
    if bits == 8:
        return [(element, i) for i in range(8)]
    if bits == 4:
        # low nibble of byte j: element j; high nibble: element j + c/2
        half = math.ceil(c / 2)
        high, j = divmod(element, half)
        return [(j, 4 * high + i) for i in range(4)]
    if bits == 6:
        # the low six bits of byte planes 0 to 2 are code planes 0 to 2, their top two bits are plane 3
        quarter = math.ceil(c / 4)
        plane, j = divmod(element, quarter)
        if plane < 3:
            return [(plane * quarter + j, i) for i in range(6)]
        return [(j, 6), (j, 7), (quarter + j, 6), (quarter + j, 7), (2 * quarter + j, 6), (2 * quarter + j, 7)]
    # the low five bits of byte planes 0 to 4 are code planes 0 to 4; their bits 5, 6, 7 are planes 5, 6, 7
    eighth = math.ceil(c / 8)
    plane, j = divmod(element, eighth)
    if plane < 5:
        return [(plane * eighth + j, i) for i in range(5)]
    return [(i * eighth + j, plane) for i in range(5)]


def num_code_bytes(bits: int, c: int) -> int:
    return {8: c, 6: 3 * math.ceil(c / 4), 5: 5 * math.ceil(c / 8), 4: math.ceil(c / 2)}[bits]


def read_by_hand(bits: int, row: bytes, c: int, r: int) -> tuple[list[int], list[float]]:
    """Codes [c], and the row as numbers [c+r], from the layout alone."""

    def bfloat16(start: int) -> float:
        return struct.unpack("<f", bytes(2) + row[start : start + 2])[0]

    scales = math.ceil(num_code_bytes(bits, c) / 4) * 4
    rotary = scales + 2 * math.ceil(c / 128)
    assert len(row) == rotary + 2 * r
    places = [bits_of_code(bits, c, element) for element in range(c)]
    codes = [sum((row[byte] >> bit & 1) << i for i, (byte, bit) in enumerate(place)) for place in places]
    middles = [code - 2 ** (bits - 1) + 0.5 for code in codes]
    latent = [middle * bfloat16(scales + 2 * (element // 128)) for element, middle in enumerate(middles)]
    return codes, latent + [bfloat16(rotary + 2 * i) for i in range(r)]


@every_integer
def test_no_two_elements_share_a_bit_and_none_is_idle(bits):
    for c in (8, 40, 128, 512):
        places = [place for element in range(c) for place in bits_of_code(bits, c, element)]
        assert len(places) == len(set(places)) == 8 * num_code_bytes(bits, c)


@every_integer
@given(c=st.sampled_from(WIDTHS), r=st.sampled_from([2, 6, 64]), seed=st.integers(0, 999))
@examples
def test_a_row_reads_the_same_bit_by_bit(bits, c, r, seed):
    rows_format = latent_format(f"int{bits}", c, r, torch.float32)
    row = rows_format.encode(noise(c, seed=seed), noise(r, seed=seed + 1))
    _, by_hand = read_by_hand(bits, bytes(row.tolist()), c, r)
    assert rows_format.decode(row, torch.float64).tolist() == by_hand


@every_integer
def test_bits_that_hold_nothing_are_zero(bits):
    # so that the same tokens make the same file
    for c in WIDTHS:
        row = latent_format(f"int{bits}", c, 2, torch.float32).encode(noise(c, seed=c), torch.zeros(2))
        taken = {place for element in range(c) for place in bits_of_code(bits, c, element)}
        row_bytes = row[: math.ceil(num_code_bytes(bits, c) / 4) * 4].tolist()
        idle = [byte >> bit & 1 for i, byte in enumerate(row_bytes) for bit in range(8) if (i, bit) not in taken]
        assert not any(idle)


@every_integer
@given(c=st.sampled_from(WIDTHS), seed=st.integers(0, 999))
@examples
def test_any_codes_read_the_same_bit_by_bit(bits, c, seed):
    # patterns that no encoder of ours need ever write
    rows_format = latent_format(f"int{bits}", c, 2, torch.float32)
    row = rows_format.encode(noise(c, seed=seed), torch.ones(2))
    random = torch.randint(256, (num_code_bytes(bits, c),), generator=seeded(seed))
    row[: len(random)] = random
    _, by_hand = read_by_hand(bits, bytes(row.tolist()), c, 2)
    assert rows_format.decode(row, torch.float64).tolist() == by_hand


@every_integer
def test_an_element_is_the_cell_it_lies_in(bits):
    for c in WIDTHS:
        latent = noise(c, seed=c)
        row = bytes(latent_format(f"int{bits}", c, 2, torch.float32).encode(latent, torch.zeros(2)).tolist())
        codes, values = read_by_hand(bits, row, c, 2)
        for x, code, middle in zip(latent.tolist(), codes, values):
            width = middle / (code + 0.5 - 2 ** (bits - 1))
            assert abs(x - middle) <= width / 2
            assert math.floor(x / width) + 2 ** (bits - 1) == code


@every_integer
def test_an_even_spread_uses_every_code(bits):
    seen = set()
    # where rounding to bfloat16 widens the scale, 8 bits leave the outermost codes to other planes
    for largest in (1.0, 1.9):
        latent = torch.linspace(-largest, largest, 8 * 128).view(8, 128)
        # every plane of the tokens has its largest element at either end
        latent[:, 0], latent[:, 127] = -largest, largest
        for row in latent_format(f"int{bits}", 128, 2, torch.float32).encode(latent, torch.zeros(8, 2)):
            codes, _ = read_by_hand(bits, bytes(row.tolist()), 128, 2)
            seen |= set(codes)
            assert min(codes) <= (bits == 8)
            assert max(codes) >= 2**bits - 1 - (bits == 8)
    assert seen == set(range(2**bits))


# the record of FlashMLA, vLLM ("fp8_ds_mla") and SGLang


def read_record(records: Tensor) -> Tensor:
    """Bytes [.. 656] to [.. 576] in float64: 512 e4m3, four float32 scales, 64 bfloat16."""
    codes = records[..., :512].view(torch.float8_e4m3fn).double()
    scales = records[..., 512:528].contiguous().view(torch.float32).double()
    rotary = records[..., 528:].contiguous().view(torch.bfloat16).double()
    return torch.cat((codes * scales.repeat_interleave(128, dim=-1), rotary), dim=-1)


def write_record(latent: Tensor, k_rotary: Tensor) -> Tensor:
    tiles = latent.float().unflatten(-1, (4, 128))
    scales = tiles.abs().amax(dim=-1) / 448
    codes = (tiles / scales[..., None]).to(torch.float8_e4m3fn).flatten(-2)
    return torch.cat([x.contiguous().view(torch.uint8) for x in (codes, scales, k_rotary.bfloat16())], dim=-1)


def foreign_records(*shape: int) -> Tensor:
    """Records that another program may have written: any finite codes, scales of any size and powers of two."""
    codes = torch.randint(256, (*shape, 512), dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x80  # not a number; minus zero instead
    scales = torch.rand(*shape, 4) * torch.randint(-20, 20, (*shape, 4)).float().exp2()
    scales[..., 1] = torch.randint(-20, 20, shape).float().exp2()
    rotary = (torch.randn(*shape, 64) * 3).bfloat16()
    return torch.cat((codes, scales.view(torch.uint8), rotary.view(torch.uint8)), dim=-1)


@every_dtype
def test_an_fp8_row_is_the_record_of_656_bytes(dtype):
    rows_format = latent_format("fp8", 512, 64, dtype)
    latent = (noise(50, 512) * noise(50, 1, seed=1).exp()).to(dtype)
    k_rotary = noise(50, 64, seed=2).to(dtype)
    records = rows_format.encode(latent, k_rotary)
    assert torch.equal(records, write_record(latent, k_rotary))
    assert torch.equal(rows_format.decode(records, torch.float64), read_record(records))


def test_every_finite_code_of_e4m3_is_written_and_read():
    codes = torch.cat((torch.arange(0x7F), torch.arange(0x80, 0xFF))).to(torch.uint8)
    for scale in (2.0**-3, 1.0, 2.0**40):
        latent = codes.view(torch.float8_e4m3fn).float() * scale
        # a tile of both halves has the largest code in each of its planes
        latent = torch.cat((latent[:127], torch.tensor([0.0]), latent[127:]))
        rows_format = latent_format("fp8", len(latent), 2, torch.float32)
        rows = rows_format.encode(latent, torch.zeros(2))
        assert rows[:127].tolist() == codes[:127].tolist()
        assert rows[128 : 128 + 127].tolist() == codes[127:].tolist()
        assert torch.equal(rows_format.decode(rows, torch.float32)[:-2], latent)


def config_of_records(**changes) -> DeepseekV2Config:
    return DeepseekV2Config(**V2 | {"kv_lora_rank": 512, "qk_rope_head_dim": 64} | changes)


@every_dtype
@torch.no_grad()
def test_foreign_records_come_back_bit_for_bit(dtype):
    records = [foreign_records(3, 7) for _ in range(3)]
    cache = LatentCache.from_flashmla_records([x.clone() for x in records], config_of_records(), dtype)
    assert (cache.cache_dtype, cache.get_seq_length(), cache.nbytes) == ("fp8", 7, 3 * 3 * 7 * 656)
    assert all(torch.equal(a, b) for a, b in zip(cache.flashmla_records(), records, strict=True))
    for layer, foreign in zip(cache.layers, records):
        exact = read_record(foreign)
        assert layer.keys.dtype == dtype
        both = torch.cat((layer.keys, layer.values), dim=-1)[:, 0]
        assert torch.equal(both, exact.float().to(dtype) if dtype != torch.float64 else exact)
    # tokens that follow change none of them
    for i, layer in enumerate(cache.layers):
        layer.update(noise(3, 1, 2, 512, seed=i).to(dtype), noise(3, 1, 2, 64, seed=i).to(dtype))
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.crop(-1)
    for i, (now, foreign) in enumerate(zip(cache.flashmla_records(), records, strict=True)):
        new = write_record(noise(3, 2, 512, seed=i).to(dtype), noise(3, 2, 64, seed=i).to(dtype))
        assert torch.equal(now, torch.cat((foreign, new[:, :1]), dim=1)[[2, 0]])


@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4"], ids=str)
@torch.no_grad()
def test_any_other_cache_gives_records_of_what_it_holds(cache_dtype):
    cache = LatentCache(config_of_records(), cache_dtype=cache_dtype)
    for i in range(3):
        cache.update(noise(1, 1, 5, 512, seed=i).bfloat16(), noise(1, 1, 5, 64, seed=i).bfloat16(), i)
    cache.batch_repeat_interleave(2)
    for i in range(3):
        cache.update(noise(2, 1, 1, 512, seed=i).bfloat16(), noise(2, 1, 1, 64, seed=i).bfloat16(), i)
    for layer, records in zip(cache.layers, cache.flashmla_records(), strict=True):
        assert torch.equal(records, write_record(layer.keys[:, 0], layer.values[:, 0]))


@torch.no_grad()
def test_records_of_another_shape_are_refused_in_one_sentence():
    widths = "records of 656 bytes have latent width 512 and rotary width 64, this model has 40 and 8"
    cache = LatentCache(DeepseekV2Config(**V2))
    for i in range(3):
        cache.update(noise(2, 1, 5, 40), noise(2, 1, 5, 8), i)
    with pytest.raises(ValueError, match=widths):
        cache.flashmla_records()
    with pytest.raises(ValueError, match=widths):
        LatentCache.from_flashmla_records([foreign_records(1, 2)] * 3, DeepseekV2Config(**V2))
    with pytest.raises(ValueError, match="this model has 512 and 32"):
        LatentCache.from_flashmla_records([foreign_records(1, 2)] * 3, config_of_records(qk_rope_head_dim=32))
    for records, shapes in (
        ([foreign_records(1, 2)] * 2, r"\[\[1, 2, 656\], \[1, 2, 656\]\]"),
        ([foreign_records(2)] * 3, r"\[\[2, 656\], \[2, 656\], \[2, 656\]\]"),
        ([foreign_records(1, 2)[..., :640]] * 3, r"\[\[1, 2, 640\], \[1, 2, 640\], \[1, 2, 640\]\]"),
        ([foreign_records(1, t) for t in (2, 2, 1)], r"\[\[1, 2, 656\], \[1, 2, 656\], \[1, 1, 656\]\]"),
        ([foreign_records(b, 2) for b in (1, 2, 1)], r"\[\[1, 2, 656\], \[2, 2, 656\], \[1, 2, 656\]\]"),
        ([], r"\[\]"),
    ):
        with pytest.raises(
            ValueError, match=rf"expected 3 layers of records of the same shape \[b t 656\], got {shapes}"
        ):
            LatentCache.from_flashmla_records(records, config_of_records())
    with pytest.raises(ValueError, match=r"expected records of bytes, got torch\.float32"):
        LatentCache.from_flashmla_records([foreign_records(1, 2).float()] * 3, config_of_records())


@pytest.mark.parametrize(("place", "value"), [(7, 0x7F), (511, 0xFF), (515, 0x7F), (515, 0xFF)])
def test_records_with_a_number_that_is_none_are_refused(place, value):
    records = [foreign_records(2, 3) for _ in range(3)]
    records[1][1, 2, place] = value
    if place >= 512:
        records[1][1, 2, 514] = 0x80  # the scale's exponent is all ones
    with pytest.raises(ValueError, match="the records of layer 1 hold NaN or infinite latents"):
        LatentCache.from_flashmla_records(records, config_of_records())


@torch.no_grad()
def test_records_and_cache_share_no_memory():
    # one byte further than a scale can be read in place, and every second of some others
    lying = torch.empty(3 * 7 * 656 + 1, dtype=torch.uint8)[1:].view(3, 7, 656).copy_(foreign_records(3, 7))
    sparse = torch.empty(3, 7, 1312, dtype=torch.uint8)[..., ::2].copy_(foreign_records(3, 7))
    given = [lying, sparse, foreign_records(3, 7)]
    before = [x.clone() for x in given]
    cache = LatentCache.from_flashmla_records(given, config_of_records())
    taken = cache.flashmla_records()
    cache.crop(-2)
    for i in range(3):
        cache.update(noise(3, 1, 2, 512).bfloat16(), noise(3, 1, 2, 64).bfloat16(), i)
    for old, one, other, new in zip(before, given, taken, cache.flashmla_records(), strict=True):
        assert torch.equal(one, old)
        assert torch.equal(other, old)
        assert torch.equal(new[:, :5], old[:, :5])
        assert not torch.equal(new, old)


def test_an_empty_cache_has_no_records():
    with pytest.raises(ValueError, match="this cache is empty, there is nothing to make records of"):
        LatentCache(config_of_records(), cache_dtype="fp8").flashmla_records()


# encoding what was decoded


# float16 underflows below 2^-24, and half precision rounds the middles of 8 bits' cells to their borders
@pytest.mark.parametrize(
    ("cache_dtype", "dtype"),
    [
        *((None, dtype) for dtype in DTYPES),
        *(("fp8", dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)),
        *(("int8", dtype) for dtype in (torch.float32, torch.float64)),
    ],
    ids=str,
)
def test_encoding_again_what_was_decoded_gives_the_same_bytes(cache_dtype, dtype):
    # fp8: a plane's largest element is code 448, so its scale comes out again; 8 bits: the same, save for 1 in 30,000
    # planes, whose scale was rounded up so far that the outermost code stays unused
    for c in WIDTHS:
        latent, k_rotary = (noise(99, c, seed=c) * 8).to(dtype), noise(99, 6).to(dtype)
        rows_format = latent_format(cache_dtype, c, 6, dtype)
        rows = rows_format.encode(latent, k_rotary)
        again = rows_format.encode(*rows_format.decode(rows, dtype).split((c, 6), dim=-1))
        assert torch.equal(again, rows)


@pytest.mark.parametrize("bits", [6, 5, 4])
def test_encoding_few_bits_again_shrinks_the_largest_element_by_half_a_cell(bits):
    # the middle of the outermost cell lies below its edge, each time: so a cache moves rows and never makes them anew
    once, k_rotary = decoded(f"int{bits}", noise(999, 200), noise(999, 6))
    twice, k_again = decoded(f"int{bits}", once, k_rotary)
    assert_within_stated_error(f"int{bits}", once, twice)
    ratio = largest_of_plane(twice) / largest_of_plane(once)
    assert (ratio < 1 - 0.5 * 2.0**-bits).all()
    assert (ratio > 1 - 1.008 * 2.0**-bits).all()
    assert torch.equal(k_again, k_rotary)


@every_code
@torch.no_grad()
def test_no_operation_of_a_layer_encodes_a_token_twice(cache_dtype):
    layer = LatentCacheLayer(cache_dtype)
    layer.update(noise(1, 1, 9, 40), noise(1, 1, 9, 8))
    rows = layer.rows().clone()
    layer.batch_repeat_interleave(3)
    for _ in range(4):
        layer.update(noise(3, 1, 30, 40), noise(3, 1, 30, 8))
        layer.crop(-29)
        layer.reorder_cache(torch.tensor([2, 2, 0]))
        layer.offload()
        layer.prefetch()
    assert torch.equal(layer.rows()[:, :9], rows.expand(3, -1, -1))


# a row belongs to its token alone


@every_format
@given(c=st.sampled_from(WIDTHS), r=st.sampled_from([2, 6, 64]), b=st.integers(1, 3), t=st.integers(0, 9))
@examples
def test_a_token_is_encoded_and_decoded_alike_alone_and_among_others(cache_dtype, c, r, b, t):
    rows_format = latent_format(cache_dtype, c, r, torch.float32)
    # as attention gives them: two parts of one tensor
    latent, k_rotary = noise(b, t, c + r).split((c, r), dim=-1)
    rows = rows_format.encode(latent, k_rotary)
    assert rows.shape == (b, t, rows_format.row_width)
    assert rows.dtype == rows_format.storage_dtype
    alone = [rows_format.encode(x.clone(), k.clone()) for x, k in zip(latent.flatten(0, 1), k_rotary.flatten(0, 1))]
    assert all(torch.equal(row, one) for row, one in zip(rows.flatten(0, 1), alone, strict=True))
    whole = rows_format.decode(rows, torch.float32)
    assert whole.shape == (b, t, c + r)
    for first in range(t):
        block = rows_format.decode(rows[:, first : first + 3], torch.float32)
        assert torch.equal(block, whole[:, first : first + 3])


@every_format
@given(block=st.integers(1, 12), shared=st.integers(0, 7), own=st.integers(1, 9))
@examples
def test_blocks_are_the_whole_in_order(cache_dtype, block, shared, own):
    c, r, b = 130, 6, 3
    rows_format = latent_format(cache_dtype, c, r, torch.bfloat16)
    both = [noise(1, shared, c + r), noise(b, own, c + r, seed=1)]
    segments = [rows_format.encode(*x.bfloat16().split((c, r), dim=-1)) for x in both]
    latents = Latents(*(Segment(rows, rows_format) for rows in segments if rows.shape[1]))
    blocks = [x.expand(b, -1, -1) for x in latents.blocks(block, torch.float32)]
    assert all(0 < x.shape[1] <= block for x in blocks)
    whole = torch.cat([rows_format.decode(rows, torch.float32).expand(b, -1, -1) for rows in segments], dim=1)
    assert torch.equal(torch.cat(blocks, dim=1), whole)
    latent, k_rotary = latents.dense(b)
    assert latent.dtype == k_rotary.dtype == torch.bfloat16
    assert torch.equal(torch.cat((latent, k_rotary), dim=-1), whole.bfloat16())


@every_format
def test_a_long_prompt_is_read_in_the_same_pieces_as_it_is_stored(cache_dtype):
    # more tokens than are decoded at once
    latent, k_rotary = noise(1, 2500, 9).bfloat16(), noise(1, 2500, 4, seed=1).bfloat16()
    rows_format = latent_format(cache_dtype, 9, 4, torch.bfloat16)
    rows = rows_format.encode(latent, k_rotary)
    read = Latents(Segment(rows, rows_format)).dense(2)
    assert torch.equal(torch.cat(read, dim=-1), rows_format.decode(rows, torch.bfloat16).expand(2, -1, -1))


@every_format
def test_decoding_does_not_touch_the_rows_and_encoding_not_what_it_reads(cache_dtype):
    latent, k_rotary = noise(3, 130), noise(3, 6)
    before = latent.clone(), k_rotary.clone()
    rows_format = latent_format(cache_dtype, 130, 6, torch.float32)
    rows = rows_format.encode(latent, k_rotary)
    kept = rows.clone()
    rows_format.decode(rows, torch.float64)
    rows_format.decode(rows, torch.float16)
    assert torch.equal(rows, kept)
    assert torch.equal(latent, before[0])
    assert torch.equal(k_rotary, before[1])


# what is refused


@every_code
def test_a_quantized_cache_refuses_gradients_in_one_sentence(cache_dtype):
    message = f"latents quantized to {cache_dtype} carry no gradient: .* or use a LatentCache without cache_dtype"
    latent, k_rotary = noise(2, 1, 3, 40), noise(2, 1, 3, 8)
    for with_gradient in ((latent.clone().requires_grad_(), k_rotary), (latent, k_rotary.clone().requires_grad_())):
        layer = LatentCacheLayer(cache_dtype)
        layer.update(latent, k_rotary)
        with pytest.raises(ValueError, match=message):
            layer.update(*with_gradient)
        assert torch.equal(layer.keys, decoded(cache_dtype, latent, k_rotary)[0])
        # only where a gradient would be lost
        with torch.no_grad():
            layer.update(*with_gradient)
        assert layer.get_seq_length() == 6


@pytest.mark.parametrize("cache_dtype", [8, 7, 16, "8", "int7", "fp4", True, 0], ids=repr)
def test_an_unknown_cache_dtype_is_refused_in_one_sentence(cache_dtype):
    message = r"cache_dtype must be None \(.*\), 'int8', 'int6', 'int5', 'int4' or 'fp8', got "
    with pytest.raises(ValueError, match=message):
        latent_format(cache_dtype, 40, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        LatentCache(DeepseekV2Config(**V2), cache_dtype=cache_dtype)
