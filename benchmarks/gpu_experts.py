"""Measures the chosen experts of few tokens and a dense MLP on a GPU: our kernels next to torch's.

The weights of several layers are used in turn, as in a model, so that none is found in the GPU's cache. Times are those
of replayed CUDA graphs.
"""

import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_latent.experts.codec import Packed, pack
from deepseek_latent.experts.products import grouped_product, routed_sum
from deepseek_latent.kernels.gpu import triton_experts
from deepseek_latent.kernels.gpu.triton_experts import Plan
from deepseek_latent.kernels.gpu.triton_tiles import Tiles

# DeepSeek-V2-Lite
D, INNER, E, K, SHARED = 2048, 1408, 64, 6, 2816
DENSE = 10944
LAYERS = 4
VECTOR_INNER = [
    Tiles(2, 2048, 4, 1),
    Tiles(1, 2048, 4, 1),
    Tiles(1, 2048, 2, 1),
    Tiles(2, 2048, 2, 1),
    Tiles(4, 2048, 8, 1),
    Tiles(4, 2048, 4, 1),
]
VECTOR_OUTER = [
    Tiles(8, 512, 4, 4),
    Tiles(4, 512, 4, 5),
    Tiles(4, 1024, 4, 4),
    Tiles(8, 1024, 8, 4),
    Tiles(16, 512, 8, 4),
]
MATRIX_INNER = [Tiles(32, 128, 4, 4), Tiles(64, 128, 4, 3), Tiles(32, 256, 4, 3), Tiles(16, 256, 4, 4)]
MATRIX_OUTER = [Tiles(32, 128, 4, 6), Tiles(64, 128, 4, 4), Tiles(32, 256, 4, 4), Tiles(128, 128, 8, 3)]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def microseconds(works: list[Callable[[], object]], budget: float = 0.03) -> float:
    """The time of one work, when all of them follow one another in a replayed graph: median of `budget` seconds."""
    for work in works:
        work()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for work in works:
                work()
        finally:
            graph.capture_end()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    while len(taken) < 5 or (sum(taken) < budget * 1e3 and len(taken) < 200):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    # the first replay uploads the graph
    return statistics.median(taken[1:]) * 1e3 / len(works)


class Rows:
    """Measured rows, printed as they are added; a case that fails records the reason, and the others go on."""

    def __init__(self):
        self.rows: list[dict] = []

    def add(
        self, case: dict, works: list[Callable[[], Tensor]], num_bytes: float, truth: Tensor | None = None
    ) -> float:
        """Adds a row and returns its microseconds, or infinity if it failed; `truth` is the right result."""
        row, us = dict(case), float("inf")
        try:
            if truth is not None:
                error = ((works[0]().double() - truth.double()).norm() / truth.double().norm()).item()
                row["relative_error"] = error
                if not error < 1e-2:
                    row["failed"] = f"relative error {error:.3g}"
            us = microseconds(works)
            row |= {"us": round(us, 2), "MB": round(num_bytes / 1e6, 2), "GB/s": round(num_bytes / us / 1e3)}
        # an error of a compiler or a launch is the result of this case
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {problem}"[:300]
            torch.cuda.synchronize()
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return us if "failed" not in row else float("inf")


class Layer:
    """Experts in 16 bits, or packed in 8 or 4; shared experts are in 16 bits."""

    def __init__(self, bits: int):
        def weight(*shape: int) -> Tensor:
            return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_(std=0.03)

        routed = weight(E, 2 * INNER, D), weight(E, D, INNER)
        self.gate_up, self.down = routed if bits == 16 else (pack(x, bits) for x in routed)
        self.shared = weight(SHARED, D), weight(SHARED, D), weight(D, SHARED)

    @property
    def bytes_of_an_expert(self) -> float:
        parts = [self.gate_up, self.down]
        tensors = itertools.chain.from_iterable(x if isinstance(x, Packed) else [x] for x in parts)
        return sum(x.nbytes for x in tensors) / E


