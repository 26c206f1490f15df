"""Where a cached row holds codes, scales and channels in bfloat16, and the tiles in which kernels multiply them.

Letters: c latent width, r rotary width, u unquantized channels.
"""

import functools
import math
from itertools import pairwise
from typing import NamedTuple

import triton

from ...cache.format import PLANE


class Layout(NamedTuple):
    """Where a row holds its codes and scales, as `latent_format` writes them, and how a kernel multiplies them.

    A piece is a group of elements that share one scale and are multiplied at once. Since all code planes are decoded
    from the same bytes, a piece ends wherever the scale changes in any of them. The unquantized channels are the last
    piece.
    """

    bits: int  # of a code; 9 for fp8, and 0 for elements that are not coded
    byte_planes: int
    code_planes: int
    bounds: tuple[int, ...]  # where each piece of a plane starts, and at last the width of the plane
    pieces: tuple[tuple[int, int, int], ...]  # first channel, channels, and width of the tile that is multiplied
    least: int  # width of a tile
    scales: int  # offset of the scales, bytes


@functools.cache
def layout(bits: str, c: int, u: int, *, least: int) -> Layout:
    """The layout of rows of `bits` ("", "8", "6", "5", "4" or "fp8") with c channels, of which the last u have no code.

    Tiles of codes have `least` columns or more. Elements that are not coded take tiles of one width.
    """
    if not bits:
        least = padded(min(c, PLANE), 16)
    bits_of_code, coded = {"": 8, "fp8": 8}.get(bits) or int(bits), c - u
    shared = math.gcd(bits_of_code, 8)
    plane, byte_planes, code_planes = -(-coded * shared // 8), bits_of_code // shared, 8 // shared
    changes = {x for k in range(code_planes) for x in range(1, plane) if (k * plane + x) % PLANE == 0}
    bounds = (0, *sorted(changes), plane)
    pieces = [
        # a tile of the last code planes may have fewer channels than bytes, or none
        (k * plane + start, max(min(end, coded - k * plane) - start, 0), padded(end - start, least))
        for start, end in pairwise(bounds)
        for k in range(code_planes)
    ]
    if u:
        pieces.append((coded, u, padded(u, least)))
    kind = {"": 0, "fp8": 9}.get(bits, bits_of_code)
    return Layout(kind, byte_planes, code_planes, bounds, tuple(pieces), least, -(-plane * byte_planes // 4) * 4)


def padded(width: int, least: int) -> int:
    return max(triton.next_power_of_2(width), least)


def has_words(form: Layout, r: int, u: int, aligned_to: int) -> bool:
    """True if codes, unquantized channels and rotary keys can be read as words of four bytes."""
    return all(x % 4 == 0 for x in (*form.bounds, aligned_to)) and r % 2 == 0 and u % 2 == 0
