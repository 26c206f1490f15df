"""Measures time per token against context: python -m benchmarks.decode --out benchmarks/results/decode.json

Lite-4 decodes one token with a cache of random latents. Four sides share their weights: this package in plain torch,
after `optimize_for_inference`, with int8 weights too, and transformers' own class. Their logits are compared, then they
are timed in turn in one process. The floor is a lower bound for this machine: the time to read every weight that a
token needs and the cache once, where the products over the cache count instead, at the float32 rate of a square matrix
product, if they take longer. Bandwidth and rate are measured in the same turns. The plot is written beside the results.
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from deepseek_latent import LatentCache, optimize_for_inference
from deepseek_latent.compat.cache_name import CACHE

from .lite4 import build, filled, twin
from .machine import alternated, described, seconds_of, yardsticks
from .plots import draw_beside
from .plots.speed import draw_decoding

OURS = ("plain", "kernels")
SHORTEST = 128  # tokens


def sides(dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """Builds Lite-4 for each side; all sides share one set of weights."""
    plain = build("ours", dtype)
    kernels, in_int8 = twin(plain), twin(plain)
    print(optimize_for_inference(kernels))
    print(optimize_for_inference(in_int8, weights="int8"))
    return {"plain": plain, "kernels": kernels, "int8": in_int8, "native": build("native", dtype, weights=plain)}


def weight_bytes_per_token(model: PreTrainedModel, batch: int) -> int:
    """Bytes of weights that one step reads: all but the embeddings and the experts that receive no token.

    Several tokens with random latents choose their experts independently.
    """
    config, total = model.config, 0
    share_chosen = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            total += int(parameter.nbytes * share_chosen)
        elif "embed_tokens" not in name:
            total += parameter.nbytes
    return total


def floor_seconds(
    model: PreTrainedModel, context: int, batch: int, bandwidth: float, rate: float
) -> tuple[float, float]:
    """Seconds to read the weights, at any context, and seconds to read the cache once."""
    config = model.config
    tokens = batch * config.num_hidden_layers * context
    read = tokens * (config.kv_lora_rank + config.qk_rope_head_dim) * model.dtype.itemsize / bandwidth
    products = 2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    return weight_bytes_per_token(model, batch) / bandwidth, max(read, tokens * products / rate)


def decode(model: PreTrainedModel, cache: DynamicCache, tokens: Tensor) -> Tensor:
    logits = model(tokens, **{CACHE: cache}).logits
    cache.crop(-1)
    return logits


def as_native(cache: LatentCache) -> DynamicCache:
    native = DynamicCache()
    for i, layer in enumerate(cache.layers):
        native.update(layer.keys.clone(), layer.values.clone(), i)
    return native


def measure(models: dict[str, PreTrainedModel], context: int, batch: int, repetitions: int) -> dict:
    """Milliseconds per step of every side, with the machine's bandwidth and rate during the same turns."""
    plain, tokens = models["plain"], torch.arange(17, 17 + batch)[:, None]
    cache = filled(plain, context, None)
    cache.batch_repeat_interleave(batch)
    caches = dict.fromkeys(models, cache)
    if "native" in models:
        caches["native"] = as_native(cache)
    if batch > 1:
        # each sequence has tokens of its own, without a shared prefix
        own = LatentCache(plain.config)
        for i, layer in enumerate(cache.layers):
            own.append(layer.keys.clone(), layer.values.clone(), i)
        caches |= {which: own for which in models if which != "native"}
    steps = {which: lambda w=which: decode(models[w], caches[w], tokens) for which in models}
    logits = {which: step().float() for which, step in steps.items()}
    row = {"context": context, "batch": batch}
    for which, x in logits.items():
        # a router near a tie may choose another expert
        error = ((x - logits["plain"]).norm() / logits["plain"].norm()).item()
        assert x.isfinite().all(), f"{which} gives logits that are not finite"
        allowed = 0.1 if which == "int8" else 0.05 if plain.dtype == torch.bfloat16 else 1e-4
        assert error < allowed, f"{which} differs by {error} at {context}"
        row[f"{which}_logits_relative_difference"] = round(error, 7)
    # a token over the shortest context is timed too: the difference is the cost of the cached tokens
    start = filled(plain, SHORTEST, None)
    starts = {f"{which} at {SHORTEST}": lambda w=which: decode(models[w], start, tokens[:1]) for which in OURS}
    turns = steps | yardsticks() | (starts if context > SHORTEST and batch == 1 else {})
    seconds = {name: statistics.median(x) for name, x in alternated(turns, repetitions).items()}
    bandwidth, rate = 8e8 / seconds["read 800 MB"], 2 * 2048**3 / seconds["product of 2048"]
    row |= {f"{which}_milliseconds": round(1e3 * seconds[which], 2) for which in models}
    weights, cached = floor_seconds(plain, context, batch, bandwidth, rate)
    for which in OURS:
        if f"{which} at {SHORTEST}" in seconds:
            growth = (seconds[which] - seconds[f"{which} at {SHORTEST}"]) / cached
            row[f"{which}_growth_over_reading_once"] = round(growth, 2)
    return row | {
        "floor_milliseconds": round(1e3 * (weights + cached), 2),
        "read_once_milliseconds": round(1e3 * cached, 3),
        "read_bytes_per_second": round(bandwidth),
        "float32_flop_per_second": round(rate),
    }


