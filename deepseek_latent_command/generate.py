"""Options of `deepseek-latent generate`."""

import argparse

from .options import CACHE_DTYPES, DTYPES, number_between


def add_command(commands) -> None:
    parser = commands.add_parser("generate", help="stream text and show the size of the cache")
    parser.description = "Streams text to stdout, then writes the speed and the size of the cache to stderr."
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="with --chat it can be left out: each line of stdin is a message then",
    )
    parser.add_argument(
        "--max-new-tokens", type=number_between(int, 1, 1 << 20), default=128, metavar="N", help="default: 128"
    )
    parser.add_argument(
        "--temperature",
        type=number_between(float, 0, 100),
        metavar="T",
        help="sample at this temperature; default: take the most likely token",
    )
    parser.add_argument(
        "--top-p",
        type=number_between(float, 0, 1),
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens whose probabilities add up to P; default: 1",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="make sampling reproducible")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="default: that of the checkpoint")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; default: cuda if available")
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help="quantize the cached latents; default: not quantized"
    )
    parser.add_argument(
        "--optimize",
        action="store_true",
        help="decode with operators in C++ on a CPU, compiled once in about a minute, or in Triton on a GPU",
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.set_defaults(check=_check, action="generate:generate_text")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.top_p < 1 and not arguments.temperature:
        raise ValueError("--top-p needs a --temperature above 0; without one the most likely token is always taken.")
    if arguments.prompt is None and not arguments.chat:
        raise ValueError("expected a PROMPT; only with --chat it can be left out, and messages are read from stdin.")
