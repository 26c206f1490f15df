"""What all commands share: quiet loading, printed reports and exit codes."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from ..conversion.escaping import printable, shortened

MAX_ERROR_LENGTH = 900


def run_action(action: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, name: str) -> int:
    """Runs the command that was parsed and returns its exit code.

    Unusable input, which is any ValueError or OSError of the command, is reported in one sentence after the `name` of
    the command, and has exit code 2.
    """
    try:
        return action(arguments)
    except BrokenPipeError:
        # of the output, not of the input
        raise
    except (ValueError, OSError, StrictDataclassError) as error:
        # it may quote a name from a file of a stranger
        reason = shortened(printable(" ".join(_reason(error).split())), MAX_ERROR_LENGTH)
        print(f"{name}: {reason}", file=sys.stderr)
        return 2


def _reason(error: Exception) -> str:
    """The text of an error. That of the system's own begins with a number, such as "[Errno 2]", which is left out."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    names = [repr(str(name)) for name in (error.filename, error.filename2) if name is not None]
    return f"{error.strerror}{': ' if names else ''}{' and '.join(names)}."


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
