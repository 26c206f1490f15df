"""Copies this package's code into a checkpoint, for machines where it is not installed (`trust_remote_code=True`).

transformers requires the code of a checkpoint to be in one folder without subfolders. So a folder's name becomes a
prefix of the file's name, and the imports are rewritten: `cache/layer.py` is exported as `cache_layer.py`.
"""

import json
import re
from contextlib import ExitStack
from pathlib import Path

from ..configuration_deepseek_v2 import DeepseekV2Config
from ..json_files import read_json
from ..modeling_deepseek_v2 import (
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    DeepseekV2Model,
)
from ..whole_files import disk_errors, save_text, whole_file
from .checkpoint import config_from_json

PACKAGE = Path(__file__).parents[1]
_AUTO_CLASSES = {
    "AutoConfig": DeepseekV2Config,
    "AutoModel": DeepseekV2Model,
    "AutoModelForCausalLM": DeepseekV2ForCausalLM,
    "AutoModelForSequenceClassification": DeepseekV2ForSequenceClassification,
    "AutoModelForTokenClassification": DeepseekV2ForTokenClassification,
}
_RELATIVE_IMPORT = re.compile(r"^(?P<before>\s*from )(?P<dots>\.+)(?P<name>[\w.]+)(?= import )", re.MULTILINE)


def exported_files() -> dict[str, str]:
    """Name and text of the model's file and of every file that it imports, directly or not."""
    texts: dict[str, str] = {}
    to_visit = [PACKAGE / "modeling_deepseek_v2.py"]
    while to_visit:
        file = to_visit.pop()
        if _flat_name(file) in texts:
            continue
        text = file.read_text(encoding="utf-8")
        to_visit += [_imported_file(file, match) for match in _RELATIVE_IMPORT.finditer(text)]
        texts[_flat_name(file)] = _RELATIVE_IMPORT.sub(
            lambda match, file=file: f"{match['before']}.{_flat_name(_imported_file(file, match))}", text
        )
    return {f"{name}.py": texts[name] for name in sorted(texts)}


def _imported_file(file: Path, match: re.Match) -> Path:
    folder = file.parents[len(match["dots"]) - 1]
    return folder.joinpath(*match["name"].split(".")).with_suffix(".py")


def _flat_name(file: Path) -> str:
    return "_".join(file.relative_to(PACKAGE).with_suffix("").parts)


def export_code(folder: Path, subfolder: str = "") -> list[str]:
    """Writes the exported files into a checkpoint folder and names them in its config.json. Returns the files written.

    The files are beside the weights, or in `subfolder`. Links are replaced, so that the hub cache that they may point
    to does not change. config.json comes last, so that it never names a missing file. If it names an earlier export
    whose files differ, it stops naming them first: a process that is killed leaves the earlier export, none that is
    named, or the new one, and never files of both under one name.
    """
    if subfolder and not re.fullmatch(r"[A-Za-z_]\w*", subfolder):
        raise ValueError(f"expected a subfolder that Python can import, such as 'code', got {subfolder!r}.")
    config_file = folder / "config.json"
    config = read_json(config_file)
    if config.get("model_type") != DeepseekV2Config.model_type:
        raise ValueError(f"model_type must be 'deepseek_v2', got {config.get('model_type')!r} in {config_file}.")
    # a config that the exported code would refuse is refused now
    config_from_json(config, config_file)
    if subfolder and (folder / subfolder).is_symlink():
        raise ValueError(f"{folder / subfolder} is a link, and the code would be written elsewhere; remove the link.")
    with disk_errors(folder / subfolder):
        (folder / subfolder).mkdir(exist_ok=True)
    files = {str(Path(subfolder, name)): text for name, text in exported_files().items()}
    named, ours = config.get("auto_map") or {}, auto_map(subfolder)
    # entries for other classes, such as a tokenizer's, are kept
    others = {auto: place for auto, place in named.items() if place != ours.get(auto)}
    texts = {config_file.name: _as_json(config | {"auto_map": named | ours})} | files
    with ExitStack() as unfinished:
        # all are written before the first is put in its place, so that a full disk changes nothing
        for name, text in texts.items():
            save_text(unfinished.enter_context(whole_file(folder / name)), text)
        if len(others) < len(named) and not all(_holds(folder / name, text) for name, text in files.items()):
            with whole_file(config_file) as place:
                save_text(place, _as_json(config | {"auto_map": others}))
        # config.json was entered first, so it is put in its place last
    return [*files, config_file.name]


def auto_map(subfolder: str = "") -> dict[str, str]:
    """The `auto_map` of config.json: for each Auto class, the file and the class in it."""
    prefix = f"{subfolder}/" if subfolder else ""
    return {auto: f"{prefix}{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in _AUTO_CLASSES.items()}


def _as_json(config: dict) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()
