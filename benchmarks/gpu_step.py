"""Measures one token in DeepSeek-V2-Lite's decoder layers on a GPU: whole layers, and each kernel separately.

Four layers with weights of their own follow one another in a replayed CUDA graph, so that no weight is found in the
GPU's cache. Rows are printed as they are measured.
"""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_latent import LatentCache
from deepseek_latent.compat.bound_functions import bind, unbind
from deepseek_latent.kernels.gpu import layers as gpu_layers
from deepseek_latent.kernels.gpu import one_token as gpu_one_token
from deepseek_latent.kernels.gpu.triton_attention import attend_in_splits, combine
from deepseek_latent.kernels.gpu.triton_experts import VECTOR, experts
from deepseek_latent.kernels.gpu.triton_one_token import expand, rotate_write_absorb
from deepseek_latent.kernels.gpu.triton_project import project
from deepseek_latent.kernels.gpu.triton_router import choose
from deepseek_latent.kernels.gpu.triton_tiles import Norm, Tiles
from deepseek_latent.kernels.gpu.triton_tiling import tiling
from deepseek_latent.modeling_deepseek_v2 import DeepseekV2DecoderLayer

from .gpu_experts import Rows
from .lite4 import build

ROWS = [Tiles(2, 2048, 4, 1), Tiles(1, 2048, 4, 1), Tiles(4, 2048, 4, 1), Tiles(2, 2048, 2, 1)]
INNER = [Tiles(2, 2048, 4, 1), Tiles(1, 2048, 4, 1), Tiles(1, 2048, 2, 1), Tiles(4, 2048, 8, 1), Tiles(2, 2048, 2, 1)]
# a kernel measured separately runs over this many copies of its weights
COPIES = 32
# cases that have not started after this time are left out
SECONDS = 24


