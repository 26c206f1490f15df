"""Options of `deepseek-latent run`."""

import argparse


def add_command(commands) -> None:
    parser = commands.add_parser(
        "run", usage="%(prog)s [-h] (-m MODULE | SCRIPT.py) ...", help="run another tool with DeepSeek-V2 registered"
    )
    parser.description = (
        "Runs a module or script as python would, with DeepSeek-V2 registered, and exits with its exit code. A "
        "launcher of several processes starts it in each of them: accelerate launch -m deepseek_latent run SCRIPT.py, "
        "torchrun --nproc-per-node 2 -m deepseek_latent run SCRIPT.py."
    )
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="a module and its arguments"
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT.py", help="a script and its arguments")
    parser.set_defaults(check=_check, action="run:prepare_tool")


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.module or arguments.script):
        raise ValueError("expected -m MODULE or a script, got neither; name what to run.")
