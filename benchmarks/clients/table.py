"""Prints the results of `run` as Markdown: python -m benchmarks.clients.table [RESULTS]

Two tables: what each program makes of each checkpoint, and its errors.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "clients.json"
LARGEST_ROUNDING = 1e-4  # rounding in float32 makes an error below 1e-5, another computation one above 1e-3
TITLES = {
    "transformers": "transformers {}",
    "vllm": "vLLM {}",
    'vllm {"compilation_config": {"custom_ops": ["none"]}}': "vLLM, torch's RoPE",
    "llama.cpp": "llama-cpp-python {}",
    "mlx-lm": "mlx-lm {}",
}


def verdict(result: dict) -> str:
    """ "same", "differs" or "refused"."""
    return "refused" if "refused" in result else "same" if result["error"] < LARGEST_ROUNDING else "differs"


def cell(result: dict) -> str:
    found = verdict(result)
    return f"differs by {result['error']:.2g}" if found == "differs" else found


def format_tables(results: dict) -> str:
    programs = [program for program in TITLES if program in results]
    titles = [TITLES[program].format(results[program]["version"]) for program in programs]
    lines = [f"| checkpoint | {' | '.join(titles)} |", "|---" * (len(programs) + 1) + "|"]
    for name in results["transformers"]["results"]:
        found = [results[program]["results"].get(name) for program in programs]
        lines.append(f"| {name} | {' | '.join(cell(x) if x else '' for x in found)} |")
    lines += ["", "| program | error | of |", "|---|---|---|"]
    for program, title in zip(programs, titles, strict=True):
        names_of_error = {}
        for name, result in results[program]["results"].items():
            if "refused" in result:
                names_of_error.setdefault(result["refused"].replace("|", "\\|"), []).append(name)
        lines += [f"| {title} | `{error}` | {'; '.join(names)} |" for error, names in names_of_error.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_tables(json.loads(Path(*sys.argv[1:] or [RESULTS]).read_text())))
