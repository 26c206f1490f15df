"""Checkpoints that carry this package's code, for machines where it is not installed (`trust_remote_code=True`).

transformers wants the files of a checkpoint's code side by side in one folder. So a room's name becomes the beginning
of a file's name, and the imports are rewritten: `cache/layer.py` travels as `cache_layer.py`.
"""

import json
import os
import re
import shutil
from pathlib import Path

from ..configuration_deepseek_v2 import DeepseekV2Config
from ..modeling_deepseek_v2 import (
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    DeepseekV2Model,
)
from .checkpoint import read_json

PACKAGE = Path(__file__).parents[1]
_CLASSES = {
    "AutoConfig": DeepseekV2Config,
    "AutoModel": DeepseekV2Model,
    "AutoModelForCausalLM": DeepseekV2ForCausalLM,
    "AutoModelForSequenceClassification": DeepseekV2ForSequenceClassification,
    "AutoModelForTokenClassification": DeepseekV2ForTokenClassification,
}
_RELATIVE_IMPORT = re.compile(r"^(?P<before>\s*from )(?P<dots>\.+)(?P<name>[\w.]+)(?= import )", re.MULTILINE)


def exported_files() -> dict[str, str]:
    """By the name that each file has in a checkpoint's folder, its text: the model's file and every file it imports."""
    found: dict[str, str] = {}
    waiting = [PACKAGE / "modeling_deepseek_v2.py"]
    while waiting:
        file = waiting.pop()
        if _flat_name(file) in found:
            continue
        text = file.read_text(encoding="utf-8")
        waiting += [_imported_file(file, match) for match in _RELATIVE_IMPORT.finditer(text)]
        found[_flat_name(file)] = _RELATIVE_IMPORT.sub(
            lambda match, file=file: f"{match['before']}.{_flat_name(_imported_file(file, match))}", text
        )
    return {f"{name}.py": found[name] for name in sorted(found)}


def _imported_file(file: Path, match: re.Match) -> Path:
    folder = file.parents[len(match["dots"]) - 1]
    return folder.joinpath(*match["name"].split(".")).with_suffix(".py")


def _flat_name(file: Path) -> str:
    return "_".join(file.relative_to(PACKAGE).with_suffix("").parts)


def export_code(folder: Path, subfolder: str = "") -> list[str]:
    """Writes the travelling files into a checkpoint's folder and names them in its config.json; returns all it wrote.

    They lie beside the weights, or in `subfolder`. config.json comes last, so that it never names a missing file.
    """
    if subfolder and not re.fullmatch(r"[A-Za-z_]\w*", subfolder):
        raise ValueError(f"expected a subfolder that Python can import, such as 'code', got {subfolder!r}.")
    config_file = folder / "config.json"
    config = read_json(config_file)
    if config.get("model_type") != DeepseekV2Config.model_type:
        raise ValueError(f"model_type must be 'deepseek_v2', got {config.get('model_type')!r} in {config_file}.")
    # whatever the exported code would refuse is refused here
    DeepseekV2Config.from_dict(config)
    (folder / subfolder).mkdir(exist_ok=True)
    files = {str(Path(subfolder, name)): text for name, text in exported_files().items()}
    for name, text in files.items():
        _replace(folder / name, text)
    # entries for other classes, such as a tokenizer's, stay
    config["auto_map"] = (config.get("auto_map") or {}) | auto_map(subfolder)
    _replace(config_file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return [*files, config_file.name]


def auto_map(subfolder: str = "") -> dict[str, str]:
    """What config.json says of the exported code: for each Auto class, the file and the class in it."""
    prefix = f"{subfolder}/" if subfolder else ""
    return {auto: f"{prefix}{one.__module__.rpartition('.')[2]}.{one.__name__}" for auto, one in _CLASSES.items()}


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
