"""Measures time and memory to read a prompt: python -m benchmarks.prefill --out benchmarks/results/prefill.json

Lite-4 reads random tokens as generate() does before its first token: in transformers' own class, in this package in
plain torch, and after `optimize_for_inference`. Each side and length runs in a process of its own, in turn, and
multiplies square float32 matrices before and after, which shows other load on the machine. Memory is the peak of the
process while it reads, minus what was resident before, that is the weights. It runs on Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from deepseek_latent import optimize_for_inference

from .lite4 import build
from .machine import described, gemm_rate, resident, seconds_of
from .plots import draw_beside
from .plots.speed import draw_reading

SIDES = ("native", "plain", "kernels")
TOKENS_READ = 1024  # at least: shorter prompts are read several times


@torch.inference_mode()
def measure(side: str, tokens: int, dtype: torch.dtype) -> dict:
    """Seconds and memory of one side, in this process, with the logits of the last token."""
    model = build("native" if side == "native" else "ours", dtype)
    if side == "kernels":
        optimize_for_inference(model)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))

    def read() -> None:
        logits.append(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1])

    logits: list[Tensor] = []
    model(ids[:, :64], use_cache=True, logits_to_keep=1)
    before, rate = resident("VmRSS"), gemm_rate()
    Path("/proc/self/clear_refs").write_text("5")
    seconds = [seconds_of(read) for _ in range(max(TOKENS_READ // tokens, 1))]
    peak = resident("VmHWM")
    return {
        "side": side,
        "tokens": tokens,
        "seconds": round(statistics.median(seconds), 3),
        "memory_above_weights_bytes": peak - before,
        "float32_flop_per_second": round((rate + gemm_rate()) / 2),
        "logits": logits[-1].tolist(),
    }


def compared(runs: list[dict], allowed: float) -> list[dict]:
    """Adds ratios to the runs; fails if the logits of a side differ."""
    for run in runs:
        native = next(other for other in runs if other["side"] == "native" and other["tokens"] == run["tokens"])
        run["times_faster_than_native"] = round(native["seconds"] / run["seconds"], 2)
        own, other = torch.tensor(run["logits"]), torch.tensor(native["logits"])
        error = ((own - other).norm() / other.norm()).item()
        assert error < allowed, f"{run['side']} differs by {error} at {run['tokens']} tokens"
        run["logits_relative_difference"] = round(error, 5)
    return [{name: value for name, value in run.items() if name != "logits"} for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="native among them")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="write the result here as JSON, and a plot beside it")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.here[0], int(options.here[1]), getattr(torch, options.dtype))))
        return
    runs = []
    for tokens, side in track([(tokens, side) for tokens in options.tokens for side in options.sides], "reading"):
        command = [sys.executable, "-m", "benchmarks.prefill", "--here", side, str(tokens), "--dtype", options.dtype]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    # in bfloat16, a router near a tie may choose another expert
    runs = compared(runs, allowed=0.1 if options.dtype == "bfloat16" else 1e-4)
    result = described("python -m benchmarks.prefill") | {"model": f"Lite-4, {options.dtype}", "runs": runs}
    for run in result["runs"]:
        print(run)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        draw_beside(options.out, draw_reading)


if __name__ == "__main__":
    main()
