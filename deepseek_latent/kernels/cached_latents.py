"""How kernels are handed cached latents: as the tensors that the cache stores, without copies.

Letters: b batch, t tokens, c latent width, r rotary width.
"""

import torch
from torch import Tensor

from ..cache.format import Latents, SeparateStretch, Stretch


def stored_parts(stretch: Stretch | SeparateStretch) -> tuple[Tensor, Tensor]:
    """Latents [b t c] (or the bytes of their codes and scales) and rotary keys [b t r], as views of the cache."""
    if isinstance(stretch, SeparateStretch):
        return stretch.latent, stretch.k_rotary
    if stretch.format.bits is None:
        return stretch.both()
    rotary_bytes = 2 * stretch.format.rotary_width
    return stretch.rows[..., :-rotary_bytes], stretch.rows[..., -rotary_bytes:].view(torch.bfloat16)


def bits_of(latents: Latents) -> str:
    """The format of stored latents by the name that kernels know: "8", "6", "5", "4", "fp8", or "" for plain ones."""
    first = latents.stretches[0]
    return str(first.format.bits) if isinstance(first, Stretch) and first.format.bits is not None else ""
