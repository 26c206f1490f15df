"""Options of `deepseek-latent experts`."""

import argparse
from pathlib import Path


def add_command(commands) -> None:
    parser = commands.add_parser("experts", help="show which experts a model uses on a text, and how evenly")
    parser.description = (
        "Shows for every expert its fraction of the choices and its mean gate weight on a text, and for every layer "
        "load, entropy, experts never chosen and the distance to other texts. Says whether texts differ more than "
        "the halves of one text do, and where the model is on the scaling law of routed models."
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="FILE", help="other texts to compare with"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw layers and experts as a heat map")
    parser.add_argument("--esft", type=Path, metavar="JSON", help="write the experts to fine-tune on the text")
    parser.add_argument("--by", choices=("token", "gate"), help="how --esft scores experts (default: token)")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="--esft takes experts of a layer until their scores add up to P (default: 0.2; by gate 0.1)",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.set_defaults(check=_check, action="experts:show_experts")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.esft is None and (arguments.by, arguments.threshold) != (None, None):
        raise ValueError(
            "--by and --threshold say how --esft chooses experts; give --esft a file to write, or leave them out."
        )
    if arguments.threshold is not None and not 0 < arguments.threshold <= 1:
        raise ValueError(f"--threshold must be above 0 and at most 1, got {arguments.threshold}.")
