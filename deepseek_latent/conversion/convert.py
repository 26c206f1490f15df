"""Runs one conversion from its source to its folder, with a model card, and uploads the result if asked to."""

import os
import shutil
from importlib.resources import files as resources
from pathlib import Path
from string import Template

from huggingface_hub import HfApi, ModelCardData

from .deepseek_layout import ExportDeepseek, ImportDeepseek
from .source import Source
from .target import Target

CARD_TEMPLATE = "converted.md.template"


def prepare_target(
    source: Path, out: str, *, shard_bytes: int, force: bool, push_to_hub: str | None, dry_run: bool
) -> Target:
    """The folder to write to, and the hub repository if one is named. Raises ValueError if OUT cannot be written."""
    target = Target(out, shard_bytes=shard_bytes, force=force)
    place = next(parent for parent in target.out.parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"expected a folder that can be written to, got {place} for {out}; choose another folder.")
    source = source.resolve()
    if target.out == source or source in target.out.parents or target.out in source.parents:
        raise ValueError(f"{out} and the source are the same folder, or one contains the other; choose another folder.")
    # no kind of conversion writes less than a quarter of its source; the exact number is checked before writing
    least, free = sum(file.stat().st_size for file in source.glob("*.safetensors")) // 4, shutil.disk_usage(place).free
    if not dry_run and free < least and not target.partial.exists():
        raise ValueError(f"at least {least:,} bytes are to be written to {place}, which has {free:,} left; make room.")
    if push_to_hub and not dry_run:
        # created now, so that a refusal comes before hours of conversion
        try:
            HfApi().create_repo(push_to_hub, exist_ok=True)
        # if the hub is not reached, it is an error of the HTTP library, which one depends on huggingface_hub's version
        except Exception as error:
            raise ValueError(f"expected a repository on the hub to upload to, got: {error} ({push_to_hub}).") from error
    return target


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
    copies = [*files.companion_files(), *filter(Path.is_file, [files.folder / "generation_config.json"])]
    target.write(shards, texts, copies, origin=f"{files.fingerprint()} {command} {measured}")
    if push_to_hub:
        HfApi().upload_folder(repo_id=push_to_hub, folder_path=target.out, commit_message=command)
        report["pushed to"] = push_to_hub
    return report


def model_card(files: Source | ImportDeepseek, command: str, report: dict, place: str) -> str:
    """The README.md of the new folder: its source, license, command and measurements. `place` is what users load."""
    data = ModelCardData(library_name="transformers", license=files.card.license, language=files.card.language)
    template = Template((resources(__package__) / CARD_TEMPLATE).read_text(encoding="utf-8"))
    rows = "\n".join(f"| {name} | {_format(value)} |" for name, value in report.items() if not isinstance(value, list))
    return template.substitute(metadata=data.to_yaml(), name=files.name, command=command, report=rows, place=place)


def _format(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value
