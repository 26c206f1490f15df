"""Measures the package on a CUDA device: python -m benchmarks.gpu --out FOLDER [--parts machine decode ...]

DeepSeek-V2-Lite at full size with random weights made on the device (31 GB in bfloat16), next to transformers' own
class on the same weights; logits are compared before anything is timed. Each part writes `gpu-<part>.json` when it is
done; a part that fails writes its error there, and the other parts go on. `make gpu` first runs the
tests on the device.
"""

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from deepseek_latent import LatentCache
from deepseek_latent.compat.cache_name import CACHE
from deepseek_latent.kernels import optimize_for_inference

from .decode import as_native, weight_bytes_per_token
from .expert_lora import LAYERS, LORA
from .lite4 import build, twin
from .machine import described
from .plots import draw_beside
from .plots.speed import draw_gpu_decoding
from .train import adapted

LITE = {"num_hidden_layers": 27}


def milliseconds(work: Callable[[], object], repetitions: int = 20, warm_up: int = 3) -> float:
    """Median of the time between two events around one call, including what the host does between launches."""
    for _ in range(warm_up):
        work()
    taken = []
    for _ in range(repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def graphed_milliseconds(work: Callable[[], object], calls: int = 10, repetitions: int = 10) -> float:
    """Median time of one call in a captured graph of several calls, where launches take less time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    return milliseconds(graph.replay, repetitions) / calls


def launches(work: Callable[[], object]) -> dict[str, int]:
    """Counts the kernels and copies that one call starts on the device, and how often the host waits for it."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        work()
        torch.cuda.synchronize()
    events = profile.events()
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    waits = sum("Synchronize" in e.name for e in events) - 1
    return {
        "kernels": len(on_device),
        "waits": waits,
        "busy_microseconds": round(sum(e.device_time for e in on_device)),
    }


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 4 GB."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source)) / 1e3)


def machine() -> dict:
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    result = {
        "copy_bytes_per_second": round(copy_bandwidth()),
        "bf16_product_flop_per_second": round(2 * 8192**3 / (milliseconds(lambda: square @ square) / 1e3)),
        "attention_backends": attention_backends(),
        "products_of_one_row": [product_of_rows(1, n, k) for n, k in PROJECTIONS],
        "products_of_eight_rows": [product_of_rows(8, n, k) for n, k in PROJECTIONS],
    }
    return result


# out and in widths: q, kv_a, o, lm_head, gate of the dense layer and its down
PROJECTIONS = [(3072, 2048), (576, 2048), (2048, 2048), (102400, 2048), (10944, 2048), (2048, 10944)]


def product_of_rows(m: int, n: int, k: int) -> dict:
    weights = [
        torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, 200_000_000 // (2 * n * k)))
    ]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    taken = graphed_milliseconds(lambda: [F.linear(x, w) for w in weights], calls=1) / len(weights)
    return {"rows": m, "out": n, "in": k, "microseconds": round(1e3 * taken, 2), "GB/s": round(2 * n * k / taken / 1e6)}


def attention_backends() -> list[dict]:
    """The backend that torch picks for our shapes, and how long it takes."""
    rows = []
    for name, (b, h, s, t, qk, v, masked) in {
        "prefill 192/128": (1, 16, 4096, 4096, 192, 128, False),
        "prefill 192/192, padded values": (1, 16, 4096, 4096, 192, 192, False),
        "prefill 192/128 with a mask": (1, 16, 2048, 4096, 192, 128, True),
        "prefill 192/192, padded values, with a mask": (1, 16, 2048, 4096, 192, 192, True),
        "absorbed 576/512": (1, 1, 16, 32768, 576, 512, False),
    }.items():
        q, k = (torch.randn(b, h, n, qk, device="cuda", dtype=torch.bfloat16) for n in (s, t))
        value = torch.randn(b, h, t, v, device="cuda", dtype=torch.bfloat16)
        mask = torch.ones(s, t, device="cuda", dtype=torch.bool).tril(t - s)[None, None] if masked else None
        causal = not masked and s == t
        choice = torch._fused_sdp_choice(q, k, value, mask, 0.0, causal)
        taken = milliseconds(lambda: F.scaled_dot_product_attention(q, k, value, mask, is_causal=causal))  # noqa: B023
        rows.append(
            {"case": name, "backend": torch.nn.attention.SDPBackend(choice).name, "milliseconds": round(taken, 3)}
        )
    return rows


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
    """Decodes one token, and removes it from the cache again."""
    call = model.get_compiled_call(None) if name == "graphs" else model

    def step() -> Tensor:
        logits = call(input_ids=tokens, **{CACHE: cache}).logits
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
        exact = None
        for name, model in models.items():
            # transformers' class expands every cached token, 30 KB each
            if name == "native" and batch * context > 65536:
                continue
            own = as_native(cache) if name == "native" else static(cache, plain) if name == "graphs" else cache
            one = stepping(name, model, own, tokens)
            logits = one().float()
            exact = logits if exact is None else exact
            row[f"{name}_logits_relative_difference"] = round(((logits - exact).norm() / exact.norm()).item(), 5)
            row[f"{name}_milliseconds"] = round(milliseconds(one, 10, 2), 2)
            if context == 1024 and batch == 1:
                row[f"{name}_launches"] = launches(one)
            del own, one
        rows.append(row)
        print(json.dumps(row), flush=True)
        del cache
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


@torch.inference_mode()
def generate(models: dict[str, PreTrainedModel], prompt: int = 1024, new: int = 32) -> list[dict]:
    """Milliseconds per token of `generate()` after the prompt, everything included, and seconds of the first call."""
    ids, rows = torch.arange(prompt, device="cuda")[None], []
    for name, model in models.items():
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

        def seconds(tokens: int, model=model, options=options) -> float:
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, **options
            )
            torch.cuda.synchronize()
            return time.perf_counter() - began

        first = seconds(2)
        short, long = (min(seconds(tokens) for _ in range(2)) for tokens in (2, 2 + new))
        rows.append(
            {
                "side": name,
                "first_call_seconds": round(first, 2),
                "milliseconds_per_token": round(1e3 * (long - short) / new, 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


@torch.inference_mode()
def prefill(models: dict[str, PreTrainedModel]) -> list[dict]:
    rows = []
    for tokens in (512, 8192, 32768):
        ids, row = torch.arange(tokens, device="cuda")[None] % 100_000, {"tokens": tokens}
        for name, model in models.items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()

            def read(model=model, ids=ids) -> None:
                model(ids, use_cache=True, logits_to_keep=1)

            row[f"{name}_milliseconds"] = round(milliseconds(read, 3, 1), 1)
            row[f"{name}_peak_gigabytes_over_weights"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


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


PARTS = ("machine", "decode", "kernels", "generate", "prefill", "lora")


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
            if part not in ("machine", "lora") and not models:
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
                models.clear()
                gc.collect()
                result["rows"] = lora()
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
