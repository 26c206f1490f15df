"""Draws the plots of all JSON files in benchmarks/results again: python -m benchmarks.plots

Nothing is measured. The benchmarks draw their plots with the same functions. FOLDER may be another one with such files.
"""

import argparse
from pathlib import Path

from . import PLOTS, RESULTS, draw_beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=RESULTS)
    for path in sorted(parser.parse_args().folder.glob("*.json")):
        if path.stem in PLOTS:
            print(draw_beside(path, PLOTS[path.stem]))


if __name__ == "__main__":
    main()
