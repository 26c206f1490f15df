"""Writes model_card/smollm2-mla.md: python -m benchmarks.real_card FOLDER

The card is that of FOLDER/mla, as `deepseek-latent convert` wrote it, with the perplexities that
`python -m benchmarks.real_model FOLDER --out benchmarks/results/real_model.json` measured.
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "real_model.json"
CARD = ROOT / "model_card" / "smollm2-mla.md"
# the paragraph before which the measurements stand
BEFORE = "The license is that of the source."


def table(result: dict) -> str:
    """The measurements in Markdown."""
    windows, length = result["windows"], result["window_length"]
    sizes = ", ".join(f"{number} windows of {length} tokens ({text})" for text, number in windows.items())
    lines = [
        f"Perplexity on {sizes}, and its ratio to the first row of the same part with the standard error of paired "
        "differences (`python -m benchmarks.real_model`):",
        "",
        "| | " + " | ".join(windows) + " |",
        "|---|" + "---|" * len(windows),
    ]
    for part, title in (("models", ""), ("caches", "cache, ")):
        for row in result[part]:
            cells = [
                f"{row[text]['perplexity']:.3f} ({row[text]['ratio']:.4f} ± {row[text]['standard_error']:.4f})"
                for text in windows
            ]
            lines.append(f"| {title}{row['what']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def card(written: str, result: dict) -> str:
    """The card that the conversion wrote, with the measurements."""
    before, after = written.split(BEFORE)
    return f"{before}{table(result)}\n\n{BEFORE}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    written = (parser.parse_args().folder / "mla" / "README.md").read_text(encoding="utf-8")
    CARD.write_text(card(written, json.loads(RESULT.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
