"""`deepseek-latent export-code`: puts this package's code into a checkpoint folder."""

import argparse
from pathlib import Path

from ..conversion.remote_code import export_code


def add_command(commands) -> None:
    parser = commands.add_parser("export-code", help="make a checkpoint load where this package is not installed")
    parser.description = (
        "Copies the model's code into a checkpoint folder and names it in its config.json (auto_map), so that the "
        "folder loads with trust_remote_code=True where only transformers is installed."
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--subfolder", default="", metavar="NAME", help="put the code there, not beside the weights")
    parser.set_defaults(action=_export_code)


def _export_code(arguments: argparse.Namespace) -> int:
    written = export_code(Path(arguments.folder).expanduser(), arguments.subfolder)
    print(f"Wrote into {arguments.folder}: {', '.join(written)}.")
    print("It now loads with trust_remote_code=True where only transformers is installed.")
    return 0
