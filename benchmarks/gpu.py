"""Measures the package on a CUDA device: python -m benchmarks.gpu --out FOLDER [--parts machine decode ...]

DeepSeek-V2-Lite at full size with random weights made on the device (31 GB in bfloat16), next to transformers' own
class on the same weights; logits are compared before anything is timed. Each part writes `gpu-<part>.json` when it is
done; a part that fails writes its error there, and the other parts go on. `make gpu` first runs the
tests on the device.
"""

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel

from deepseek_latent import LatentCache, pack_experts
from deepseek_latent.compat.cache_name import CACHE
from deepseek_latent.kernels import optimize_for_inference

from .decode import as_native, weight_bytes_per_token
from .expert_lora import LAYERS, LORA
from .gpu_machine import alternated_milliseconds, copy_bandwidth, launches, machine, milliseconds
from .lite4 import build, twin
from .machine import described
from .plots import draw_beside
from .plots.speed import draw_gpu_decoding
from .train import adapted

LITE = {"num_hidden_layers": 27}
# a prompt that is read in chunks, and the tokens of one chunk
LONG_PROMPT, CHUNK = 131072, 4096


def random_cache(model: PreTrainedModel, batch: int, tokens: int, cache_dtype: str | None = None) -> LatentCache:
    """Random latents of unit variance, as after their norm."""
    config, cache = model.config, LatentCache(model.config, cache_dtype=cache_dtype)
    widths = config.kv_lora_rank, config.qk_rope_head_dim
    for layer in range(config.num_hidden_layers):
        cache.append(*(torch.randn(batch, 1, tokens, w, device="cuda", dtype=model.dtype) for w in widths), layer)
    return cache


def static(cache: LatentCache, model: PreTrainedModel, room: int = 64) -> LatentCache:
    length = cache.get_seq_length()
    fixed = LatentCache(model.config, cache_dtype=cache.cache_dtype, max_cache_len=length + room)
    for i, layer in enumerate(cache.layers):
        fixed.append(layer.keys, layer.values, i)
    return fixed


def stepping(name: str, model: PreTrainedModel, cache: DynamicCache, tokens: Tensor) -> Callable[[], Tensor]:
    """Decodes one token; where cropping takes no launches, it is removed from the cache again."""
    call = model.get_compiled_call(None) if name == "graphs" else model

    def step() -> Tensor:
        logits = call(input_ids=tokens, **{CACHE: cache}).logits
        if name != "graphs":
            cache.crop(-1)
        return logits

    return step


def bytes_per_step(model: PreTrainedModel, batch: int, tokens: int) -> int:
    """The fewest bytes that one step reads: the weights it needs, once, and the cache, once."""
    config = model.config
    row = (config.kv_lora_rank + config.qk_rope_head_dim) * model.dtype.itemsize
    return weight_bytes_per_token(model, batch) + batch * tokens * config.num_hidden_layers * row


@torch.inference_mode()
def decode(models: dict[str, PreTrainedModel], bandwidth: float) -> list[dict]:
    rows, plain = [], models["ours"]
    for batch, context in ((1, 128), (1, 1024), (1, 32768), (1, 131072), (8, 8192), (64, 4096)):
        cache = random_cache(plain, batch, context)
        tokens = torch.arange(17, 17 + batch, device="cuda")[:, None]
        row = {"batch": batch, "context": context}
        row["floor_milliseconds"] = round(1e3 * bytes_per_step(plain, batch, context) / bandwidth, 2)
        exact, steps = None, {}
        for name, model in models.items():
            # transformers' class expands every cached token, 30 KB each
            if name == "native" and batch * context > 65536:
                continue
            own = as_native(cache) if name == "native" else static(cache, plain) if name == "graphs" else cache
            steps[name] = stepping(name, model, own, tokens)
            logits = steps[name]().float()
            exact = logits if exact is None else exact
            row[f"{name}_logits_relative_difference"] = round(((logits - exact).norm() / exact.norm()).item(), 5)
        for name, taken in alternated_milliseconds(steps, 15, 2).items():
            row[f"{name}_milliseconds"] = round(taken, 2)
            if context == 1024 and batch == 1:
                row[f"{name}_launches"] = launches(steps[name])
        rows.append(row)
        print(json.dumps(row), flush=True)
        del cache, own, steps
        torch.cuda.empty_cache()
    return rows


@torch.inference_mode()
def kernels(model: PreTrainedModel) -> list[dict]:
    """The kernels that take the time of one replayed step."""
    rows = []
    for batch, context in ((1, 1024), (64, 4096)):
        cache = static(random_cache(model, batch, context), model)
        tokens = torch.arange(17, 17 + batch, device="cuda")[:, None]
        step = stepping("graphs", model, cache, tokens)
        for _ in range(3):
            step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        spent = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
        row = {"batch": batch, "context": context}
        row["kernels"] = [[e.key[:60], e.count, round(e.self_device_time_total)] for e in spent[:24]]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def generate(models: dict[str, PreTrainedModel]) -> list[dict]:
    rows = []
    for name, model in models.items():
        rows.append(per_token(name, model))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def compiled() -> list[dict]:
    """`generate()` of four layers next to transformers' class over a static cache, compiled as by default."""
    ours = build("ours", device="cuda")
    native = build("native", torch.bfloat16, ours, device="cuda")
    compiles = {"cache_implementation": "static", "compile_config": CompileConfig()}
    rows = [per_token("native", native), per_token("native, static and compiled", native, **compiles)]
    optimize_for_inference(ours, graphs=True)
    rows.append(per_token("graphs", ours))
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def packed() -> list[dict]:
    """Replayed steps of `generate()` of four layers, with routed experts in 16, 8 and 4 bits."""
    rows = []
    for bits in (16, 8, 4):
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = build("ours", device="cuda")
        if bits < 16:
            pack_experts(model, bits)
        weights = torch.cuda.memory_allocated() - before
        optimize_for_inference(model, graphs=True)
        rows.append(per_token(f"experts in {bits} bits", model) | {"gigabytes_of_weights": round(weights / 1e9, 2)})
        print(json.dumps(rows[-1]), flush=True)
        del model
    return rows


