"""Cached tokens as attention reads them: segments of consecutive tokens, each in the format it is stored in.

Letters: b batch, t tokens, c latent width, r rotary width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import LatentFormat

# tokens decoded per step where a whole segment is decoded
DECODED_TOKENS_PER_STEP = 1 << 10


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens as `LatentCache` stores them: rows [b t row_width], or [1 t row_width] for all sequences."""

    rows: Tensor
    format: LatentFormat

    @property
    def num_tokens(self) -> int:
        return self.rows.shape[1]

    def is_read_in_place(self, dtype: torch.dtype) -> bool:
        """Whether `blocks` in that dtype are views, which take no memory."""
        return self.format.cache_dtype is None and self.rows.dtype == dtype

    def blocks(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        # torch.compile can trace `split` for any number of tokens up to the next block, but not a range
        return (self.format.decode(rows, dtype) for rows in self.rows.split(num_tokens, dim=1))

    def latent_and_rotary(self) -> tuple[Tensor, Tensor]:
        widths, dtype = (self.format.latent_width, self.format.rotary_width), self.format.dtype
        if self.format.cache_dtype is None:
            return self.rows.split(widths, dim=-1)
        decoded = self.rows.new_empty(*self.rows.shape[:2], sum(widths), dtype=dtype)
        blocks = self.blocks(DECODED_TOKENS_PER_STEP, dtype)
        for part, block in zip(decoded.split(DECODED_TOKENS_PER_STEP, dim=1), blocks):
            part.copy_(block)
        return decoded.split(widths, dim=-1)


@dataclass(frozen=True)
class SplitSegment:
    """Consecutive tokens as two tensors: latent [b t c] and k_rotary [b t r], as transformers' caches return them."""

    latent: Tensor
    k_rotary: Tensor

    @property
    def num_tokens(self) -> int:
        return self.latent.shape[1]

    def is_read_in_place(self, dtype: torch.dtype) -> bool:
        return False

    def blocks(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        pairs = zip(self.latent.split(num_tokens, dim=1), self.k_rotary.split(num_tokens, dim=1))
        return (torch.cat(pair, dim=-1).to(dtype) for pair in pairs)

    def latent_and_rotary(self) -> tuple[Tensor, Tensor]:
        return self.latent, self.k_rotary


class Latents:
    """All tokens that queries may attend to, in order, as segments.

    `num_held` [] int64 is given where only the device knows how many tokens of a buffer are held. The contents after
    them mean nothing, and the last of s queries attends to exactly the tokens held.
    """

    def __init__(self, *segments: Segment | SplitSegment, num_held: Tensor | None = None):
        self.segments, self.num_held = segments, num_held
        self.num_tokens = sum(segment.num_tokens for segment in segments)

    def blocks(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yields latent and rotary key side by side, at most `num_tokens` at a time: [b t' c+r], or [1 t' c+r]."""
        for segment in self.segments:
            yield from segment.blocks(num_tokens, dtype)

    def is_read_in_place(self, dtype: torch.dtype) -> bool:
        return all(segment.is_read_in_place(dtype) for segment in self.segments)

    def dense(self, batch: int) -> tuple[Tensor, Tensor]:
        """All tokens as [b t c] and [b t r] in the model's dtype; these are views where nothing has to be copied."""
        pairs = [[x.expand(batch, -1, -1) for x in segment.latent_and_rotary()] for segment in self.segments]
        latent, k_rotary = zip(*pairs)
        return (latent[0], k_rotary[0]) if len(pairs) == 1 else (torch.cat(latent, 1), torch.cat(k_rotary, 1))
