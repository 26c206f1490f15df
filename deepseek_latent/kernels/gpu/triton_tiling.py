"""How attention is cut into programs, so that they fit into the shared memory of the GPU."""

from functools import cache
from typing import NamedTuple

import torch

from .triton_layout import layout, padded


class Tiling(NamedTuple):
    """How the work is cut: the tile that a program takes at a time, and how many programs a multiprocessor holds."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    tokens_per_split: int  # the fewest tokens that are worth a split


def tiling(num_rows: int, bits: str, dtype: torch.dtype = torch.bfloat16, capacity: int = 1 << 15) -> Tiling:
    """One tiling per kind of shape and format, fixed in advance, because a decoding step has no time to search."""
    if dtype == torch.float32:
        # float32 has no tensor cores, and takes twice the shared memory
        return Tiling(16, 16, 4, 2, 1, 128)
    if bits:
        return Tiling(16, 64, 4, 2, 2, 128) if num_rows <= 16 else Tiling(32, 32, 8, 2, 1, 256)
    if num_rows <= 16:
        # stages prefetch as many bytes as shared memory holds; if tokens are few, every tile gets its own program
        return Tiling(16, 32, 4, 5, 1, 32 if capacity <= 2048 else 64)
    return Tiling(32, 64, 8, 3, 1, 128) if num_rows <= 32 else Tiling(64, 64, 8, 2, 1, 256)


def shared_bytes(cut: Tiling, columns: int, itemsize: int, coded: bool) -> int:
    """The bytes of shared memory that a program takes, where a row or a token has `columns` elements.

    They hold the queries, the tiles of tokens that are being loaded or multiplied, and a tile of attention weights.
    Codes are loaded into registers, so there is one tile of them.
    """
    tiles = 1 if coded else cut.num_stages - 1
    weights = cut.rows * cut.tokens * (2 if coded else 1)
    return ((cut.rows + tiles * cut.tokens) * columns + weights) * itemsize


@cache
def fitting(cut: Tiling, columns: int, itemsize: int, coded: bool, available: int) -> Tiling:
    """The tiling with fewer stages, tokens or rows, if its programs need more than the `available` shared memory."""

    def needed(cut: Tiling) -> int:
        return shared_bytes(cut, columns, itemsize, coded)

    while needed(cut) > available and cut != (smaller := _smaller(cut, coded)):
        cut = smaller
    # a multiprocessor has as much as one program may have, and 1 KB more, which it needs for each program
    if cut.programs_per_sm * (needed(cut) + 1024) > available + 1024:
        cut = cut._replace(programs_per_sm=1)
    return cut


def _smaller(cut: Tiling, coded: bool) -> Tiling:
    if cut.num_stages > 2 and not coded:
        return cut._replace(num_stages=cut.num_stages - 1)
    if cut.tokens > 32:
        return cut._replace(tokens=cut.tokens // 2)
    return cut._replace(rows=max(cut.rows // 2, 16)) if cut.rows > 16 else cut._replace(tokens=16)


@cache
def columns_of(bits: str, c: int, r: int, u: int, rows: int) -> int:
    """The columns of latent and rotary key in the tiles of a program, padded."""
    return sum(width for *_, width in layout(bits, c, u, least=2 * rows).pieces) + padded(r, 16)


@cache
def has_room(bits: str, c: int, r: int, u: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the smallest programs fit into this GPU's shared memory; latents of some conversions are too wide."""
    smallest = Tiling(16, 16, 4, 2, 1, 128)
    needed = shared_bytes(smallest, columns_of(bits, c, r, u, smallest.rows), dtype.itemsize, bool(bits))
    return needed <= shared_memory(device)


@cache
def shared_memory(device: torch.device) -> int:
    """The bytes of shared memory that a program may have; on a CPU, that of an H100."""
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    # ROCm has one limit
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def registers(cut: Tiling) -> dict[str, int]:
    """A limit of registers per thread for the compiler, so that `programs_per_sm` programs fit on a multiprocessor."""
    limit = 65536 // (32 * cut.num_warps * cut.programs_per_sm)
    return {"maxnreg": limit // 8 * 8} if limit < 255 and torch.version.hip is None else {}