def dense(weight: Tensor | Packed, e: int) -> Tensor:
    """The weight of expert e in float32."""
    if isinstance(weight, Packed):
        return Packed(weight.codes[e], weight.scales[e].float()).unpacked()
    return weight[e].float()


class Tokens:
    """m tokens, and the experts that they choose in every layer."""

    def __init__(self, m: int, layers: list[Layer]):
        self.x = torch.randn(m, D, device="cuda", dtype=torch.bfloat16)
        self.chosen = [torch.rand(m, E, device="cuda").topk(K).indices for _ in layers]
        self.weights = torch.rand(m, K, device="cuda") / K
        self.layers = layers
        distinct = sum(len(chosen.unique()) for chosen in self.chosen) / len(layers)
        shared = sum(weight.nbytes for weight in layers[0].shared)
        self.num_bytes = distinct * layers[0].bytes_of_an_expert + shared

    def works(self, compute: Callable) -> list[Callable[[], Tensor]]:
        return [
            lambda layer=layer, chosen=chosen: compute(self.x, layer, chosen, self.weights)
            for layer, chosen in zip(self.layers, self.chosen)
        ]

    def truth(self) -> Tensor:
        """The exact result of the first layer, in float32."""
        layer, x = self.layers[0], self.x.float()
        total = swiglu(x, *(weight.float() for weight in layer.shared))
        for e in self.chosen[0].unique().tolist():
            share = (self.weights * (self.chosen[0] == e)).sum(1, keepdim=True)
            total += share * swiglu(x, *dense(layer.gate_up, e).chunk(2), dense(layer.down, e))
        return total


def ours(plan: Plan) -> Callable:
    def compute(x, layer, chosen, weights):
        return triton_experts.experts(x, layer.gate_up, layer.down, chosen, weights, layer.shared, plan=plan)

    return compute


def batched(x: Tensor, layer: Layer, chosen: Tensor, weights: Tensor) -> Tensor:
    """What transformers' "batched_mm" does: it copies the chosen experts."""
    of_pair, rows = chosen.flatten(), x.repeat_interleave(K, dim=0)
    gate, up = torch.bmm(layer.gate_up[of_pair], rows[..., None]).squeeze(-1).chunk(2, dim=-1)
    out = torch.bmm(layer.down[of_pair], (F.silu(gate) * up)[..., None]).squeeze(-1)
    routed = (out.unflatten(0, (-1, K)) * weights[..., None]).sum(1).to(x.dtype)
    return routed + swiglu(x, *layer.shared)


def grouped(x: Tensor, layer: Layer, chosen: Tensor, weights: Tensor) -> Tensor:
    def product(rows, name, ends):
        return grouped_product(rows, layer.gate_up if name == "gate_up_proj" else layer.down, ends)

    return routed_sum(product, nn.SiLU(), x, chosen, weights, num_experts=E) + swiglu(x, *layer.shared)


