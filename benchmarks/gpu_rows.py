"""Measures the Triton kernels of norms, cached rows and the router on a GPU, next to what the modules do in torch.

    python -m benchmarks.gpu_rows [--quick]

Every time is that of one of 20 calls in a CUDA graph, after other data has filled the L2 cache. Each call has its own
weights, which come from memory as in a model; few tokens are shared by all calls, so they come from the cache.
"""

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from deepseek_latent import DeepseekV2Config
from deepseek_latent.attention.rotary import rotate
from deepseek_latent.cache.format import latent_format
from deepseek_latent.experts.router import DeepseekV2MoEGate
from deepseek_latent.kernels.gpu.triton_norm import add_rms_norm
from deepseek_latent.kernels.gpu.triton_router import choose, route, router_logits
from deepseek_latent.kernels.gpu.triton_write import norm_rotate_write

CALLS = 20
REPLAYS = 15
EPS = 1e-6
# total bytes of the input sets that calls alternate between, several times the size of any L2 cache
BYTES_OF_ALL_SETS = 300e6
MODELS = {
    "Lite": {"d": 2048, "h": 16, "e": 64, "n_group": 1, "topk_group": 1, "scale": 1.0},
    "V2": {"d": 5120, "h": 128, "e": 160, "n_group": 8, "topk_group": 3, "scale": 16.0},
}
N, R, C, K = 128, 64, 512, 6


def run(quick: bool) -> list[dict]:
    tokens = (1, 64) if quick else (1, 8, 64, 4096)
    rows = []
    for (model, widths), m in itertools.product(MODELS.items(), tokens):
        for case in (add_norm, norm_rotate, routing, chain):
            try:
                rows += [{"model": model, "m": m} | row for row in case(m, **widths)]
            except Exception as error:
                rows.append({"model": model, "m": m, "kernel": case.__name__, "error": f"{error!r:.500}"})
            torch.cuda.empty_cache()
    return rows


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Median time of one of these calls, in a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for start, end in events:
        filler().zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3 / len(calls)


@functools.cache
def filler() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def row(kernel: str, by: str, call: Callable, sets: list[tuple], num_bytes: int, error: Callable | None) -> dict:
    """The time of one call; `error` is called first, and gives the error of the result on the first set."""
    result = {"kernel": kernel, "by": by, "bytes": num_bytes}
    try:
        if error is not None:
            result["relative_error"] = error(call)
        calls = [partial(call, *inputs) for inputs, _ in zip(itertools.cycle(sets), range(CALLS))]
        time = microseconds(calls)
    except Exception as failure:
        return result | {"error": f"{failure!r:.500}"}
    return result | {"us": round(time, 2), "GB/s": round(num_bytes / time / 1e3, 1)}


