"""Compares a converted checkpoint with its source and with transformers' own class."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM as NativeForCausalLM

from ..configuration_deepseek_v2 import DeepseekV2Config
from ..json_files import why_absent
from .architectures import SUPPORTED_MODEL_TYPES
from .cast import Cast
from .checkpoint import check_checkpoint, read_config
from .compatibility import outcomes_in_other_programs
from .llama_source import LlamaSource
from .loading import load_model
from .progress import announce, track
from .source import Source
from .text import tokenize

NUM_RANDOM_TOKENS = 64  # if no text is given
MAX_TOKENS = 512  # of a text
# In half precision, rounding makes an error of 1e-2 or a few, and a router may choose another expert.
MAX_LOGITS_ERROR, MAX_LOGITS_ERROR_IN_HALF = 1e-3, 0.1
# what rounding makes of logits without routers
USUAL_ERROR_IN_HALF = 0.03
# The allowed error of --bias-free relative to rms_norm_eps. It normalizes the input of attention twice, which makes
# keys and values wrong by eps / (2 m), where m is the mean square of the residual stream. Measured: 150 (SmolLM2-135M).
BIAS_FREE_ERROR_OVER_EPS = 300
NUM_NEW_TOKENS = 32


def verify(folder: Path, against: Path | None, text: str | None, dtype: torch.dtype | None) -> dict:
    """Reads every tensor back and compares logits. Returns a report, whose `problems` are empty if the checks pass.

    An error is the largest difference of a logit, relative to the largest logit. `equal_greedy_tokens` counts the equal
    tokens from the start of both greedy continuations. `verdict` says what the errors mean.
    """
    for place in (folder, against):
        if place is not None and not (place / "config.json").is_file():
            raise ValueError(f"expected a checkpoint's folder, got {place}, {why_absent(place / 'config.json')}.")
    config = read_config(str(folder))
    found = check_checkpoint(folder, config)
    report = {"tensors": found.num_tensors, "files": found.num_files, "problems": list(found.problems)}
    if report["problems"]:
        return report | {"verdict": "failed: the files do not fit their config.json"}
    if against is not None:
        _check_source(against, config.vocab_size)
    ids = _token_ids(folder, text, config.vocab_size)
    source = Source(folder)
    for name in track([*source.tensors], "reading every tensor"):
        source[name]  # raises ValueError if it holds NaN or infinity
    report["other_programs"] = outcomes_in_other_programs(config, source.config, source.tensors)
    dtype = dtype or "auto"
    announce(f"computing logits and a continuation of {folder}")
    # only one model at a time is in memory
    logits, continuation = _logits_and_continuation(load_model(folder, dtype=dtype), ids)
    max_error = _allowed_error(config, logits.dtype)
    report |= {"tokens": ids.shape[1], "dtype": str(logits.dtype).removeprefix("torch.")}
    report["allowed_logits_error"] = max_error
    if config.n_shared_experts is None:
        report["logits_error_in_transformers"] = "not compared, its class always has shared experts"
    elif config.norm_topk_prob:
        report["logits_error_in_transformers"] = "not compared, its class does not normalize gate weights"
    else:
        announce("computing logits in transformers' own class")
        stock = _logits(load_model(folder, NativeForCausalLM, dtype=dtype), ids)
        report["logits_error_in_transformers"] = _relative_error(stock, logits)
        if report["logits_error_in_transformers"] > max_error:
            report["problems"].append(f"logits in transformers differ by more than {max_error}")
    if against is not None:
        announce(f"computing logits and a continuation of {against}")
        expected, expected_continuation = _logits_and_continuation(load_model(against, dtype=dtype), ids)
        report["logits_error_against_source"] = _relative_error(logits, expected)
        if report["logits_error_against_source"] > max_error:
            report["problems"].append(f"logits differ from those of {against} by more than {max_error}")
        num_equal = (continuation == expected_continuation).long().cumprod(dim=0).sum()
        report["equal_greedy_tokens"] = f"{num_equal} of {len(expected_continuation)}"
    return report | {"verdict": _verdict(report)}


def _allowed_error(config: DeepseekV2Config, dtype: torch.dtype) -> float:
    if dtype != torch.float32:
        return MAX_LOGITS_ERROR_IN_HALF
    # only this conversion makes a latent of the whole input; DeepSeek's own latents are narrower
    is_bias_free = config.kv_lora_rank == config.hidden_size and not config.attention_bias
    return max(MAX_LOGITS_ERROR, BIAS_FREE_ERROR_OVER_EPS * config.rms_norm_eps if is_bias_free else 0)


def _verdict(report: dict) -> str:
    names = ("logits_error_in_transformers", "logits_error_against_source")
    errors = [report[name] for name in names if isinstance(report.get(name), float)]
    if not errors:
        return "the files are whole, and their logits were compared with nothing; name the source with --against"
    allowed = f"{report['allowed_logits_error']:g} is allowed in {report['dtype']}"
    found = f"a logits error of {max(errors):.1e}, and {allowed}"
    if report["problems"]:
        return f"failed: {found}"
    if report["dtype"] == "float32":
        return f"passed: {found}"
    if max(errors) <= USUAL_ERROR_IN_HALF:
        return f"passed: {found}; rounding alone makes {USUAL_ERROR_IN_HALF:g} or less"
    usual = f"rounding alone makes {USUAL_ERROR_IN_HALF:g} or less, unless it changes a choice of experts"
    return f"passed: {found}, but {usual}; compare with --dtype float32"


def _check_source(folder: Path, vocab_size: int) -> None:
    """Raises ValueError if the files of the source do not fit its config, or have another vocabulary."""
    source = Source(folder)
    is_llama = source.config.get("model_type") in SUPPORTED_MODEL_TYPES
    config = LlamaSource(source).config if is_llama else Cast(source, None).config
    if config.vocab_size != vocab_size:
        raise ValueError(f"expected {folder} to have a vocabulary of {vocab_size} tokens, got {config.vocab_size}.")


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:  # [s vocab]
    logits = model(ids).logits[0]
    if not logits.isfinite().all():
        raise ValueError(
            f"expected finite logits from {type(model).__name__}, got NaN or infinity; use a wider --dtype."
        )
    return logits


def _logits_and_continuation(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [s vocab] of all tokens, and the ids of a greedy continuation."""
    logits = _logits(model, ids)
    greedy = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW_TOKENS, **greedy)
    return logits, output[0, ids.shape[1] :]


def _token_ids(folder: Path, text: str | None, vocab_size: int) -> Tensor:
    if text is None:
        return torch.randint(0, vocab_size, (1, NUM_RANDOM_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = tokenize(folder, text)[:, :MAX_TOKENS]
    if ids.shape[1] == 0:
        raise ValueError("expected a text of at least one token, got none.")
    return ids


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()
