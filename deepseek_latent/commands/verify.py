"""`deepseek-latent verify`: reads a checkpoint back and compares its logits with those of its source."""

import argparse
from contextlib import nullcontext
from dataclasses import asdict

import torch

from ..conversion.compatibility import NOT_RUN
from ..conversion.gguf_source import source_folder
from ..conversion.source import fetch_source
from ..conversion.text import read_text
from ..conversion.verify import verify
from .terminal import print_report, quiet_transformers


@quiet_transformers()
def verify_checkpoint(arguments: argparse.Namespace) -> int:
    text = read_text(arguments.text) if arguments.text else None
    folder, dtype = fetch_source(arguments.out), arguments.dtype and getattr(torch, arguments.dtype)
    source = source_folder(arguments.against, arguments.gguf_file) if arguments.against else nullcontext()
    with source as against:
        report = verify(folder, against, text, dtype)
    print_report(_shown(report, as_json=arguments.json), as_json=arguments.json)
    return 1 if report["problems"] else 0


def _shown(report: dict, *, as_json: bool) -> dict:
    """The report as it is printed: with a row for each of the other programs, or with what JSON can hold."""
    outcomes = report.pop("other_programs", {})
    if as_json:
        return report | {"other_programs": {program: asdict(outcome) for program, outcome in outcomes.items()}}
    names = {program: f"in {program}{' (by its source)' if program == NOT_RUN else ''}" for program in outcomes}
    rows = {names[program]: outcome.lines() for program, outcome in outcomes.items()}
    # the verdict stays last
    verdict = {"verdict": report.pop("verdict")}
    return report | rows | verdict
