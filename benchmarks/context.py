"""Time per token against context: python -m benchmarks.context --out benchmarks/results/context.json

Lite-4 in bfloat16, ours and transformers' own class with equal weights, one token decoded over a cache filled with
random latents, the classes in turn in one process. The floor is what this machine cannot beat: reading every weight
and the cache once, or the products over the cache at the float32 rate of a square matrix product, whichever is longer.
Also: what the process holds while 131,072 tokens are cached. The plot lies beside the result file.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from transformers import DynamicCache, PreTrainedModel

from .lite4 import build
from .machine import alternated, described, gemm_rate, read_bandwidth
from .memory import resident
from .quantised_cache import filled

TOKEN = torch.tensor([[17]])


def weight_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that one decoded token reads: all but the embeddings and the experts it is not sent to."""
    config, total = model.config, 0
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            total += parameter.nbytes * config.num_experts_per_tok // config.n_routed_experts
        elif "embed_tokens" not in name:
            total += parameter.nbytes
    return total


def floor_seconds(model: PreTrainedModel, context: int, bandwidth: float, rate: float) -> tuple[float, float]:
    """Seconds that the weights take at any context, and seconds that reading the cache once takes."""
    config = model.config
    elements = config.num_hidden_layers * context * (config.kv_lora_rank + config.qk_rope_head_dim)
    products = 2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    arithmetic = config.num_hidden_layers * context * products / rate
    return weight_bytes_per_token(model) / bandwidth, max(2 * elements / bandwidth, arithmetic)


def decode(model: PreTrainedModel, cache: DynamicCache) -> torch.Tensor:
    logits = model(TOKEN, past_key_values=cache).logits
    cache.crop(-1)
    return logits


def measure(contexts: list[int], native_up_to: int, repetitions: int) -> dict:
    bandwidth, rate = read_bandwidth(), gemm_rate()
    models, rows = {"ours": build("ours"), "native": build("native")}, []
    for context in contexts:
        caches = {"ours": filled(models["ours"], context, None)}
        if context <= native_up_to:
            caches["native"] = DynamicCache()
            for i, layer in enumerate(caches["ours"].layers):
                caches["native"].update(layer.keys.clone(), layer.values.clone(), i)
        steps = {which: lambda w=which, c=cache: decode(models[w], c) for which, cache in caches.items()}
        logits = {which: step().float() for which, step in steps.items()}
        assert all(x.isfinite().all() for x in logits.values())
        row = {"context": context}
        if "native" in logits:
            error = ((logits["ours"] - logits["native"]).norm() / logits["native"].norm()).item()
            assert error < 0.05, f"at {context} tokens the classes differ by {error}"
            row["logits_relative_difference"] = round(error, 5)
        seconds = alternated(steps, repetitions)
        row |= {f"{which}_milliseconds": round(1e3 * statistics.median(x), 2) for which, x in seconds.items()}
        weights, cached = floor_seconds(models["ours"], context, bandwidth, rate)
        row |= {
            "floor_milliseconds": round(1e3 * (weights + cached), 2),
            "read_once_milliseconds": round(1e3 * cached, 3),
        }
        rows.append(row)
        print(row)
    return {
        "model": "Lite-4, bfloat16, batch 1, one token decoded",
        "read_bytes_per_second": round(bandwidth),
        "float32_flop_per_second": round(rate),
        "rows": rows,
    }


def hold(tokens: int) -> dict:
    """Decodes 16 tokens after `tokens` cached ones; how far the process grew while they were cached and decoded."""
    model = build("ours")
    decode(model, filled(model, 64, None))
    before = resident("VmRSS")
    cache = filled(model, tokens, None)
    after_filling = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(16):
        logits = model(TOKEN, past_key_values=cache).logits
    assert logits.isfinite().all()
    return {
        "tokens": tokens,
        "cache_bytes": cache.nbytes,
        "growth_while_cached_bytes": after_filling - before,
        "further_peak_while_decoding_bytes": resident("VmHWM") - after_filling,
    }


def plot(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    rows = result["rows"]
    for name, label in (("native", "transformers' own class"), ("ours", "deepseek-latent"), ("floor", "floor")):
        points = [(row["context"], row[f"{name}_milliseconds"]) for row in rows if f"{name}_milliseconds" in row]
        axes.plot(*zip(*points), "--" if name == "floor" else "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="milliseconds per decoded token")
    axes.set_xscale("log", base=2)
    axes.set_title(f"{result['model']}, {result['threads']} threads", fontsize=9)
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096, 16384, 65536, 131072])
    parser.add_argument("--native-up-to", type=int, default=16384, help="longer contexts are measured for ours only")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result here as JSON, and a plot beside it")
    options = parser.parse_args()
    held = hold(131072)
    print(held)
    result = described("python -m benchmarks.context") | {"held": held}
    result |= measure(options.contexts, options.native_up_to, options.repetitions)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        plot(result, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
