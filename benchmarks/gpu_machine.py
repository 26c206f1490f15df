"""How long work takes on a CUDA device, and what the device itself can do: copies, products, torch's attention."""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F


def milliseconds(work: Callable[[], object], repetitions: int = 20, warm_up: int = 3) -> float:
    """Median of the time between two events around one call, including what the host does between launches."""
    return alternated_milliseconds({"": work}, repetitions, warm_up)[""]


def alternated_milliseconds(works: dict[str, Callable[[], object]], repetitions: int, warm_up: int) -> dict[str, float]:
    """`milliseconds` of each work; they take turns, so that a machine that gets slower does so for all of them."""
    taken = {name: [] for name in works}
    for turn in range(warm_up + repetitions):
        for name, work in works.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            end.synchronize()
            if turn >= warm_up:
                taken[name].append(begin.elapsed_time(end))
    return {name: statistics.median(x) for name, x in taken.items()}


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
