"""The layout of quantized integers in a row: which bits hold an element's code, read without the package.

Letters: c latent width, r rotary width.
"""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_latent.cache.format import latent_format
from tests.support import seeded

WIDTHS = (1, 3, 7, 9, 17, 40, 80, 127, 128, 129, 130, 200, 512)

every_integer = pytest.mark.parametrize("bits", [8, 6, 5, 4])
examples = settings(deadline=None, max_examples=40, derandomize=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def bits_of_code(bits: int, c: int, element: int) -> list[tuple[int, int]]:
    """The position of each bit of an element's code, (byte of the row, bit of the byte), least significant first."""
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
    """The codes [c] and the numbers [c+r] of a row, read by the layout alone."""

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
def test_no_two_elements_share_a_bit_and_no_bit_is_unused(bits):
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
def test_padding_bits_are_zero(bits):
    # then the same tokens give the same file
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
    # these include patterns that `encode` never writes
    rows_format = latent_format(f"int{bits}", c, 2, torch.float32)
    row = rows_format.encode(noise(c, seed=seed), torch.ones(2))
    random = torch.randint(256, (num_code_bytes(bits, c),), generator=seeded(seed))
    row[: len(random)] = random
    _, by_hand = read_by_hand(bits, bytes(row.tolist()), c, 2)
    assert rows_format.decode(row, torch.float64).tolist() == by_hand


@every_integer
def test_a_code_is_the_index_of_the_elements_cell(bits):
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
    # if rounding to bfloat16 increases the scale of a plane, int8 does not use the outermost codes there
    for largest in (1.0, 1.9):
        latent = torch.linspace(-largest, largest, 8 * 128).view(8, 128)
        # every plane has its largest element at one of its ends
        latent[:, 0], latent[:, 127] = -largest, largest
        for row in latent_format(f"int{bits}", 128, 2, torch.float32).encode(latent, torch.zeros(8, 2)):
            codes, _ = read_by_hand(bits, bytes(row.tolist()), 128, 2)
            seen |= set(codes)
            assert min(codes) <= (bits == 8)
            assert max(codes) >= 2**bits - 1 - (bits == 8)
    assert seen == set(range(2**bits))
