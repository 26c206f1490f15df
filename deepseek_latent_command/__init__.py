"""The command `deepseek-latent`: its options, apart from the package `deepseek_latent`, whose import takes seconds.

Each file has the options of one command. What does the work, in `deepseek_latent.commands`, is imported when the
command runs. So help, the version and errors in the use of options are printed at once.
"""

import argparse
import os
import sys
from importlib import import_module

from .convert import add_command as add_convert
from .experts import add_command as add_experts
from .export_code import add_command as add_export_code
from .generate import add_command as add_generate
from .inspect import add_command as add_inspect
from .run import add_command as add_run
from .verify import add_command as add_verify

NAME = "deepseek-latent"
# that of the package, which is not imported for it
VERSION = "0.2.0"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0: done. 1: the checkpoint does not pass its check. 2: the input is unusable, for a reason printed in one sentence.
    130: it was interrupted. 141: what reads the output, such as `head`, has closed it.
    """
    is_tool = False
    try:
        try:
            arguments = parse(argv)
            status = _run(arguments)
        finally:
            sys.stdout.flush()
        is_tool = arguments.command == "run" and status == 0
        if is_tool:
            from deepseek_latent.commands.run import run_tool

            run_tool(arguments.module, arguments.script)
        return status
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if is_tool:
            # errors of the tool are its own
            raise
        # python flushes the output once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line, with what else their command has.

    `check` is a function of them that raises ValueError for options that do not go together. `action` names what runs
    the command and returns its exit code, as "FILE:FUNCTION" in `deepseek_latent.commands`.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    arguments.argv = argv
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    try:
        arguments.check(arguments)
    except ValueError as error:
        print(f"{NAME} {arguments.command}: {error}", file=sys.stderr)
        return 2
    from deepseek_latent.commands.terminal import run_action

    file, _, function = arguments.action.partition(":")
    action = getattr(import_module(f"deepseek_latent.commands.{file}"), function)
    return run_action(action, arguments, name=f"{NAME} {arguments.command}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Generates text, inspects and converts checkpoints, and runs other tools with the plugin.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    parser.set_defaults(check=lambda arguments: None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)
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


class _Command(argparse.ArgumentParser):
    """The parser of one command, which shows its own usage where it does not know an option.

    It takes the prompt of `generate` after an option or `--` too, which argparse of older Pythons does not.
    """

    def parse_known_args(self, args=None, namespace=None):
        arguments, rest = super().parse_known_args(args, namespace)
        is_without_prompt = getattr(arguments, "prompt", "") is None
        if is_without_prompt and rest[:1] == ["--"]:
            # after it, a prompt may start with -
            arguments.prompt, *rest = rest[1:] or [None]
        elif is_without_prompt and rest and not rest[0].startswith("-"):
            arguments.prompt, *rest = rest
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return arguments, rest
