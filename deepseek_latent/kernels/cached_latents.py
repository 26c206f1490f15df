"""Cached latents as kernels take them: the tensors that the cache stores, without copies.

Letters: b batch, t tokens, c latent width, r rotary width, u unquantized channels.
"""

import torch
from torch import Tensor

from ..cache.segments import Latents, Segment, SplitSegment


def stored_parts(segment: Segment | SplitSegment) -> tuple[Tensor, Tensor]:
    """Latents [b t c] and rotary keys [b t r], as views of the cache.

    For a quantized segment: the bytes of codes and scales, and what is in bfloat16, the last u channels of the latents
    and the rotary keys [b t u+r].
    """
    if isinstance(segment, SplitSegment):
        return segment.latent, segment.k_rotary
    if segment.format.cache_dtype is None:
        return segment.latent_and_rotary()
    num_bytes = 2 * (segment.format.num_unquantized + segment.format.rotary_width)
    return segment.rows[..., :-num_bytes], segment.rows[..., -num_bytes:].view(torch.bfloat16)


def bits_of(latents: Latents) -> str:
    """The format of stored latents by the name that kernels know: "8", "6", "5", "4", "fp8", or "" for plain ones."""
    first = latents.segments[0]
    cache_dtype = first.format.cache_dtype if isinstance(first, Segment) else None
    return (cache_dtype or "").removeprefix("int")
