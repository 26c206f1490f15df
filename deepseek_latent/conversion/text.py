"""Texts to calibrate and evaluate on: read from a file, tokenized, and cut into windows."""

import reprlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..json_files import read_json

WINDOW_LENGTH = 256  # tokens
MAX_CALIBRATION_WINDOWS, MAX_EVALUATION_WINDOWS = 128, 32


def read_text(file: Path) -> str:
    """The text of a file. Raises ValueError if it is empty or not in UTF-8."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"expected a file with a text, got {file}, which does not exist.") from error
    except OSError as error:
        raise ValueError(f"expected a file with a text, got {file}: {error.strerror}; name a file.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8, got {file}; convert its encoding.") from error
    if not text.strip():
        raise ValueError(f"expected a text, got {file}, which is empty.")
    return text


def load_tokenizer(place: Path | str, **options) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a hub id. Raises ValueError if there is none, or if its files are broken."""
    if isinstance(place, Path):
        if not any(place.glob("tokenizer*")):
            raise ValueError(f"expected tokenizer.json in {place}, got none; copy the files of its source.")
        for file in sorted(place.glob("*token*.json")):
            read_json(file)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    # the library tokenizers raises Exception itself, and transformers whatever a wrong value leads to
    except Exception as error:
        raise ValueError(f"expected the files of a tokenizer in {place}, got: {error}; restore them.") from error


def tokenize(folder: Path, text: str) -> Tensor:
    """Token ids [1 s] of a text by the tokenizer in `folder`.

    Raises ValueError as `load_tokenizer` does, and for the tokenizer of another model, with tokens beyond this one's.
    """
    ids = load_tokenizer(folder)(text, return_tensors="pt", verbose=False)["input_ids"]
    check_vocabulary(ids, read_json(folder / "config.json").get("vocab_size"))
    return ids


def check_vocabulary(ids: Tensor, vocab_size: int | None) -> None:
    """Raises ValueError for tokens beyond the vocabulary of a model."""
    if ids.numel() and vocab_size is not None and ids.max() >= vocab_size:
        raise ValueError(
            f"expected a tokenizer of at most {vocab_size:,} tokens, as the model has, got token {ids.max():,}; copy "
            "the model's own files there."
        )


def split_into_windows(folder: Path, *texts: str) -> tuple[Tensor, Tensor]:
    """Windows [b WINDOW_LENGTH] of texts to calibrate on, and every fifth window, held out, to evaluate on.

    Each text has an equal share of the most windows that are used. `folder` holds the tokenizer. Raises ValueError if
    it does not, if a text has fewer than five windows, or if there are more texts than windows to evaluate on.
    """
    if len(texts) > MAX_EVALUATION_WINDOWS:
        raise ValueError(f"expected at most {MAX_EVALUATION_WINDOWS} texts, got {len(texts)}; join some of them.")
    calibration, held_out = [], []
    for text in texts:
        ids = tokenize(folder, text)[0]
        num_windows = len(ids) // WINDOW_LENGTH
        if num_windows < 5:
            raise ValueError(
                f"expected texts of at least {5 * WINDOW_LENGTH:,} tokens to calibrate on, got {len(ids):,} in the one "
                f"that begins with {reprlib.repr(text.strip())}; leave it out."
            )
        windows = ids[: num_windows * WINDOW_LENGTH].view(num_windows, WINDOW_LENGTH)
        is_held_out = torch.arange(num_windows) % 5 == 4
        calibration.append(_evenly_spaced(windows[~is_held_out], MAX_CALIBRATION_WINDOWS // len(texts)))
        held_out.append(_evenly_spaced(windows[is_held_out], MAX_EVALUATION_WINDOWS // len(texts)))
    return torch.cat(calibration), torch.cat(held_out)


def _evenly_spaced(windows: Tensor, most: int) -> Tensor:
    """At most `most` windows, evenly spaced."""
    return windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()]
