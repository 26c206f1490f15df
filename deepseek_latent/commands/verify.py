"""`deepseek-latent verify`: reads a checkpoint back and compares its logits with those of its source."""

import argparse
from contextlib import nullcontext

import torch

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
    print_report(report, as_json=arguments.json)
    return 1 if report["problems"] else 0