def generating(model: PreTrainedModel, ids: Tensor, tokens: int, **options) -> Callable[[], object]:
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lambda: model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **given, **options)


def seconds_of(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def per_token(name: str, model: PreTrainedModel, prompt: int = 1024, new: int = 32, **options) -> dict:
    """Milliseconds per token of `generate()` after the prompt, everything included, and seconds of the first call."""
    ids = torch.arange(prompt, device="cuda")[None]
    works = [generating(model, ids, tokens, **options) for tokens in (new, 2 * new)]
    first = seconds_of(works[0])
    works[1]()
    short, long = (min(seconds_of(work) for _ in range(2)) for work in works)
    row = {"side": name, "first_call_seconds": round(first, 2)}
    return row | {"milliseconds_per_token": round(1e3 * (long - short) / new, 2)}


def time_and_memory(read: Callable[[], object], repetitions: int) -> tuple[float, float]:
    """Milliseconds of a call, and gigabytes that it takes at its peak, its cache included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken = milliseconds(read, repetitions, 1)
    return round(taken, 1), round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)


@torch.inference_mode()
def prefill(models: dict[str, PreTrainedModel]) -> list[dict]:
    rows = []
    for tokens in (512, 8192, 32768):
        ids, row = torch.arange(tokens, device="cuda")[None] % 100_000, {"tokens": tokens}
        for name, model in models.items():
            found = time_and_memory(partial(model, ids, use_cache=True, logits_to_keep=1), 3)
            row[f"{name}_milliseconds"], row[f"{name}_peak_gigabytes_over_weights"] = found
        rows.append(row)
        print(json.dumps(row), flush=True)
    rows.append(chunked_prefill(models["ours"]))
    print(json.dumps(rows[-1]), flush=True)
    return rows


def chunked_prefill(model: PreTrainedModel) -> dict:
    """A prompt that `generate()` reads in chunks, by this package only."""
    ids, config = torch.arange(LONG_PROMPT, device="cuda")[None] % 100_000, model.config
    taken, peak = time_and_memory(generating(model, ids, 1, prefill_chunk_size=CHUNK), 1)
    num_bytes = LONG_PROMPT * config.num_hidden_layers * config.cached_width * model.dtype.itemsize
    row = {"tokens": LONG_PROMPT, "chunk": CHUNK, "cache_gigabytes": round(num_bytes / 1e9, 2)}
    return row | {"ours_milliseconds": taken, "ours_peak_gigabytes_over_weights": peak}


def lora(tokens: int = 4096) -> list[dict]:
    """A training step with LoRA on all routed experts, by this package and by stock peft on transformers' own class."""
    ours = build("ours", device="cuda", **LAYERS)
    models = {"native": build("native", weights=ours, device="cuda", **LAYERS), "ours": ours}
    ids, rows, losses = torch.randint(0, 1024, (1, tokens), device="cuda"), [], []
    for name, model in models.items():
        model = adapted(model, LORA).train()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

        def step(model=model) -> Tensor:
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            return loss

        losses.append(step().item())
        taken = milliseconds(step, 5, 2)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        rows.append({"side": name, "milliseconds": round(taken, 1), "peak_gigabytes_over_weights": round(peak, 2)})
        print(json.dumps(rows[-1]), flush=True)
    assert abs(losses[0] - losses[1]) < 2e-2 * losses[0], f"losses differ: {losses}"
    return rows


PARTS = ("machine", "decode", "kernels", "generate", "prefill", "lora", "compiled", "packed")
# parts that do not measure the model at full size
WITHOUT_LITE = ("machine", "lora", "compiled", "packed")


def sides() -> dict[str, PreTrainedModel]:
    """The model of each side; all of them share one copy of the weights."""
    plain = build("ours", torch.bfloat16, device="cuda", **LITE)
    optimized, graphs = twin(plain), twin(plain)
    print(optimize_for_inference(optimized), optimize_for_inference(graphs, graphs=True))
    native = build("native", torch.bfloat16, plain, device="cuda", **LITE)
    return {"ours": plain, "optimized": optimized, "graphs": graphs, "native": native}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result files")
    options = parser.parse_args()
    header = described(f"python -m benchmarks.gpu --parts {' '.join(options.parts)}")
    models: dict[str, PreTrainedModel] = {}
    for part in options.parts:
        began, result = time.perf_counter(), dict(header)
        try:
            if part in WITHOUT_LITE:
                models.clear()
                gc.collect()
            elif not models:
                models = sides()
            if part == "machine":
                result |= machine()
            elif part == "decode":
                result["rows"] = decode(models, copy_bandwidth())
            elif part == "kernels":
                result["rows"] = kernels(models["graphs"])
            elif part == "generate":
                result["rows"] = generate(models)
            elif part == "lora":
                result["rows"] = lora()
            elif part == "compiled":
                result["rows"] = compiled()
            elif part == "packed":
                result["rows"] = packed()
            else:
                result["rows"] = prefill({name: models[name] for name in ("ours", "native")})
        except Exception:
            result["error"] = traceback.format_exc()
            print(result["error"], flush=True)
        result["seconds"] = round(time.perf_counter() - began, 1)
        file = options.out / f"gpu-{part}.json"
        file.write_text(json.dumps(result, indent=2) + "\n")
        if part == "decode" and "error" not in result:
            draw_beside(file, draw_gpu_decoding)
        print(part, result["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