def compared(row: dict) -> dict:
    """Adds ratios to a row."""
    ratios = {}
    if "int8_milliseconds" in row:
        ratios["int8_times_faster_than_kernels"] = round(row["kernels_milliseconds"] / row["int8_milliseconds"], 2)
    for side in OURS:
        own = row[f"{side}_milliseconds"]
        if "native_milliseconds" in row:
            ratios[f"{side}_times_faster_than_native"] = round(row["native_milliseconds"] / own, 2)
        ratios[f"{side}_share_of_floor"] = round(row["floor_milliseconds"] / own, 3)
    return row | ratios


PARTS = {
    "lm_head": r"lm_head",
    "routed experts": r".*mlp\.experts",
    "shared experts": r".*shared_experts",
    "dense layer": r"model\.layers\.0\.mlp",
    "q, kv_a, o": r".*(q_proj|kv_a_proj_with_mqa|o_proj)",
    "router": r".*mlp\.gate",
    "norms": r".*norm",
    "attention as a whole": r".*self_attn",
}


def profiled(model: PreTrainedModel, context: int, tokens: int = 20) -> list[dict]:
    """The median milliseconds that each part takes per token, and the megabytes of weights that it reads."""
    cache, one, spent, handles = filled(model, context, None), torch.tensor([[17]]), {}, []
    megabytes = dict.fromkeys(PARTS, 0.0)
    for name, module in model.named_modules():
        part = next((part for part, pattern in PARTS.items() if re.fullmatch(pattern, name)), None)
        if part is None:
            continue
        share = model.config.num_experts_per_tok / model.config.n_routed_experts if part == "routed experts" else 1
        megabytes[part] += share * sum(parameter.nbytes for parameter in module.parameters()) / 1e6
        began = []
        handles.append(module.register_forward_pre_hook(lambda *_, began=began: began.append(time.perf_counter())))
        handles.append(
            module.register_forward_hook(
                lambda *_, began=began, part=part: spent[part].append(time.perf_counter() - began.pop())
            )
        )
    samples = []
    for _ in range(tokens):
        spent |= {part: [] for part in PARTS}
        total = seconds_of(lambda: decode(model, cache, one))
        samples.append({part: sum(x) for part, x in spent.items()} | {"one token": total})
    for handle in handles:
        handle.remove()
    milliseconds = {part: 1e3 * statistics.median(sample[part] for sample in samples) for part in samples[0]}
    rows = [{"part": part, "milliseconds": round(x, 2)} for part, x in milliseconds.items()]
    return [row | {"megabytes": round(megabytes[row["part"]], 1)} if row["part"] in megabytes else row for row in rows]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096, 16384, 65536, 131072])
    parser.add_argument("--batched", type=int, nargs=2, default=[8, 1024], help="batch and context of one more row")
    parser.add_argument("--native-up-to", type=int, default=16384, help="longer contexts are measured for ours only")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="write the result here as JSON, and a plot beside it")
    options = parser.parse_args()
    models = sides(getattr(torch, options.dtype))
    result = described("python -m benchmarks.decode") | {
        "model": f"Lite-4, {options.dtype}, one token decoded",
        "profile_of_kernels": profiled(models["kernels"], SHORTEST),
        "rows": [],
    }
    cases = [(context, 1) for context in options.contexts] + [tuple(options.batched[::-1])]
    for context, batch in track(cases, "decoding"):
        present = {name: x for name, x in models.items() if name != "native" or context <= options.native_up_to}
        row = measure(present, context, batch, options.repetitions)
        result["rows"].append(compared(row))
        print(json.dumps(result["rows"][-1], indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        draw_beside(options.out, draw_decoding)


if __name__ == "__main__":
    main()
