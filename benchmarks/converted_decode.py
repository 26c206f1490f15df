"""Times a Llama against its exact conversion: python -m benchmarks.converted_decode LLAMA_FOLDER --out FILE

A Llama of transformers (sdpa, DynamicCache) and the result of `convert gqa-to-mla` decode one token over the same
random keys and values: the converted model in plain torch, and after `optimize_for_inference`. Their logits are
compared. Then they are timed in turn in one process, so that other load on the machine affects all of them, and ratios
of medians are reported. `--shapes` prints parameters of attention per layer for well-known shapes, by arithmetic alone.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from deepseek_latent import LatentCache, optimize_for_inference
from deepseek_latent.compat.cache_name import CACHE
from deepseek_latent.configuration_deepseek_v2 import DeepseekV2Config
from deepseek_latent.conversion.compression_report import build_model
from deepseek_latent.conversion.gqa_to_mla import CONTENT_WIDTH, GqaToMla, _width_with_constant, interleave
from deepseek_latent.conversion.source import Source

from .lite4 import twin
from .machine import alternated, described, report

# d, h, g, w, layers, inner width, vocabulary, whether embeddings are tied, whether queries have biases
SHAPES = {
    "SmolLM2-135M": (576, 9, 3, 64, 30, 1536, 49152, True, False),
    "Llama-3.2-1B": (2048, 32, 8, 64, 16, 8192, 128256, True, False),
    "Qwen2.5-7B": (3584, 28, 4, 128, 28, 18944, 152064, False, True),
    "Mistral-7B": (4096, 32, 8, 128, 32, 14336, 32768, False, False),
}


def attention_parameters(d: int, h: int, g: int, w: int, *, n: int, r: int, c: int, a: int | None) -> dict[str, int]:
    """Weights per layer of the source, and of a conversion with these widths."""
    queries = d * h * (n + r) if a is None else d * a + a * h * (n + r)
    return {
        "source": 2 * d * h * w + 2 * d * g * w,
        "q": queries,
        "kv_a": d * (c + r),
        "kv_b": c * h * (n + w),
        "o": h * w * d,
        "read by a token": queries - d * h * (n + r - w) if a is None else d * a + a * h * w,
    }


def shapes() -> dict[str, dict]:
    """Parameters of attention per layer, of the whole model, and cache per token and layer, for every shape."""
    rows = {}
    for name, (d, h, g, w, layers, inner, vocabulary, is_tied, has_bias) in SHAPES.items():
        exact = {"n": CONTENT_WIDTH, "r": g * w, "c": _width_with_constant(g * w)}
        exact["a"] = _width_with_constant(d) if has_bias else None
        half = g * w // 4
        kinds = {
            "exact": exact,
            "bias-free": exact | {"c": d},
            "compressed to half": {"n": w, "r": half, "c": g * w - half, "a": exact["a"]},
        }
        outside = vocabulary * d * (1 if is_tied else 2) + layers * 3 * d * inner
        for kind, widths in kinds.items():
            # queries with biases need one in the result
            if has_bias and kind == "bias-free":
                continue
            counts = attention_parameters(d, h, g, w, **widths)
            new = sum(counts[part] for part in ("q", "kv_a", "kv_b", "o"))
            before = outside + layers * counts["source"]
            rows[f"{name}, {kind}"] = counts | {
                "result": new,
                "model": outside + layers * new,
                "model over its source": round((outside + layers * new) / before, 2),
                "cache over the source's": round((widths["c"] + widths["r"]) / (2 * g * w), 2),
            }
    return rows


def decode(model: PreTrainedModel, cache: Cache, token: Tensor) -> Tensor:
    logits = model(token, **{CACHE: cache}).logits
    cache.crop(-1)
    return logits


def fill_alike(cache: DynamicCache, latents: LatentCache, config: DeepseekV2Config, dtype: torch.dtype, t: int) -> None:
    """Puts the same random keys and values of t tokens into the cache of a source without biases and into its result's.

    Keys are rotated already; the result has them in DeepSeek's order. The constant channel is 0 after its norm.
    """
    generator, w = torch.Generator().manual_seed(0), config.v_head_dim
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, 1, config.qk_rope_head_dim // w, t, w, generator=generator) * 0.1
        cache.update(keys.to(dtype), values.to(dtype), layer)
        rotary, latent = (
            x.transpose(1, 2).flatten(2) for x in (interleave(keys.movedim(-1, 0)).movedim(0, -1), values)
        )
        latent = torch.nn.functional.pad(latent, (0, config.kv_lora_rank - latent.shape[-1]))
        latents.append(latent[:, None].to(dtype), rotary[:, None].to(dtype), layer)


def measure(
    models: dict[str, PreTrainedModel], contexts: list[int], repetitions: int, clock: Callable[[], float]
) -> list[dict]:
    rows, token, config = [], torch.tensor([[17]]), models["kernels"].config
    for context in track(contexts, "decoding"):
        latents, cache = LatentCache(config), DynamicCache(config=models["llama"].config)
        fill_alike(cache, latents, config, models["llama"].dtype, context)
        caches = {name: cache if name == "llama" else latents for name in models}
        turns: dict[str, Callable] = {name: partial(decode, models[name], caches[name], token) for name in models}
        logits = {name: turn().double() for name, turn in turns.items()}
        row = {"context": context}
        for name in ("plain", "kernels"):
            error = ((logits[name] - logits["llama"]).abs().max() / logits["llama"].abs().max()).item()
            assert error < 1e-4, f"{name} differs by {error} at {context}"
            row[f"{name}_logits_relative_difference"] = float(f"{error:.2g}")
        seconds = {name: statistics.median(x) for name, x in alternated(turns, repetitions, clock=clock).items()}
        row |= {f"{name}_milliseconds": round(1e3 * x, 2) for name, x in seconds.items()}
        row |= {f"{name}_over_llama": round(seconds[name] / seconds["llama"], 3) for name in ("plain", "kernels")}
        rows.append(row)
        print(json.dumps(row))
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?", help="a folder with a Llama")
    parser.add_argument("--shapes", action="store_true", help="only print the parameters of well-known shapes")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine: only what this process got")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    if options.shapes:
        report(described("python -m benchmarks.converted_decode --shapes") | {"rows": shapes()}, options.out)
        return
    if options.source is None:
        parser.error("name a folder with a Llama, or --shapes")
    if options.processor_time and torch.get_num_threads() > 1:
        parser.error("--processor-time adds up the time of all threads; set OMP_NUM_THREADS=1")
    clock = time.process_time if options.processor_time else time.perf_counter
    # in bfloat16, random keys and values amplify rounding so much that logits could not be compared
    dtype = torch.float32
    plain = build_model(GqaToMla(Source(options.source))).to(dtype)
    models = {"llama": AutoModelForCausalLM.from_pretrained(options.source, dtype=dtype).eval(), "plain": plain}
    models["kernels"] = twin(plain)
    print(optimize_for_inference(models["kernels"]))
    result = described("python -m benchmarks.converted_decode LLAMA_FOLDER") | {
        "model": f"{options.source.name}, float32, one token decoded",
        "parameters": {name: sum(x.numel() for x in model.parameters()) for name, model in models.items()},
        "bytes": {name: sum(x.nbytes for x in model.parameters()) for name, model in models.items()},
        "clock": clock.__name__,
        "rows": measure(models, options.contexts, options.repetitions, clock),
    }
    report(result, options.out)


if __name__ == "__main__":
    main()
