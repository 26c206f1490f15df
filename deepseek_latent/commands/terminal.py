"""What all commands share: argument types, quiet loading, printed reports and exit codes."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from ..conversion.escaping import printable, shortened

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_ERROR_LENGTH = 900
BYTE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def run_command(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, int]:
    """Parses a command line and runs its command. Returns the arguments and the exit code.

    Each command sets `action`, which takes the arguments and returns the exit code. Unusable input, which is any
    ValueError or OSError of the action, is reported in one sentence and has exit code 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    arguments.argv = argv
    try:
        return arguments, arguments.action(arguments)
    except BrokenPipeError:
        # of the output, not of the input
        raise
    except (ValueError, OSError, StrictDataclassError) as error:
        # it may quote a name from a file of a stranger
        reason = shortened(printable(" ".join(str(error).split())), MAX_ERROR_LENGTH)
        print(f"{parser.prog} {arguments.command}: {reason}", file=sys.stderr)
        return arguments, 2


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the log messages of transformers, and its progress bars where stderr is not a terminal."""
    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()


def print_report(report: dict, *, as_json: bool) -> None:
    """Prints a report as JSON or as a table of names and values."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table("", "", show_header=False)
    for name, value in report.items():
        # not a str, in which rich would look for markup
        table.add_row(Text(name.replace("_", " ")), Text(_format(value)))
    print_tables(table)


def print_tables(*tables: Table) -> None:
    """Prints tables as `Console.print` does, except that rich would exit with code 1 if the output was closed."""
    console = Console()
    with console.capture() as captured:
        console.print(*tables, sep="\n\n")
    print(captured.get(), end="")


def _format(value: list | float | int | str) -> str:
    if isinstance(value, list):
        return "\n".join(printable(str(x)) for x in value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}" if 0.01 < abs(value) < 1e6 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) else printable(value)


def number_between(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argument type: a number of type `kind` from `low` to `high`."""

    def parse(text: str) -> float:
        if not low <= (number := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return number

    # argparse writes "invalid int value"
    parse.__name__ = kind.__name__
    return parse


def byte_size(text: str) -> int:
    """An argument type: a number of bytes such as 500MB."""
    for unit, num_bytes in BYTE_UNITS.items():
        number = text.upper().removesuffix(unit)
        if number != text.upper() and number.isdigit() and int(number):
            return int(number) * num_bytes
    raise argparse.ArgumentTypeError(f"expected a whole number of KB, MB, GB or TB, such as 500MB, got {text}")
