"""`deepseek-latent run`: runs a module or a script in this process as Python itself would."""

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path


def prepare_tool(arguments: argparse.Namespace) -> int:
    """Sets sys.argv and sys.path as Python does for `python -m MODULE` or `python SCRIPT`, each with its arguments.

    Raises ValueError if there is no such module or script.
    """
    module, script = arguments.module, arguments.script
    sys.argv = module or script
    tool = sys.argv[0]
    sys.path.insert(0, str(Path.cwd() if module else Path(tool).resolve().parent))
    if module and not _is_runnable(tool):
        raise ValueError(f"expected a module that can be run, got {tool}, which is not found; install it.")
    if not module and not Path(tool).exists():
        way_out = "correct its path" if tool.endswith(".py") else f"for a module write -m {tool}"
        raise ValueError(f"expected a script, got {tool}, which does not exist; {way_out}.")
    return 0


def run_tool(module: list[str] | None, script: list[str]) -> None:
    """Runs the module or script after the command was prepared. Its exceptions pass through."""
    if module:
        runpy.run_module(module[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script[0], run_name="__main__")


def _is_runnable(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError as error:
        # if the tool itself lacks a package, its own error passes through
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        return False
    return spec is not None
