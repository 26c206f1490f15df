"""Reads JSON from files that may hold anything."""

import json
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 2**28  # the index of a model with a million tensors is smaller
MAX_DEPTH = 64


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ValueError that names the file if it is absent or too large, is not JSON in UTF-8 without a byte order mark,
    gives a name twice, holds NaN or an infinity, is nested too deeply, or holds something else than an object.
    """
    if not file.is_file():
        raise ValueError(f"expected a folder with {file.name}, got {file.parent}, {why_absent(file)}.")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES:,} bytes of JSON in {file}, got {size:,}; restore it.")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        _check_values(content)
    except RecursionError as error:
        raise ValueError(f"expected JSON in {file}, got something nested too deeply to read; restore it.") from error
    except ValueError as error:
        raise ValueError(f"expected JSON in {file}, got something else ({error}); restore it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {file}, got {type(content).__name__}; restore it.")
    return content


def why_absent(file: Path) -> str:
    """What the folder of an absent file is instead, and what to do."""
    adapter, model = file.with_name("adapter_config.json"), file.with_name("config.json")
    if file == model and adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        return f"which is a LoRA adapter of {base}; merge it into that model, with merge_and_unload of peft's model"
    if file == adapter and model.is_file():
        return "which is a checkpoint; name a folder that save_pretrained of peft's model wrote"
    return f"which has no {file.name}; copy it there, or name another folder"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:100]!r} is given twice")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _check_values(content: Any) -> None:
    """Raises ValueError for values nested too deeply, and for half characters, which cannot be written again."""
    to_visit = [(content, 1)]
    while to_visit:
        value, depth = to_visit.pop()
        if isinstance(value, str):
            value.encode("utf-8")
        elif isinstance(value, (dict, list)):
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            to_visit += [(each, depth + 1) for each in inner]
