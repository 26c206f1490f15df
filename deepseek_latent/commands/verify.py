"""`deepseek-latent verify`: reads a checkpoint back and compares its logits with those of its source."""

import argparse
from contextlib import nullcontext
from pathlib import Path

from ..conversion.gguf_source import source_folder
from ..conversion.text import read_text
from ..conversion.verify import verify
from .terminal import DTYPES, print_report, quiet_transformers


def add_command(commands) -> None:
    parser = commands.add_parser("verify", help="compare a converted checkpoint with its source")
    parser.add_argument("out", metavar="OUT", help="the folder to check")
    parser.add_argument("--against", metavar="SRC", help="the folder, hub id or GGUF file that OUT was converted from")
    parser.add_argument("--gguf-file", metavar="NAME", help="compare with this GGUF file of SRC")
    parser.add_argument("--text", metavar="FILE", type=Path, help="a text to compare on; default: random tokens")
    parser.add_argument("--dtype", choices=DTYPES, help="the dtype to compute in; default: as stored")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(action=_verify)


@quiet_transformers()
def _verify(arguments: argparse.Namespace) -> int:
    if arguments.gguf_file is not None and arguments.against is None:
        raise ValueError("--gguf-file names a file of the folder or hub id that --against gives; add --against.")
    text = read_text(arguments.text) if arguments.text else None
    source = source_folder(arguments.against, arguments.gguf_file) if arguments.against else nullcontext()
    with source as against:
        report = verify(Path(arguments.out), against, text, DTYPES.get(arguments.dtype))
    print_report(report, as_json=arguments.json)
    return 1 if report["problems"] else 0