def run_experts(rows: Rows, quick: bool) -> None:
    layers = [Layer(16) for _ in range(LAYERS)]
    tokens = {m: Tokens(m, layers) for m in (1, 2, 4, 8, 16, 32, 64)}
    truths = {m: batch.truth() for m, batch in tokens.items()}

    def measure(name: str, m: int, compute: Callable, **case) -> float:
        batch = tokens[m]
        return rows.add({"case": name, "m": m} | case, batch.works(compute), batch.num_bytes, truths[m])

    def tuned(name: str, m: int, inners: list[Tiles], outers: list[Tiles]) -> Plan:
        """Finds the best inner tiles with the first outer tiles, then the best outer tiles with these inner tiles."""

        def taken(plan: Plan) -> float:
            return measure(name, m, ours(plan), inner=list(plan.inner), outer=list(plan.outer))

        inners, outers = (inners[:2], outers[:2]) if quick else (inners, outers)
        times = {inner: taken(Plan(inner, outers[0])) for inner in inners}
        inner = min(times, key=times.get)
        rest = {outer: taken(Plan(inner, outer)) for outer in outers[1:]}
        return Plan(inner, min({outers[0]: times[inner]} | rest, key=({outers[0]: times[inner]} | rest).get))

    vector = tuned("experts, vector", 1, VECTOR_INNER, VECTOR_OUTER)
    matrix = tuned("experts, matrix", 4, MATRIX_INNER, MATRIX_OUTER)
    for inner, outer in (
        (Tiles(64, 64, 4, 4), Tiles(64, 64, 4, 4)),
        (Tiles(64, 128, 4, 3), Tiles(64, 128, 4, 4)),
        (Tiles(64, 64, 8, 4), Tiles(128, 64, 8, 4)),
        (Tiles(32, 128, 4, 4), Tiles(32, 128, 4, 5)),
    ):
        measure("experts, matrix", 64, ours(Plan(inner, outer)), inner=list(inner), outer=list(outer))
    for m in tokens:
        if m <= 4:
            measure("experts, vector, tuned", m, ours(vector), plan=vector)
        measure("experts, matrix, tuned", m, ours(matrix), plan=matrix)
    for m in tokens:
        measure("experts, batched in torch", m, batched)
    for m in tokens:
        measure("experts, grouped in torch", m, grouped)

    vectors = [
        vector,
        Plan(Tiles(4, 2048, 4, 1), Tiles(8, 512, 4, 4)),
        Plan(Tiles(4, 2048, 8, 1), Tiles(8, 1024, 8, 4)),
    ]
    matrices = [
        matrix,
        Plan(Tiles(32, 128, 4, 4), Tiles(32, 128, 4, 6)),
        Plan(Tiles(64, 64, 4, 4), Tiles(64, 64, 4, 4)),
    ]
    for bits in (8, 4):
        layers = tokens = truths = None
        layers = [Layer(bits) for _ in range(LAYERS)]
        tokens = {m: Tokens(m, layers) for m in (1, 8, 64)}
        truths = {m: batch.truth() for m, batch in tokens.items()}
        for m in tokens:
            for plan in vectors if m == 1 else matrices:
                measure(f"experts, {bits} bits", m, ours(plan), plan=plan)


def run_dense(rows: Rows) -> None:
    """The dense MLP, over nine copies of its weights (1.2 GB)."""
    weights = torch.empty(27, DENSE, D, device="cuda", dtype=torch.bfloat16).normal_(std=0.03)
    mlps = [(gate, up, down.view(D, DENSE)) for gate, up, down in zip(weights[::3], weights[1::3], weights[2::3])]
    for m in (1, 4):
        x = torch.randn(m, D, device="cuda", dtype=torch.bfloat16)
        truth = swiglu(x.float(), *(weight.float() for weight in mlps[0]))
        for name, compute in (("mlp in torch", swiglu), ("mlp", triton_experts.mlp)):
            works = [partial(compute, x, *weights) for weights in mlps]
            rows.add({"case": name, "m": m}, works, 6 * D * DENSE, truth)


def run(quick: bool) -> list[dict]:
    rows = Rows()
    torch.manual_seed(0)
    source, target = torch.ones(2, 1 << 28, device="cuda", dtype=torch.bfloat16)
    rows.add({"case": "copy"}, [lambda: target.copy_(source)], 2 * source.nbytes)
    source = target = None
    for part in (partial(run_experts, rows, quick), partial(run_dense, rows)):
        try:
            with torch.no_grad():
                part()
        # a failure of one part leaves the results of the other
        except Exception as problem:
            rows.rows.append({"case": part.func.__name__, "failed": f"{type(problem).__name__}: {problem}"[:300]})
    return rows.rows


if __name__ == "__main__":
    run(quick=False)
