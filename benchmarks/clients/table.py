"""Prints the results of `run` as Markdown: python -m benchmarks.clients.table [RESULTS]

Two tables: what each program makes of each checkpoint, and the first lines of its errors.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "clients.json"
# The largest error that rounding in float32 makes here is 4e-5, and the smallest of another computation is 2e-3.
LARGEST_ROUNDING = 5e-4
TITLES = {"transformers": "transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp", "mlx-lm": "mlx-lm"}


def verdict(result: dict) -> str:
    """ "same", "differs" or "refused"."""
    return "refused" if "refused" in result else "same" if result["error"] < LARGEST_ROUNDING else "differs"


def cell(result: dict) -> str:
    found = verdict(result)
    return f"differs by {result['error']:.2g}" if found == "differs" else found


def format_tables(results: dict) -> str:
    programs = [program for program in TITLES if program in results]
    titles = [f"{TITLES[x]} {results[x]['version']}" for x in programs]
    lines = [f"| checkpoint | {' | '.join(titles)} |", "|---" * (len(programs) + 1) + "|"]
    for name in results[programs[0]]["results"]:
        cells = [cell(results[program]["results"][name]) for program in programs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| program | error | of |", "|---|---|---|"]
    for program in programs:
        names_of_error = {}
        for name, result in results[program]["results"].items():
            if "refused" in result:
                names_of_error.setdefault(result["refused"].replace("|", "\\|"), []).append(name)
        lines += [f"| {TITLES[program]} | `{error}` | {'; '.join(x)} |" for error, x in names_of_error.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_tables(json.loads(Path(*sys.argv[1:] or [RESULTS]).read_text())))
