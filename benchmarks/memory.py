"""Measures memory while decoding against context: python -m benchmarks.memory --out benchmarks/results/memory.json

Lite-4 in bfloat16 with a cache of random latents decodes a few tokens: in this package with its kernels, with the cache
in bfloat16 and in fewer bits, and in transformers' own class, each in a process of its own. The results are the bytes
of the cache, the growth of the process while it was filled, and the further growth while tokens were decoded, when
transformers' class expands the whole cache. It runs on Linux only. The plot is written beside the result file.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.progress import track

from deepseek_latent import optimize_for_inference
from deepseek_latent.cache.format import CACHE_DTYPES
from deepseek_latent.compat.cache_name import CACHE

from .decode import as_native, decode
from .lite4 import build, filled
from .machine import described, report, resident
from .plots import draw_beside
from .plots.speed import draw_memory

SIDES = ("native", "bfloat16", "int8", "int4")


@torch.inference_mode()
def measure(side: str, contexts: list[int]) -> list[dict]:
    """Measures one row per context, in this process."""
    model, one, rows = build("native" if side == "native" else "ours"), torch.tensor([[17]]), []
    if side != "native":
        optimize_for_inference(model)

    def fill(tokens: int):
        cache = filled(model, tokens, side if side in CACHE_DTYPES else None)
        return as_native(cache) if side == "native" else cache

    decode(model, fill(64), one)
    for tokens in contexts:
        before = settled()
        cache = fill(tokens)
        after = settled()
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(2 if side == "native" else 16):
            logits = model(one, **{CACHE: cache}).logits
        assert logits.isfinite().all()
        stored = (layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        held = sum(stored) if side == "native" else cache.nbytes
        rows.append(
            {
                "side": side,
                "tokens": tokens,
                "cache_bytes": held,
                "growth_while_cached_bytes": after - before,
                "further_peak_while_decoding_bytes": resident("VmHWM") - after,
            }
        )
        del cache
    return rows


def settled() -> int:
    """Resident bytes, without freed memory that the allocator keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    parser.add_argument("--native-up-to", type=int, default=16384, help="longer contexts are measured for ours only")
    parser.add_argument("--out", type=Path, help="write the result here as JSON, and a plot beside it")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.here, options.contexts)))
        return
    rows = []
    for side in track(SIDES, "decoding"):
        contexts = [n for n in options.contexts if side != "native" or n <= options.native_up_to]
        command = [sys.executable, "-m", "benchmarks.memory", "--here", side, "--contexts", *map(str, contexts)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    result = described("python -m benchmarks.memory") | {"model": "Lite-4, bfloat16", "rows": rows}
    report(result, options.out)
    if options.out:
        draw_beside(options.out, draw_memory)


if __name__ == "__main__":
    main()
