"""`deepseek-latent`: generates text, inspects and converts checkpoints, and runs other tools with the plugin."""

import argparse
import os
import sys

from .. import __version__
from .convert import add_command as add_convert
from .experts import add_command as add_experts
from .export_code import add_command as add_export_code
from .generate import add_command as add_generate
from .inspect import add_command as add_inspect
from .run import add_command as add_run
from .run import run_tool
from .terminal import run_command
from .verify import add_command as add_verify


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0: done. 1: the checkpoint does not pass its check. 2: the input is unusable, for a reason printed in one sentence.
    130: it was interrupted. 141: what reads the output, such as `head`, has closed it.
    """
    is_tool = False
    try:
        try:
            arguments, status = run_command(_parser(), argv)
        finally:
            sys.stdout.flush()
        is_tool = arguments.command == "run" and status == 0
        if is_tool:
            run_tool(arguments.module, arguments.script)
        return status
    except KeyboardInterrupt:
        print("deepseek-latent: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if is_tool:
            # errors of the tool are its own
            raise
        # python flushes the output once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepseek-latent", description=__doc__.partition(": ")[2])
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_command in (
        add_generate,
        add_inspect,
        add_convert,
        add_verify,
        add_experts,
        add_export_code,
        add_run,
    ):
        add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