class Decoder:
    """Four layers, one input token, and a static cache that holds `tokens`."""

    def __init__(self, model: torch.nn.Module, tokens: int):
        config = model.config
        self.layers = [module for module in model.modules() if type(module) is DeepseekV2DecoderLayer]
        self.x = torch.randn(1, 1, config.hidden_size, device="cuda", dtype=model.dtype)
        angles = torch.randn(1, 1, config.qk_rope_head_dim // 2, device="cuda")
        self.rotation = angles.cos(), angles.sin()
        self.cache = LatentCache(config, max_cache_len=tokens + 64)
        for i in range(len(self.layers)):
            widths = config.kv_lora_rank, config.qk_rope_head_dim
            self.cache.append(*(torch.randn(1, 1, tokens, w, device="cuda", dtype=model.dtype) for w in widths), i)
        self.cache.count.to_device(self.x.device)
        with self.cache.count.recorded():
            self.cache.count.advance(1)
        self.num_bytes = len(self.layers) * tokens * 2 * sum(widths) + sum(map(_bytes_read, self.layers))

    def step(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        for layer in self.layers:
            x = layer(x, cache=self.cache, position_embeddings=self.rotation)
        return x


def _bytes_read(layer: torch.nn.Module) -> int:
    """The fewest bytes of weights that one token needs."""
    total = 0
    for name, parameter in layer.named_parameters():
        share = 6 / 64 if ".experts." in name else 1
        total += int(parameter.nbytes * share)
    return total


# which function computes a layer, and whether its launches overlap
WAYS = [("few tokens' way", False), ("one token's way", False), ("one token's way", True)]


def run_steps(rows: Rows, model: torch.nn.Module, contexts: list[int]) -> None:
    for tokens in contexts:
        decoder = Decoder(model, tokens)
        with decoder.cache.count.recorded():
            truth = decoder.step().float()
            for layer in decoder.layers:
                bind(layer, gpu_layers.REPLACEMENTS[DeepseekV2DecoderLayer])
            for name, overlaps in WAYS:
                run_way(rows, decoder, truth, {"case": name, "tokens": tokens, "overlaps": overlaps})
            for layer in decoder.layers:
                unbind(layer)


def run_way(rows: Rows, decoder: Decoder, truth: Tensor, case: dict) -> None:
    one_token, overlaps = gpu_layers.decode_one_token, gpu_one_token.OVERLAPS
    if case["case"] == "few tokens' way":
        gpu_layers.decode_one_token = gpu_layers.decode_few_tokens
    gpu_one_token.OVERLAPS = case["overlaps"]
    try:
        error = ((decoder.step().float() - truth).norm() / truth.norm()).item()
        # plain layers round at other places, and the router may choose another expert near a tie
        case |= {"difference": error} | ({} if error < 5e-2 else {"failed": "the result differs"})
        us = rows.add(case, [decoder.step] * 2, decoder.num_bytes)
        print(json.dumps({"case": f"a layer, {case['case']}", "us": us / len(decoder.layers)}), flush=True)
    finally:
        gpu_layers.decode_one_token, gpu_one_token.OVERLAPS = one_token, overlaps


def run_kernels(rows: Rows, model: torch.nn.Module, deadline: float) -> None:
    """Each kernel separately, over COPIES copies of its weights in one graph."""
    d, h, n, r, v, c, bf16 = 2048, 16, 128, 64, 128, 512, torch.bfloat16

    def weight(*shape: int) -> list[Tensor]:
        return [torch.empty(*shape, device="cuda", dtype=bf16).normal_(std=0.03) for _ in range(COPIES)]

    def measure(case: dict, works: list[Callable[[], Tensor]], num_bytes: float, truth: Tensor | None = None) -> None:
        if time.monotonic() < deadline:
            rows.add(case, works, num_bytes, truth)
        else:
            rows.rows.append(case | {"failed": "no time was left"})

    x, scale = torch.randn(1, d, device="cuda", dtype=bf16), torch.rand(d, device="cuda").to(bf16) + 0.5
    norm, normed = Norm(scale, 1e-6), F.rms_norm(x, (d,), scale, 1e-6)
    q, kv_a, o = weight(h * (n + r), d), weight(c + r, d), weight(d, h * v)
    num_bytes = 2 * d * (h * (n + r) + c + r)
    truth = F.linear(normed.float(), q[0].float())
    measure({"case": "q and kv_a in torch"}, [partial(_in_torch, x, scale, *w) for w in zip(q, kv_a)], num_bytes, truth)
    for overlaps in (False, True):
        works = [partial(_first, project, x, list(w), norm, overlap=overlaps) for w in zip(q, kv_a)]
        measure({"case": "project q and kv_a", "tiles": ROWS[0], "overlaps": overlaps}, works, num_bytes, truth)
    for tiles in ROWS[1:]:
        works = [partial(_first, project, x, list(w), norm, tiles=tiles) for w in zip(q, kv_a)]
        measure({"case": "project q and kv_a", "tiles": tiles}, works, num_bytes, truth)
    truth = F.linear(x.float(), o[0].float()) + x.float()
    measure({"case": "o in torch"}, [partial(lambda w: F.linear(x, w) + x, w) for w in o], 2 * d * h * v, truth)
    for tiles in ROWS:
        works = [partial(_first, project, x, [w], residual=x, tiles=tiles) for w in o]
        measure({"case": "project o", "tiles": tiles}, works, 2 * d * h * v, truth)
    q = kv_a = o = None

    up = weight(h, n + v, c)
    for case in _absorbing(up, h, n, r, c):
        measure(*case)
    for case in _expanding(up, h, n, c, r):
        measure(*case)
    up = None

    router = weight(64, d)
    truth = F.linear(normed.float(), router[0].float())
    for tiles in (Tiles(1, 2048, 4, 1), Tiles(1, 2048, 8, 1)):
        works = [partial(_first, project, x, [w], norm, dtype=torch.float32, tiles=tiles) for w in router]
        measure({"case": "router", "tiles": tiles}, works, 2 * 64 * d, truth)
    options = {"k": 6, "n_group": 1, "topk_group": 1, "normalize": False, "scaling_factor": 1.0}
    works = [lambda: choose(truth, **options)[0]] * COPIES
    measure({"case": "choose"}, works, 4 * 64)

    moe = [layer.mlp for layer in model.model.layers[1:]]
    chosen, weights = torch.arange(3, 63, 10, device="cuda")[None], torch.full((1, 6), 0.16, device="cuda")
    num_bytes = 2 * 3 * d * 1408 * 8

    def layer(mlp: torch.nn.Module, x: Tensor, **options) -> Tensor:
        shared = mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj, mlp.shared_experts.down_proj
        stacked = mlp.experts.gate_up_proj, mlp.experts.down_proj
        return experts(x, *stacked, chosen, weights, tuple(part.weight for part in shared), **options)

    truth = layer(moe[0], normed)
    measure({"case": "experts, normed before"}, [partial(layer, mlp, normed) for mlp in moe], num_bytes, truth)
    for inner in INNER:
        works = [partial(layer, mlp, x, norm=norm, plan=VECTOR._replace(inner=inner)) for mlp in moe]
        measure({"case": "experts and their norm", "inner": inner}, works, num_bytes, truth)


def _first(function: Callable, *args, **options) -> Tensor:
    return function(*args, **options)[0]


def _in_torch(x: Tensor, scale: Tensor, q: Tensor, kv_a: Tensor) -> Tensor:
    normed = F.rms_norm(x, scale.shape, scale, 1e-6)
    F.linear(normed, kv_a)
    return F.linear(normed, q)


def _absorbing(up: list[Tensor], h: int, n: int, r: int, c: int) -> Iterator[tuple]:
    queries, compressed = (torch.randn(1, 1, w, device="cuda", dtype=torch.bfloat16) for w in (h * (n + r), c + r))
    queries, angles = queries.view(1, 1, h, n + r), torch.randn(1, 1, r // 2, device="cuda")
    norm = Norm(torch.ones(c, device="cuda", dtype=torch.bfloat16), 1e-6)
    rows = torch.zeros(1, 1088, c + r, device="cuda", dtype=torch.bfloat16)
    start = torch.full((), 1024, device="cuda")
    truth = torch.einsum("bshn,hnc->bshc", queries[..., :n].float(), up[0][:, :n].float())
    given = queries, compressed, norm, angles.cos(), angles.sin(), rows, start
    works = [partial(lambda w: torch.bmm(queries[0].transpose(0, 1)[..., :n], w[:, :n]), w) for w in up]
    yield {"case": "absorb in torch"}, works, 2 * h * n * c
    works = [partial(rotate_write_absorb, *given, w[:, :n]) for w in up]
    yield {"case": "rotate, write, absorb"}, works, 2 * h * n * c, truth


def _expanding(up: list[Tensor], h: int, n: int, c: int, r: int) -> Iterator[tuple]:
    """Attention in splits of several sizes, and what follows it."""
    queries = [torch.randn(1, 1, h, w, device="cuda", dtype=torch.bfloat16) for w in (c, r)]
    usual = tiling(h, "")
    for tokens, per_split in ((1088, usual.tokens_per_split), (1088, 32), (4096, 64), (32832, 64)):
        rows = torch.randn(1, tokens, c + r, device="cuda", dtype=torch.bfloat16).split((c, r), dim=-1)
        cut = usual._replace(tokens_per_split=per_split)
        works = [partial(_first, attend_in_splits, *queries, *([x] for x in rows), scale=0.05, cut=cut)] * COPIES
        case = {"tokens": tokens, "per_split": per_split}
        yield case | {"case": "attend"}, works, 2 * tokens * (c + r)
        parts, sizes = attend_in_splits(*queries, *([x] for x in rows), scale=0.05, cut=cut)
        context, num_bytes = combine(parts, sizes, torch.bfloat16), 2 * h * n * c + parts.nbytes
        truth = torch.einsum("bshc,hvc->bshv", context.float(), up[0][:, n:].float()).flatten(1)
        case |= {"splits": parts.shape[1]}
        works = [partial(_combined, parts, sizes, w[:, n:]) for w in up]
        yield case | {"case": "combine, then expand"}, works, num_bytes, truth
        works = [partial(expand, parts, sizes, w[:, n:]) for w in up]
        yield case | {"case": "combine and expand"}, works, num_bytes, truth


def _combined(parts: Tensor, sizes: Tensor, w_uv: Tensor) -> Tensor:
    return expand(combine(parts, sizes, torch.bfloat16), None, w_uv)


def run(quick: bool) -> list[dict]:
    rows, deadline = Rows(), time.monotonic() + SECONDS
    torch.manual_seed(0)
    with torch.no_grad():
        model = build("ours", device="cuda")
        for part in (
            partial(run_steps, rows, model, [1024] if quick else [1024, 32768]),
            partial(run_kernels, rows, model, deadline),
        ):
            try:
                part()
            # a failure of one part leaves the results of the other
            except Exception as problem:
                row = {"case": part.func.__name__, "failed": f"{type(problem).__name__}: {problem}"[:300]}
                rows.rows.append(row)
                print(json.dumps(row), flush=True)
    return rows.rows


if __name__ == "__main__":
    run(quick=False)
