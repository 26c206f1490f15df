"""Times torch.compile with a static cache against eager decoding: python -m benchmarks.compiled

Lite-4 in bfloat16 decodes one token, in plain torch and after `optimize_for_inference`: eagerly with a `LatentCache`,
and compiled as one graph with a `StaticCache` that has room for 64 more tokens. All variants are timed in turn in one
process.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from .decode import OURS, decode, sides
from .lite4 import filled
from .machine import alternated, described, report

ROOM = 64  # tokens


def static(model: PreTrainedModel, context: int) -> StaticCache:
    cache = StaticCache(model.config, max_cache_len=context + ROOM)
    for i, layer in enumerate(filled(model, context, None).layers):
        cache.update(layer.keys, layer.values, i)
    return cache


@torch.inference_mode()
def measure(context: int, repetitions: int) -> dict:
    assert repetitions + 2 < ROOM
    models, token = sides(torch.bfloat16), torch.tensor([[17]])
    steps, first, row = {}, {}, {"context": context}
    for side in OURS:
        model = models[side]
        latent, fixed = filled(model, context, None), static(model, context)
        graph = torch.compile(model, fullgraph=True)

        def in_graph(graph=graph, fixed=fixed) -> Tensor:
            return graph(token, cache=fixed).logits

        steps[f"{side}, eager"] = lambda model=model, latent=latent: decode(model, latent, token)
        steps[f"{side}, compiled"] = in_graph
        first[f"{side}, eager"] = steps[f"{side}, eager"]().float()
        started = time.perf_counter()
        first[f"{side}, compiled"] = in_graph().float()
        row[f"{side}_seconds_to_compile"] = round(time.perf_counter() - started, 1)
    for name, logits in first.items():
        error = ((logits - first["plain, eager"]).norm() / first["plain, eager"].norm()).item()
        assert error < 0.05, f"{name} differs by {error}"
    seconds = {name: statistics.median(x) for name, x in alternated(steps, repetitions, turn=0).items()}
    return row | {f"{name}_milliseconds": round(1e3 * x, 2) for name, x in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    result = described("python -m benchmarks.compiled") | {"model": "Lite-4, bfloat16"}
    result |= measure(options.context, options.repetitions)
    report(result, options.out)


if __name__ == "__main__":
    main()
