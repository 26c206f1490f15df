"""Runs one conversion from its source to its folder, with a model card, and uploads the result if asked to."""

import glob
import json
import os
from importlib.resources import files as resources
from pathlib import Path
from string import Template

from huggingface_hub import HfApi, ModelCardData

from .checkpoint import check_checkpoint, read_config
from .deepseek_layout import ExportDeepseek, ImportDeepseek
from .escaping import code_block, code_span
from .progress import announce
from .source import Source, check_files
from .target import Target

CARD_TEMPLATE = "converted.md.template"


def prepare_target(
    source: Path,
    out: str,
    *,
    shard_bytes: int,
    force: bool,
    replace_any_folder: bool,
    push_to_hub: str | None,
    dry_run: bool,
) -> Target:
    """The folder to write to, and the hub repository if one is named. Raises ValueError if OUT cannot be written."""
    target = Target(out, shard_bytes=shard_bytes, force=force, replace_any_folder=replace_any_folder)
    check_files(source)
    parent = next(parent for parent in target.out.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"expected a folder that can be written to, got {parent} for {out}; choose another folder.")
    # the files of a folder in the hub's cache are in another one
    read = {source.resolve()} | {path.resolve().parent for path in source.iterdir() if path.is_file()}
    # the hidden folder is removed or renamed like OUT
    places = (target.out, target.partial)
    if any(_contains(source.resolve(), place) or _contains(place, x) for x in read for place in places):
        raise ValueError(f"{out} and the source are the same folder, or one contains the other; choose another folder.")
    if push_to_hub and not dry_run:
        # created now, so that a refusal comes before hours of conversion
        try:
            HfApi().create_repo(push_to_hub, exist_ok=True)
        # if the hub is not reached, it is an error of the HTTP library, which one depends on huggingface_hub's version
        except Exception as error:
            raise ValueError(f"expected a repository on the hub to upload to, got: {error} ({push_to_hub}).") from error
    return target


def _contains(folder: Path, place: Path) -> bool:
    """True if `place` is in `folder` or is that folder, by whatever names."""
    same = (folder == x or (folder.exists() and x.exists() and folder.samefile(x)) for x in (place, *place.parents))
    return any(same)


def convert(
    files: Source | ImportDeepseek,
    conversion,
    measured: dict,
    target: Target,
    *,
    command: str,
    push_to_hub: str | None,
    dry_run: bool,
) -> dict:
    """Writes the result of `conversion` to the target and uploads it if a repository is named. Returns a report.

    `conversion` has a `config` and `pieces`, or the `shards` and `texts` of an export. `measured` goes into the report
    and the model card, `command` into the card.
    """
    config, is_export = conversion.config, isinstance(conversion, ExportDeepseek)
    shards = conversion.shards() if is_export else target.plan(conversion.pieces())
    pieces = [piece for shard in shards.values() for piece in shard]
    report = {
        "tensors": len(pieces),
        "bytes": sum(piece.nbytes for piece in pieces),
        "files": list(shards),
        "cached elements per token": config.cached_width * config.num_hidden_layers,
        **measured,
    }
    if dry_run:
        return report
    if is_export:
        texts = conversion.texts()
    else:
        texts = {
            "config.json": config.to_json_string(),
            "README.md": model_card(files, command, report, push_to_hub or target.out.name),
        }
    check = _assert_importable if is_export else _assert_complete
    origin = f"{files.fingerprint()} {command} {measured}"
    written = target.write(shards, texts, files.companion_files(), origin=origin, check=check)
    if push_to_hub:
        # by name, so that nothing is published that another program put there in the meantime
        announce(f"uploading {target.out.name} to {push_to_hub}")
        names = [glob.escape(name) for name in written]
        HfApi().upload_folder(repo_id=push_to_hub, folder_path=target.out, allow_patterns=names, commit_message=command)
        report["pushed to"] = push_to_hub
    return report


def _assert_complete(folder: Path) -> None:
    announce("comparing the files with their config.json")
    problems = check_checkpoint(folder, read_config(str(folder))).problems
    assert not problems, f"the conversion made files that do not fit their config.json: {problems[0]}"


def _assert_importable(folder: Path) -> None:
    announce("checking that the files can be imported again")
    try:
        ImportDeepseek(folder, folder / "config.json").pieces()
    except ValueError as error:
        raise AssertionError(f"the conversion made files that could not be imported again: {error}") from error


def model_card(files: Source | ImportDeepseek, command: str, report: dict, place: str) -> str:
    """The README.md of the new folder: its source, license, command and measurements. `place` is what users load."""
    data = ModelCardData(library_name="transformers", license=files.card.license, language=files.card.language)
    template = Template((resources(__package__) / CARD_TEMPLATE).read_text(encoding="utf-8"))
    rows = "\n".join(f"| {name} | {_format(value)} |" for name, value in report.items() if not isinstance(value, list))
    return template.substitute(
        metadata=data.to_yaml(),
        name=code_span(str(files.name)),
        command=code_block(command, "bash"),
        report=rows,
        place=json.dumps(place, ensure_ascii=not place.isprintable()),
    )


def _format(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value
