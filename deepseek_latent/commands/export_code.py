"""`deepseek-latent export-code`: puts this package's code into a checkpoint folder."""

import argparse
from pathlib import Path

from ..conversion.remote_code import export_code


def write_code(arguments: argparse.Namespace) -> int:
    written = export_code(Path(arguments.folder).expanduser(), arguments.subfolder)
    print(f"Wrote into {arguments.folder}: {', '.join(written)}.")
    print("It now loads with trust_remote_code=True where only transformers is installed.")
    return 0
