"""The cost of a conversion, known before any tensor is read: bytes of files, and cache per token.

Letters: r rotary width, c KV latent width.
"""

from typing import NamedTuple

import torch

from .compress import check_widths
from .gqa_to_mla import GqaToMla
from .source import Source
from .target import Piece


class Cost(NamedTuple):
    """What is read, what is written, and how many elements a token takes in the cache over all layers."""

    source_bytes: int
    bytes: int  # of all tensors
    cached_before: int  # elements per token
    cached: int
    dtype: torch.dtype
    # the cache of an exact conversion with biases, if this one is without them
    cached_with_biases: int | None = None

    def report(self) -> dict:
        return {
            "bytes of the source": self.source_bytes,
            "cached elements per token before": self.cached_before,
            "cached bytes per token": self.cached * self.dtype.itemsize,
        }

    def sentences(self) -> list[str]:
        dtype, cached_bytes = str(self.dtype).removeprefix("torch."), self.cached * self.dtype.itemsize
        sentences = [
            f"the source has {self.source_bytes:,} bytes of weights, and {self.bytes:,} are to be written "
            f"({_times(self.bytes, self.source_bytes)}).",
            f"a cached token takes {self.cached_before:,} elements in the source and {self.cached:,} in the result "
            f"({_times(self.cached, self.cached_before)}), which are {cached_bytes:,} bytes in {dtype}.",
        ]
        if self.cached_with_biases is not None:
            sentences.append(
                f"--bias-free caches the whole input of each layer; without it, a token takes "
                f"{self.cached_with_biases:,} elements ({_times(self.cached_with_biases, self.cached_before)})."
            )
        return sentences


def cost_of(files, conversion, pieces: list[Piece], cached_before: int | None = None) -> Cost:
    """The cost of writing these pieces. Without `cached_before`, the cache has the size of the source's."""
    cached = _cached_elements(conversion)
    total = sum(piece.nbytes for piece in pieces)
    before = cached if cached_before is None else cached_before
    return Cost(sum(x.stat().st_size for x in files.weight_files()), total, before, cached, pieces[0].dtype)


def cost_without_biases(files: Source, conversion: GqaToMla) -> Cost:
    cost = cost_of(files, conversion, conversion.pieces(), conversion.source.cached_elements)
    return cost._replace(cached_with_biases=_cached_elements(GqaToMla(files)))


def cost_of_compression(files: Source, *, r: int, c: int) -> Cost:
    """The cost of `CompressedMla`, which a text must calibrate before it can be made.

    Raises ValueError for widths that it does not have.
    """
    shapes = _CompressedShapes(files, r, c)
    return cost_of(files, shapes, shapes.pieces(), shapes.source.cached_elements)


class _CompressedShapes(GqaToMla):
    """A conversion whose pieces have the names, shapes and dtypes of `CompressedMla`, and cannot be made."""

    def __init__(self, files: Source, r: int, c: int):
        super().__init__(files)
        self.n, self.r, self.c = self.w, r, check_widths(self.source, r, c)

    def rope_parameters(self) -> dict:
        # the frequencies are chosen by calibration
        return {"rope_type": "default", "rope_theta": 1e4}


def _cached_elements(conversion) -> int:
    return conversion.config.cached_width * conversion.config.num_hidden_layers


def _times(after: int, before: int) -> str:
    return "as many" if after == before else f"{after / before:.2f} times as many"
