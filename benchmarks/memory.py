"""How much the process grows above the weights while a long prompt is read: python -m benchmarks.memory

Each class runs in a process of its own; the figure is the peak of its resident memory during the forward, less what
was resident before it. Linux only (the peak is reset and read through /proc).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from .machine import described


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}.")


def measure(which: str, tokens: int) -> dict:
    """Reads `tokens` random tokens as generate() does before its first token, in this process."""
    from .lite4 import build

    model = build(which)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:, :64], use_cache=True, logits_to_keep=1)
        Path("/proc/self/clear_refs").write_text("5")
        before, start = resident("VmRSS"), time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - start
    assert output.logits.isfinite().all()
    return {
        "class": which,
        "tokens": tokens,
        "growth_bytes": resident("VmHWM") - before,
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--classes", nargs="+", default=["ours", "native"], choices=["ours", "native"])
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--here", choices=["ours", "native"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.here, arguments.tokens)))
        return
    runs = []
    for which in arguments.classes:
        command = [sys.executable, "-m", "benchmarks.memory", "--here", which, "--tokens", str(arguments.tokens)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{which:>7}: {runs[-1]['growth_bytes'] / 1e9:.2f} GB above the weights, {runs[-1]['seconds']} s")
    if arguments.out:
        result = described(f"python -m benchmarks.memory --tokens {arguments.tokens}")
        result |= {"model": "Lite-4, bf16, batch 1", "runs": runs}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
