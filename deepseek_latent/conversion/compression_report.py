"""The price of inexact conversions: perplexity after compression, and the change of upcycled logits."""

import hashlib

import torch
from transformers import PreTrainedModel

from ..modeling_deepseek_v2 import DeepseekV2ForCausalLM
from .calibration import Calibration, perplexity
from .cast import Cast
from .compress import CompressedMla, check_widths
from .gqa_to_mla import GqaToMla
from .loading import load_model
from .progress import track
from .refine import RefinedMla, refine
from .source import Source
from .text import WINDOW_LENGTH, split_into_windows
from .upcycle import Upcycle


def compress_and_evaluate(files: Source, *, r: int, c: int, texts: list[str]) -> tuple[RefinedMla, dict]:
    """Returns the conversion, and a report with cached elements per token and the perplexity before and after.

    Raises ValueError as `CompressedMla` and `split_into_windows` do.
    """
    # unusable widths or dtypes are refused before any work
    exact = GqaToMla(files)
    check_widths(exact.source, r, c)
    exact.check_dtype()
    calibration, held_out = split_into_windows(files.folder, *texts)
    model = load_model(files.folder, dtype="auto", attn_implementation="eager")
    before = perplexity(model, held_out)
    compressed = CompressedMla(files, Calibration(model, exact.source, calibration), r=r, c=c)
    student = build_model(compressed)
    model.set_attn_implementation("sdpa")
    refine(student, model, calibration)
    report = {
        "sha256 of the texts": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "calibration tokens": calibration.numel(),
        "held-out tokens": held_out.numel(),
        "cached elements per token before": exact.source.cached_elements,
        "perplexity of the source": before,
        f"perplexity with rotary keys of {r} and latents of {c}": perplexity(student, held_out),
        "rotating pairs per frequency": " ".join(map(str, compressed.num_kept.tolist())),
    }
    return RefinedMla(compressed, student), report


def build_model(conversion: GqaToMla | Cast | Upcycle) -> PreTrainedModel:
    """The model that the files of a conversion would load as."""
    state = {piece.name: piece.make() for piece in track(conversion.pieces(), "converting in memory")}
    dtype = next(iter(state.values())).dtype
    with torch.no_grad():
        return DeepseekV2ForCausalLM.from_pretrained(
            None, config=conversion.config, state_dict=state, dtype=dtype
        ).eval()


@torch.no_grad()
def measure_logits_change(conversion: Upcycle) -> dict:
    """The largest change of a logit by inexact upcycling, on random tokens, relative to the largest logit of `base`."""
    ids = torch.randint(0, conversion.config.vocab_size, (1, WINDOW_LENGTH), generator=torch.Generator().manual_seed(0))
    expected = build_model(conversion.base)(ids).logits.float()
    error = (build_model(conversion)(ids).logits.float() - expected).abs().max() / expected.abs().max()
    return {"relative error of logits, not exact": error.item()}
