"""One conversion from its source to its place: what is written, what is said of it, and where it goes from there."""

import argparse
import shlex
from importlib.resources import files as resources
from pathlib import Path
from string import Template

from huggingface_hub import HfApi, ModelCard, ModelCardData

from .deepseek_layout import ExportDeepseek
from .target import Target

CARD = "converted.md.template"


def target_for(folder: Path, arguments: argparse.Namespace) -> Target:
    """Where the result goes; ValueError, before any work, where it cannot, or REPO cannot be written to."""
    target = Target(arguments.out, shard_bytes=arguments.max_shard_size, force=arguments.force)
    origin = folder.resolve()
    if target.out == origin or origin in target.out.parents or target.out in origin.parents:
        raise ValueError(f"{arguments.out} and the source lie in each other; choose another folder.")
    if arguments.push_to_hub and not arguments.dry_run:
        # made now, since a conversion may take hours
        HfApi().create_repo(arguments.push_to_hub, exist_ok=True)
    return target


def convert(files, conversion, measured: dict, target: Target, arguments: argparse.Namespace) -> dict:
    """Writes `conversion` of `files` to the target, and uploads it if asked to; the report of it."""
    config, is_export = conversion.config, isinstance(conversion, ExportDeepseek)
    shards = conversion.shards() if is_export else target.plan(conversion.pieces())
    pieces = [piece for held in shards.values() for piece in held]
    report = {
        "out": str(arguments.out),
        "tensors": len(pieces),
        "bytes": sum(piece.nbytes for piece in pieces),
        "files": list(shards),
        "cached elements per token": config.cached_width * config.num_hidden_layers,
        **measured,
    }
    if arguments.dry_run:
        return report
    command = f"deepseek-latent {shlex.join(arguments.given)}"
    if is_export:
        texts = conversion.texts()
    else:
        place = arguments.push_to_hub or target.out.name
        texts = {"config.json": config.to_json_string(), "README.md": card(files, command, report, place)}
    copies = [*files.beside(), *filter(Path.is_file, [files.folder / "generation_config.json"])]
    target.write(shards, texts, copies, origin=f"{files.fingerprint()} {command} {measured}")
    if arguments.push_to_hub:
        HfApi().upload_folder(repo_id=arguments.push_to_hub, folder_path=target.out, commit_message=command)
        report["pushed to"] = arguments.push_to_hub
    return report


def card(files, command: str, report: dict, place: str) -> str:
    """What the new folder says of itself: where it comes from, under which licence, how it was made, at what cost."""
    name, own = files.name, files.folder / "README.md"
    given = ModelCard.load(own).data if own.is_file() else ModelCardData()
    data = ModelCardData(library_name="transformers", license=given.license, language=given.language)
    template = Template((resources(__package__) / CARD).read_text(encoding="utf-8"))
    told = {name: value for name, value in report.items() if not isinstance(value, list) and name != "out"}
    rows = "\n".join(f"| {name} | {_in_card(value)} |" for name, value in told.items())
    return template.substitute(metadata=data.to_yaml(), name=name, command=command, report=rows, place=place)


def _in_card(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