def relative(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def sets_of(make: Callable[[], tuple], num_bytes: int) -> list[tuple]:
    """As many sets of inputs (4 to 20) as fill the L2 cache several times."""
    return [make() for _ in range(int(min(max(BYTES_OF_ALL_SETS // num_bytes, 4), CALLS)))]


def add_norm(m: int, *, d: int, **_) -> Iterator[dict]:
    num_bytes = 2 * (4 * m * d + d)
    shared = normal(m, d), normal(m, d)
    sets = sets_of(lambda: (*(shared if m <= 64 else (normal(m, d), normal(m, d))), 1 + 0.1 * normal(d)), num_bytes)

    def error(call) -> float:
        x, residual, weight = sets[0]
        total, normed = call(x, residual, weight)
        exact = nn.functional.rms_norm((x + residual).double(), (d,), weight.double(), EPS)
        return max(relative(normed, exact), relative(total, x + residual))

    def plain(x, residual, weight):
        total = x + residual
        return total, nn.functional.rms_norm(total, (d,), weight, EPS)

    yield row("add_rms_norm", "torch", plain, sets, num_bytes, error)
    yield row("add_rms_norm", "ours", partial(add_rms_norm, eps=EPS), sets, num_bytes, error)


def norm_rotate(m: int, *, h: int, **_) -> Iterator[dict]:
    b, s = (1, m) if m > 64 else (m, 1)
    capacity = max(2 * s, 1024)
    start = torch.tensor(capacity // 2 - 3, device="cuda")
    angles = torch.rand(1, s, R // 2, device="cuda") * 100
    cos, sin = angles.cos(), angles.sin()
    num_bytes = 2 * m * (2 * h * R + 2 * (C + R)) + 4 * s * R
    shared = normal(b, s, h, N + R), normal(b, s, C + R)

    def make() -> tuple:
        inputs = shared if m <= 64 else (normal(b, s, h, N + R), normal(b, s, C + R))
        return *inputs, 1 + 0.1 * normal(C)

    sets = sets_of(make, num_bytes)
    for bits in (None, 8, 4):
        format = latent_format(bits and f"int{bits}", C, R, torch.bfloat16)
        buffer = torch.zeros(b, capacity, format.row_width, device="cuda", dtype=format.storage_dtype)

        def plain(queries, compressed, weight, format=format, buffer=buffer):
            latent, key = compressed.split((C, R), dim=-1)
            rows = format.encode(nn.functional.rms_norm(latent, (C,), weight, EPS), rotate(key, cos, sin))
            buffer.index_copy_(1, start + torch.arange(s, device="cuda"), rows)
            return rotate(queries[..., N:], cos, sin)

        def error(call, format=format, buffer=buffer) -> float:
            """Error of queries and rows; a code may differ by one if the norm was rounded the other way."""
            queries, compressed, weight = (x.clone() for x in sets[0])
            turned = rotate(queries[..., N:].double(), cos.double(), sin.double())
            latent = nn.functional.rms_norm(compressed[..., :C].double(), (C,), weight.double(), EPS)
            key = rotate(compressed[..., C:].double(), cos.double(), sin.double())
            rows = format.encode(latent.bfloat16(), key.bfloat16())
            result = call(queries, compressed, weight)
            written = buffer[:, capacity // 2 - 3 :][:, :s]
            rows, written = (format.decode(x, torch.float32) for x in (rows, written))
            return max(relative(queries[..., N:] if result is None else result, turned), relative(written, rows))

        name = f"norm_rotate_write bits={bits}"
        yield row(name, "torch", plain, sets, num_bytes, error)

        def ours(queries, compressed, weight, bits=bits, buffer=buffer):
            norm_rotate_write(queries, compressed, weight, EPS, cos, sin, buffer, start, bits=bits)

        yield row(name, "ours", ours, sets, num_bytes, error)


def routing(m: int, *, d: int, e: int, n_group: int, topk_group: int, scale: float, **_) -> Iterator[dict]:
    config = DeepseekV2Config(
        hidden_size=d,
        n_routed_experts=e,
        num_experts_per_tok=K,
        topk_method="group_limited_greedy" if n_group > 1 else "greedy",
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=False,
        routed_scaling_factor=scale,
    )
    module = DeepseekV2MoEGate(config).to("cuda", torch.bfloat16).requires_grad_(False)
    num_bytes = 2 * (m * d + e * d) + m * (4 * e + 12 * K)
    shared = normal(m, d)
    sets = sets_of(lambda: (shared if m <= 64 else normal(m, d), 0.02 * normal(e, d)), num_bytes)

    def plain(x, weight):
        module.weight.data = weight
        return module(x)

    def error(call) -> float:
        """Error of logits and weights; infinite if other experts are chosen for more than 0.1 % of the choices."""
        x, weight = sets[0]
        logits, weights, experts = call(x, weight)
        expected, order = module.choose(logits)[0].sort(dim=-1), weights.sort(dim=-1)
        is_same = module.choose(logits)[1].sort(dim=-1).values == experts.sort(dim=-1).values
        if is_same.float().mean() < 0.999:
            return float("inf")
        return max(relative(logits, x.double() @ weight.double().T), relative(order.values, expected.values))

    options = {"k": K, "n_group": n_group, "topk_group": topk_group, "normalize": False, "scaling_factor": scale}
    yield row("route", "torch", plain, sets, num_bytes, error)
    yield row("route", "ours", partial(route, **options), sets, num_bytes, error)

    def error_of_logits(call) -> float:
        x, weight = sets[0]
        return relative(call(x, weight), x.double() @ weight.double().T)

    def plain_logits(x, weight):
        return nn.functional.linear(x.float(), weight.float())

    yield row("router_logits", "torch", plain_logits, sets, num_bytes, error_of_logits)
    yield row("router_logits", "ours", router_logits, sets, num_bytes, error_of_logits)
    logits = [(normal(m, e).float(),) for _ in range(4)]
    yield row("choose", "torch", module.choose, logits, m * (4 * e + 12 * K), None)
    yield row("choose", "ours", partial(choose, **options), logits, m * (4 * e + 12 * K), None)


def chain(m: int, *, d: int, h: int, e: int, n_group: int, topk_group: int, scale: float, **_) -> Iterator[dict]:
    """All three kernels in sequence; each reads what the one before it wrote."""
    b, s = (1, m) if m > 64 else (m, 1)
    angles = torch.rand(1, s, R // 2, device="cuda") * 100
    cos, sin = angles.cos(), angles.sin()
    weights = [(1 + 0.1 * normal(d), 0.02 * normal(e, d), 1 + 0.1 * normal(C)) for _ in range(CALLS)]
    start = torch.tensor(0, device="cuda")
    x, residual, queries = normal(m, d), normal(m, d), normal(b, s, h, N + R)
    choice = {"k": K, "n_group": n_group, "topk_group": topk_group, "normalize": False, "scaling_factor": scale}
    state, rows = [x, residual], torch.zeros(b, s, C + R, device="cuda", dtype=torch.bfloat16)

    def layer(norm, router, latent_norm):
        total, normed = add_rms_norm(*state, norm, EPS)
        route(normed, router, **choice)
        norm_rotate_write(queries, normed.view(b, s, d)[..., : C + R], latent_norm, EPS, cos, sin, rows, start)
        state[:] = total, normed

    yield row("chain of three", "ours", layer, weights, 0, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    for result in run(parser.parse_args().quick):
        print(json.dumps(result))


if __name__ == "__main__":
    main()
