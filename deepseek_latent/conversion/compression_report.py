"""Compression with its price: perplexity after each of its steps, on text that it was not calibrated on."""

import hashlib

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..modeling_deepseek_v2 import DeepseekV2ForCausalLM
from .calibration import WINDOW, perplexity, statistics_of, windows_of
from .cast import Cast
from .compress import CompressedMla, widths
from .gqa_to_mla import GqaToMla
from .source import Source
from .upcycle import Upcycle


def compressed(files: Source, *, r: int, c: int, text: str) -> tuple[CompressedMla, dict]:
    """The conversion, and what it costs: cached elements per token and perplexities before, between and after.

    Raises ValueError as `CompressedMla` and `windows_of`.
    """
    # what cannot be is refused before any work, such as a constant that the dtype does not hold
    exact = GqaToMla(files)
    widths(exact.source, r, c)
    exact.check_dtype()
    calibration, judging = windows_of(files.folder, text)
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype="auto", attn_implementation="eager").eval()
    statistics, before = statistics_of(model, calibration), perplexity(model, judging)
    # one model at a time is in memory
    del model
    whole = CompressedMla(files, statistics, r=r, c=c)
    rotary = CompressedMla(files, statistics, r=r, kept=whole.kept)
    report = {
        "sha256 of the text": hashlib.sha256(text.encode()).hexdigest(),
        "calibrated on tokens": calibration.numel(),
        "judged by tokens": judging.numel(),
        "cached elements per token before": exact.source.cached_elements,
        "perplexity of the source": before,
        f"perplexity with rotary keys of {r}": perplexity(model_of(rotary), judging),
        f"perplexity with latents of {c} too": perplexity(model_of(whole), judging),
        "pairs that rotate, by frequency": " ".join(map(str, whole.kept.tolist())),
    }
    return whole, report


def model_of(conversion: GqaToMla | Cast | Upcycle) -> PreTrainedModel:
    """What the files of a conversion would be loaded as."""
    state = {piece.name: piece.make() for piece in conversion.pieces()}
    dtype = next(iter(state.values())).dtype
    with torch.no_grad():
        return DeepseekV2ForCausalLM.from_pretrained(
            None, config=conversion.config, state_dict=state, dtype=dtype
        ).eval()


@torch.no_grad()
def measured_noise(conversion: Upcycle) -> dict:
    """How far an inexact upcycling moves logits of random tokens, relative to the largest of its dense base."""
    ids = torch.randint(0, conversion.config.vocab_size, (1, WINDOW), generator=torch.Generator().manual_seed(0))
    expected = model_of(conversion.base)(ids).logits.float()
    error = (model_of(conversion)(ids).logits.float() - expected).abs().max() / expected.abs().max()
    return {"not exact: error of logits": error.item()}
