"""Checkpoints that carry this package's code, for machines where it is not installed (`trust_remote_code=True`)."""

import inspect
import json
import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_deepseek_v2 import DeepseekV2Config
from ..modeling_deepseek_v2 import (
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    DeepseekV2Model,
)
from .checkpoint import read_json

_CLASSES = {
    "AutoConfig": DeepseekV2Config,
    "AutoModel": DeepseekV2Model,
    "AutoModelForCausalLM": DeepseekV2ForCausalLM,
    "AutoModelForSequenceClassification": DeepseekV2ForSequenceClassification,
    "AutoModelForTokenClassification": DeepseekV2ForTokenClassification,
}
AUTO_MAP = {auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in _CLASSES.items()}


def travelling_files() -> list[Path]:
    """The model's file and every file it reaches by relative imports; transformers wants them side by side."""
    spine = Path(inspect.getfile(DeepseekV2Model))
    files = sorted({spine, *map(Path, get_relative_import_files(spine))})
    assert all(file.is_file() for file in files), f"{spine.name} reaches beyond its folder: {files}"
    return files


def export_code(folder: Path) -> list[str]:
    """Copies the travelling files into a checkpoint's folder and names them in its config.json; returns all it wrote.

    config.json comes last, so that it never names a file that is not there.
    """
    config_file = folder / "config.json"
    config = read_json(config_file)
    if config.get("model_type") != DeepseekV2Config.model_type:
        raise ValueError(f"model_type must be 'deepseek_v2', got {config.get('model_type')!r} in {config_file}.")
    # what the copied code would refuse is refused here
    DeepseekV2Config.from_dict(config)
    files = travelling_files()
    for file in files:
        _replace(folder / file.name, file.read_text(encoding="utf-8"))
    # entries for other classes, a tokenizer's say, stay
    config["auto_map"] = (config.get("auto_map") or {}) | AUTO_MAP
    _replace(config_file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return [*(file.name for file in files), config_file.name]


def _replace(target: Path, text: str) -> None:
    """Writes all of `text` or nothing; a link is replaced, not followed into the cache it may point to."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
