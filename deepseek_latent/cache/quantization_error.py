"""Says so if codes of few bits cannot hold the latents of a model, before the model answers nonsense.

Letters: t tokens, c latent width.
"""

import torch
from torch import Tensor
from transformers.utils import logging

from .segments import Segment

logger = logging.get_logger(__name__)

# the models and formats that were warned of
_warned: set[tuple[str | None, int, str]] = set()
CHECKED_TOKENS = 64
# The error of the worst token in the worst layer, and what it goes with (SmolLM2-135M, change of perplexity): converted
# to latents of 128 channels without a basis that suits codes, 0.16 with int8 goes with +6 %, 0.86 with int6 and 1.8
# with int5 with several times the perplexity; with that basis, 0.20 with int4 goes with +1 %; 0.6 in the exact form
# without rotation and with int4 goes with +3 %.
LARGEST_ERROR = 0.7


def warn_of_large_error(
    latent: Tensor,  # [t c]  of the first sequence, before they were quantized
    stored: Segment,
    model_name: str | None,
) -> bool:
    """Warns if one of the first tokens was changed by more than most of what tells tokens apart; True if it was.

    It is meant for the first tokens of a cache, because the host waits for the device. It warns once per model and
    format, whatever number of caches a process makes. Models of the same name and latent width count as one.
    """
    if torch.compiler.is_compiling() or latent.is_meta or len(latent) < 2:
        return False
    latent = latent[:CHECKED_TOKENS].float()
    read = stored.format.decode(stored.rows[0, : len(latent)], torch.float32)[:, : latent.shape[1]]
    spread = (latent - latent.mean(dim=0)).norm(dim=-1).median()
    # the same token many times has no spread
    size = torch.maximum(spread, latent.norm(dim=-1).median() / 4)
    error = ((read - latent).norm(dim=-1).max() / size).item()
    if not error > LARGEST_ERROR:
        return False
    subject = (model_name, latent.shape[1], stored.format.cache_dtype)
    if subject in _warned:
        return True
    _warned.add(subject)
    logger.warning(
        f"cache_dtype={stored.format.cache_dtype!r} holds the latents of this model badly: the error of a token is "
        f"{error:.1g} times what distinguishes tokens, so expect other, worse text; use more bits per channel or "
        "cache_dtype=None, or convert the model again if deepseek-latent converted it."
    )
    return True
