"""Whether a converted checkpoint says what its source says, here and in transformers' own class."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM as NativeForCausalLM

from .checkpoint import check_checkpoint, read_config
from .compatibility import find_incompatibilities
from .source import Source
from .text import tokenize

TOKENS = 64  # of random ids, where no text is given
# how far logits may be apart: float32 with --bias-free is at 1e-4; in half precision a router may choose another expert
ALLOWED = {torch.float32: 1e-3}
ALLOWED_IN_HALF = 0.1
NEW_TOKENS = 32


def verify(folder: Path, against: Path | None, text: str | None, dtype: torch.dtype | None) -> dict:
    """Reads every tensor back and compares logits; what was found, with `problems` that are empty where all is well.

    Errors are relative: the largest difference of a logit over the largest logit. Greedy continuations are counted as
    equal tokens from the start.
    """
    for place in (folder, against):
        if place is not None and not (place / "config.json").is_file():
            raise ValueError(f"expected a checkpoint's folder with a config.json, got {place}.")
    config = read_config(str(folder))
    found = check_checkpoint(folder, config)
    report = {"tensors": found.num_tensors, "files": found.num_files, "problems": list(found.problems)}
    if report["problems"]:
        return report
    source = Source(folder)
    for name in source.tensors:
        source[name]  # raises where a number is none
    report["what other programs would object to"] = find_incompatibilities(config, source.config, source.tensors)
    ids = _ids(folder, text, config.vocab_size)
    # one model at a time is in memory
    logits, continuation = _answers(_load(AutoModelForCausalLM, folder, dtype), ids)
    allowed = ALLOWED.get(logits.dtype, ALLOWED_IN_HALF)
    report["tokens"] = ids.shape[1]
    if config.n_shared_experts is None:
        report["logits_error_in_transformers"] = "its class has shared experts always"
    elif config.norm_topk_prob:
        report["logits_error_in_transformers"] = "its class does not normalise shares"
    else:
        stock, _ = _answers(_load(NativeForCausalLM, folder, dtype), ids, continued=False)
        report["logits_error_in_transformers"] = _error(stock, logits)
        if report["logits_error_in_transformers"] > allowed:
            report["problems"].append(f"logits in transformers differ by more than {allowed}")
    if against is not None:
        expected, expected_continuation = _answers(_load(AutoModelForCausalLM, against, dtype), ids)
        if logits.shape != expected.shape:
            raise ValueError(f"expected {against} to have the vocabulary of {folder}, got {expected.shape[1]} tokens.")
        report["logits_error_against_source"] = _error(logits, expected)
        if report["logits_error_against_source"] > allowed:
            report["problems"].append(f"logits differ from those of {against} by more than {allowed}")
        same = (continuation == expected_continuation).long().cumprod(dim=0).sum()
        report["equal_greedy_tokens"] = f"{same} of {len(expected_continuation)}"
    return report


def _load(model_class, folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    return model_class.from_pretrained(folder, dtype=dtype or "auto", trust_remote_code=False).eval()


@torch.no_grad()
def _answers(model: PreTrainedModel, ids: Tensor, continued: bool = True) -> tuple[Tensor, Tensor]:
    """Logits [s vocab] of all tokens, and the ids of a greedy continuation."""
    logits = model(ids).logits[0]
    if not logits.isfinite().all():
        raise ValueError(f"{type(model).__name__} gives logits that are no numbers; take a wider dtype.")
    if not continued:
        return logits, ids[0, :0]
    plain = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.0}
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, **plain)
    return logits, new[0, ids.shape[1] :]


def _ids(folder: Path, text: str | None, vocab_size: int) -> Tensor:
    if text is None:
        return torch.randint(0, vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    ids = tokenize(folder, text)
    if ids.shape[1] == 0:
        raise ValueError("expected a text of at least one token, got none.")
    return ids


def _error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()
