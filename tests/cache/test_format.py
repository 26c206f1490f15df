"""The formats of cached tokens: how much an element changes, which bits hold it, and which values must stay visible.

Letters: c latent width, r rotary width, m the largest magnitude of a plane of 128 latent elements.
"""

import math

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
    """The pair after `encode` and `decode`, in its own dtype."""
    rows_format = latent_format(cache_dtype, latent.shape[-1], k_rotary.shape[-1], latent.dtype)
    rows = rows_format.decode(rows_format.encode(latent, k_rotary), dtype or latent.dtype)
    return rows.split((latent.shape[-1], k_rotary.shape[-1]), dim=-1)


def largest_of_plane(latent: Tensor) -> Tensor:
    """m for every element [.. c], float64."""
    planes = latent.double().split(128, dim=-1)
    return torch.cat([plane.abs().amax(-1, keepdim=True).expand_as(plane) for plane in planes], dim=-1)


def allowed_error(cache_dtype: str, latent: Tensor) -> Tensor:
    """The error that IntegerFormat and Float8Format state in their docstrings for each element [.. c], for normal m."""
    m = largest_of_plane(latent)
    if cache_dtype == "fp8":
        # below 448 TINY the scale does not get smaller
        return torch.maximum(latent.double().abs() / 16, m.clamp(min=448 * TINY) * 2**-18.8)
    # a cell is at least TINY wide, and half a cell is the error
    return (1.008 * m * 2.0 ** -int(cache_dtype.removeprefix("int"))).clamp(min=TINY / 2)


def assert_within_stated_error(cache_dtype: str, latent: Tensor, actual: Tensor) -> None:
    error, allowed = (actual.double() - latent.double()).abs(), allowed_error(cache_dtype, latent)
    assert (error <= allowed).all(), f"{(error / allowed).max():.4f} of what is allowed"


# tokens [c] of many kinds


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


# hypothesis prefers zeros of both signs, limits and subnormal numbers
few_numbers = st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=20).map(torch.tensor)


@every_code
@pytest.mark.parametrize("exponent", [127.5, 100, 14, 0, -14, -100, -118, -124, -128, -140, -149])
def test_no_element_changes_more_than_stated(cache_dtype, exponent):
    # from the largest values that, with their error, fit a float32, to values close to zero
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
def test_no_element_of_unusual_numbers_changes_more_than_stated(cache_dtype, latent):
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
    # a bound that is ten times too wide would hide a lost bit
    latent = noise(4000, 128)
    actual, _ = decoded(cache_dtype, latent, torch.zeros(4000, 2))
    error = (actual.double() - latent.double()).abs()
    assert (error / allowed_error(cache_dtype, latent)).max() > 0.9


@every_code
@every_dtype
@given(k_rotary=st.lists(st.floats(width=32), min_size=2, max_size=8).filter(lambda k: len(k) % 2 == 0))
@examples
def test_rotary_keys_are_rounded_to_bfloat16(cache_dtype, dtype, k_rotary):
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
    # a negative number that becomes zero when divided by the scale is read as slightly positive
    divisible = latent.abs() > largest_of_plane(latent) * 2.0**-140
    assert (actual[divisible & (latent > 0)] > 0).all()
    assert (actual[divisible & (latent < 0)] < 0).all()
    for plane, plane_read in zip(latent.split(128), actual.split(128)):
        assert (plane_read[plane.argsort()].diff() >= 0).all()


@every_code
@given(exponent=st.integers(-60, 60), kind=st.sampled_from(WITHOUT_EMPTY_PLANES), seed=st.integers(0, 99))
@examples
def test_a_power_of_two_passes_through_unchanged(cache_dtype, exponent, kind, seed):
    # both kinds of codes are divided by a plane's scale, so its exponent does not change them
    latent = KINDS[kind](200, seed)
    scaled, _ = decoded(cache_dtype, latent * 2.0**exponent, torch.zeros(2))
    assert torch.equal(scaled, decoded(cache_dtype, latent, torch.zeros(2))[0] * 2.0**exponent)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_dtype
@every_format
def test_nan_and_infinity_stay_visible_in_their_plane_and_do_not_reach_others(cache_dtype, dtype, value):
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
def test_values_beyond_float32_are_not_finite_after_decoding(cache_dtype):
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
def test_an_unquantized_row_is_the_two_tensors_side_by_side(dtype):
    latent, k_rotary = noise(2, 5, 9).to(dtype), noise(2, 5, 4).to(dtype)
    rows = latent_format(None, 9, 4, dtype).encode(latent, k_rotary)
    assert rows.dtype == dtype
    assert torch.equal(rows, torch.cat((latent, k_rotary), dim=-1))


def test_int6_takes_at_most_6_6_bits_per_latent_element_with_scales():
    for c in (128, 256, 384, 512, 1024, 1536):
        bytes_of_latent = latent_format("int6", c, 64, torch.bfloat16).row_width - 2 * 64
        assert 6 < bytes_of_latent * 8 / c <= 6.6


# encoding a decoded token again


# float16 underflows below 2^-24, and half precision rounds the middles of int8's cells to their borders
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
    # fp8: a plane's largest element has code 448, so encoding finds the same scale again. int8: so it does, except for
    # 1 in 30,000 planes, whose scale was rounded up so far that the outermost code is unused
    for c in WIDTHS:
        latent, k_rotary = (noise(99, c, seed=c) * 8).to(dtype), noise(99, 6).to(dtype)
        rows_format = latent_format(cache_dtype, c, 6, dtype)
        rows = rows_format.encode(latent, k_rotary)
        again = rows_format.encode(*rows_format.decode(rows, dtype).split((c, 6), dim=-1))
        assert torch.equal(again, rows)


@pytest.mark.parametrize("bits", [6, 5, 4])
def test_encoding_again_in_few_bits_shrinks_the_largest_element_by_half_a_cell(bits):
    # the middle of the outermost cell is below its edge each time, so a cache moves rows and never encodes them again
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


# a row depends on its token alone


@every_format
@given(c=st.sampled_from(WIDTHS), r=st.sampled_from([2, 6, 64]), b=st.integers(1, 3), t=st.integers(0, 9))
@examples
def test_a_token_is_encoded_and_decoded_alike_alone_and_among_others(cache_dtype, c, r, b, t):
    rows_format = latent_format(cache_dtype, c, r, torch.float32)
    # as in attention, these are two parts of one tensor
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
@given(block=st.integers(1, 12), prefix=st.integers(0, 7), others=st.integers(1, 9))
@examples
def test_blocks_are_all_tokens_in_order(cache_dtype, block, prefix, others):
    c, r, b = 130, 6, 3
    rows_format = latent_format(cache_dtype, c, r, torch.bfloat16)
    both = [noise(1, prefix, c + r), noise(b, others, c + r, seed=1)]
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
def test_a_segment_decoded_in_steps_equals_one_decoded_at_once(cache_dtype):
    # more tokens than are decoded in one step
    latent, k_rotary = noise(1, 2500, 9).bfloat16(), noise(1, 2500, 4, seed=1).bfloat16()
    rows_format = latent_format(cache_dtype, 9, 4, torch.bfloat16)
    rows = rows_format.encode(latent, k_rotary)
    read = Latents(Segment(rows, rows_format)).dense(2)
    assert torch.equal(torch.cat(read, dim=-1), rows_format.decode(rows, torch.bfloat16).expand(2, -1, -1))


@every_format
def test_neither_encoding_nor_decoding_changes_its_input(cache_dtype):
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


# refusals


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
        # it is refused only if a gradient would be lost
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
