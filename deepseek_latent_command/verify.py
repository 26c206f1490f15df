"""Options of `deepseek-latent verify`."""

import argparse
from pathlib import Path

from .options import DTYPES


def add_command(commands) -> None:
    parser = commands.add_parser("verify", help="compare a converted checkpoint with its source")
    parser.description = (
        "Reads every tensor of a checkpoint, compares its logits with transformers' own class and, with --against, "
        "with its source, and says what other programs make of it. Exit code 0: passed, 1: failed, 2: unusable input."
    )
    parser.add_argument("out", metavar="OUT", help="the folder or hub id to check")
    parser.add_argument("--against", metavar="SRC", help="the folder, hub id or GGUF file that OUT was converted from")
    parser.add_argument("--gguf-file", metavar="NAME", help="compare with this GGUF file of SRC")
    parser.add_argument("--text", metavar="FILE", type=Path, help="a text to compare on; default: random tokens")
    parser.add_argument("--dtype", choices=DTYPES, help="the dtype to compute in; default: as stored")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(check=_check, action="verify:verify_checkpoint")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.gguf_file is not None and arguments.against is None:
        raise ValueError("--gguf-file names a file of the folder or hub id that --against gives; add --against.")
