"""`python -m tests.torture`: attacks the package for a given time and counts what happened; exits with 1 for a finding.

Each part runs in a process of its own, which is watched: if it dies, that is a crash of the case it was at, and if it
says nothing for two minutes, a hang. The part then goes on with the next case.
"""

import argparse
import importlib
import json
import selectors
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .campaign import KINDS, Campaign, run_watched

# the parts by name, and their shares of the time
PARTS: dict[str, int] = {
    "kill_points": 10,
    "bad_disks": 4,
    "checkpoints": 8,
    "hostile_folders": 6,
    "adapters": 6,
    "cache_files": 6,
    "shared_prompts": 4,
    "steps": 6,
    "batching": 4,
    "threads": 2,
    "soak": 4,
    "operators": 6,
}
SILENCE = 120  # seconds


def run_part(part: str, seconds: float, seed: int, first: int = 0) -> tuple[Counter, list[dict[str, str]]]:
    """Runs one part in processes that are watched, and returns its counts and findings."""
    counts, findings = Counter(), []
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        command = [sys.executable, "-m", "tests.torture", part, "--child", "--first", str(first)]
        command += ["--seconds", str(left), "--seed", str(seed)]
        case, finished = first, False
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as child:
            watch = selectors.DefaultSelector()
            watch.register(child.stdout, selectors.EVENT_READ)
            while watch.select(SILENCE):
                line = child.stdout.readline()
                if not line:
                    break
                said = json.loads(line)
                case = said.get("case", case)
                findings += [said["finding"]] if "finding" in said else []
                if "counts" in said:
                    counts.update(said["counts"])
                    finished = True
            else:
                child.kill()
        if finished:
            break
        kind = "hang" if child.wait() == -9 else "crash"
        counts.update({kind: 1, "inputs": case - first + 1})
        findings.append({"kind": kind, "case": str(case), "text": f"the process ended with {child.returncode}"})
        first = case + 1
    return counts, findings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=60, help="for all parts together; default: 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the counts and findings there as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=10, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case, to repeat a finding")
    arguments = parser.parse_args()
    parts = arguments.parts or [*PARTS]
    if arguments.child:
        part = importlib.import_module(f".{parts[0]}", __package__)
        run_watched(part.run, Campaign(arguments.seconds, seed=arguments.seed, first=arguments.first))
        return 0
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"expected parts among {', '.join(PARTS)}, got {unknown[0]}")
    share = 60 * arguments.minutes / sum(PARTS[part] for part in parts)
    results = {}
    for part in parts:
        results[part] = run_part(part, PARTS[part] * share, arguments.seed, arguments.first)
        Console(stderr=True).print(f"{part}: {dict(results[part][0])}")
        for finding in results[part][1][:20]:
            print(f"  {finding['kind']}, case {finding['case']}: {finding['text']}")
    _print_table(results)
    if arguments.out:
        content = {part: {"counts": counts, "findings": findings} for part, (counts, findings) in results.items()}
        arguments.out.write_text(json.dumps({"seed": arguments.seed, "parts": content}, indent=1) + "\n")
    return int(any(findings for _, findings in results.values()))


def _print_table(results: dict[str, tuple[Counter, list]]) -> None:
    table = Table("part", "inputs", *KINDS)
    for part, (counts, _) in results.items():
        others = [f"{number:,} {what}" for what, number in counts.items() if what not in (*KINDS, "inputs")]
        print(f"{part} also counted {', '.join(others)}.")
        table.add_row(part, f"{counts['inputs']:,}", *(f"{counts[kind]:,}" for kind in KINDS))
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
