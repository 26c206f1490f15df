"""Measures how fast the Triton kernel reads cached latents, next to a copy of memory and to plain torch.

`python -m benchmarks.gpu_attention [--quick]`, run on a GPU, prints a JSON line per case. Every launch of a case reads
another buffer, and together these exceed the L2 cache, because a model's layers never find their latents there either.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from deepseek_latent.cache.format import latent_format
from deepseek_latent.kernels.gpu.triton_attention import attend
from deepseek_latent.kernels.gpu.triton_tiling import Tiling, tiling

C, R, SCALE = 512, 64, 0.1147
BYTES_BETWEEN_REUSE = 256 << 20  # bytes that are read before the same buffer is read again
# (rows, tokens, warps, stages, programs per multiprocessor, fewest tokens per split)
CODED = [Tiling(16, 32, 4, 2, 2, 128)]
# bits, heads, sequences, cached tokens, cuts besides the default; the most important cases come first
CASES = [
    ("", 16, 8, 1 << 15, []),
    ("4", 16, 8, 1 << 15, [*CODED, Tiling(16, 32, 4, 2, 3, 128), Tiling(16, 64, 4, 2, 1, 128)]),
    ("8", 16, 8, 1 << 15, CODED),
    ("", 16, 1, 1 << 17, []),
    ("4", 16, 1, 1 << 17, []),
    ("8", 16, 1, 1 << 17, []),
    ("", 16, 1, 1 << 15, [Tiling(16, 32, 4, 3, 2, 64)]),
    ("", 16, 8, 1 << 13, []),
    ("", 16, 1, 1 << 10, []),
    ("", 16, 1, 1 << 13, [Tiling(16, 32, 4, 5, 1, 32), Tiling(16, 32, 4, 5, 1, 128)]),
    ("", 16, 64, 1 << 12, [Tiling(16, 32, 4, 3, 2, 64)]),
    ("", 16, 256, 1 << 10, [Tiling(16, 32, 4, 3, 2, 64)]),
    ("4", 16, 256, 1 << 10, []),
    ("8", 16, 256, 1 << 10, []),
    ("", 16, 1, 1 << 19, []),
    ("4", 16, 1, 1 << 19, []),
    ("8", 16, 1, 1 << 19, []),
    ("", 128, 1, 1 << 15, []),
    ("fp8", 16, 8, 1 << 15, []),
    ("6", 16, 8, 1 << 15, []),
]
NUM_QUICK_CASES = 6


def microseconds(launches: list[Callable[[], object]], budget: float = 0.04) -> float:
    """The time of one launch in a graph of all launches: the median of five measurements that take `budget` seconds."""
    launches[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    milliseconds(1)
    times = max(int(budget * 200 / milliseconds(1)), 1)
    return 1000 * statistics.median(milliseconds(times) for _ in range(5)) / len(launches)


def copy_bandwidth(pool: Tensor) -> float:
    """GB/s of a copy, with read and written bytes added."""
    half = pool.numel() // 2
    source, target = pool[:half], torch.empty_like(pool[:half])
    return 2 * half / microseconds([lambda: target.copy_(source)]) / 1000


def in_torch(q: Tensor, rows: Tensor) -> Tensor:
    """The same attention in plain torch: products of all rows, with scores in memory."""
    b, s, h, width = q.shape
    scores = torch.bmm(q.view(b, s * h, width), rows.mT)
    return torch.bmm((scores.float() * SCALE).softmax(dim=-1).to(q.dtype), rows[..., :C]).view(b, s, h, C)


def cache_dtype(bits: str) -> str | None:
    """The `cache_dtype` of rows whose codes kernels call `bits`."""
    return f"int{bits}" if bits.isdigit() else bits or None


class Case:
    """A shape and a format, with so many caches that none of them is found in the L2 cache."""

    def __init__(self, pool: Tensor, bits: str, h: int, b: int, t: int, s: int = 1):
        self.bits, self.h, self.b, self.t, self.s = bits, h, b, t, s
        self.form = latent_format(cache_dtype(bits), C, R, torch.bfloat16)
        dtype = self.form.storage_dtype
        self.bytes = b * t * self.form.row_width * dtype.itemsize
        num_buffers = max(4, -(-BYTES_BETWEEN_REUSE // self.bytes))
        num_buffers = min(num_buffers, pool.numel() // self.bytes, 256)
        flat = pool[: num_buffers * self.bytes].view(dtype)
        self.buffers = list(flat.view(num_buffers, b, t, self.form.row_width))
        self.q = torch.randn(b, s, h, C + R, dtype=torch.bfloat16, device="cuda")

    def launch(self, rows: Tensor, cut: Tiling | None) -> Tensor:
        if self.bits:
            latent, k_rotary = rows[..., : -2 * R], rows[..., -2 * R :].view(torch.bfloat16)
        else:
            latent, k_rotary = rows.split((C, R), dim=-1)
        q = self.q.split((C, R), dim=-1)
        return attend(*q, [latent], [k_rotary], scale=SCALE, bits=self.bits, cut=cut)

    def exact(self) -> Tensor:
        """The exact result in float32, computed one sequence at a time."""
        outs = []
        for q, rows in zip(self.q, self.buffers[0]):
            both = self.form.decode(rows, torch.float32)
            weights = (q.flatten(0, 1).float() @ both.mT * SCALE).softmax(dim=-1)
            outs.append((weights @ both[:, :C]).unflatten(0, (self.s, self.h)))
        return torch.stack(outs)

    def row(self, truth: Tensor, cut: Tiling | None, copied: float) -> dict:
        name = f"bits={self.bits or 16} h={self.h} s={self.s} b={self.b} t={self.t}"
        default = tiling(self.s * self.h, self.bits, capacity=self.t)
        row = {"case": name, "cut": list(cut or default), "default": cut is None}
        try:
            out = self.launch(self.buffers[0], cut)
            row["error"] = ((out.float() - truth).norm() / truth.norm()).item()
            row["correct"] = row["error"] < 1e-2
            row |= self.timed([lambda rows=rows: self.launch(rows, cut) for rows in self.buffers], copied)
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {str(problem)[-300:]}"
        return row

    def timed(self, launches: list[Callable[[], object]], copied: float) -> dict:
        us = microseconds(launches)
        rate = self.bytes / us / 1000
        tflops = 2 * self.b * self.s * self.h * self.t * (2 * C + R) / us / 1e6
        numbers = {"us": us, "MB": self.bytes / 1e6, "GB/s": rate, "of_copy": rate / copied, "TFLOP/s": tflops}
        return {name: round(number, 3) for name, number in numbers.items()}

    def torch_row(self, copied: float) -> dict:
        row = {"case": f"torch h={self.h} s={self.s} b={self.b} t={self.t}"}
        try:
            return row | self.timed([lambda rows=rows: in_torch(self.q, rows) for rows in self.buffers], copied)
        except Exception as problem:
            return row | {"failed": f"{type(problem).__name__}: {str(problem)[-300:]}"}


def pool_of(bits: str, num_bytes: int) -> Tensor:
    """Bytes of rows of random tokens, which repeat."""
    values = torch.randn(1 << 15, C + R, device="cuda", dtype=torch.bfloat16)
    if not bits:
        return values.flatten().view(torch.uint8).repeat(-(-num_bytes // (values.numel() * 2)))
    form = latent_format(cache_dtype(bits), C, R, torch.bfloat16)
    rows = form.encode(*values.split((C, R), dim=-1)).flatten()
    return rows.repeat(-(-num_bytes // rows.numel()))


class PrintedRows(list):
    """Rows that are printed as they are added."""

    def __iadd__(self, rows):
        for row in rows:
            print(json.dumps(row), flush=True)
        return super().__iadd__(rows)


def run(quick: bool) -> list[dict]:
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    widths = {bits: latent_format(cache_dtype(bits), C, R, torch.bfloat16) for bits in ("", "8", "6", "4", "fp8")}
    pools = {}
    cases = CASES[:NUM_QUICK_CASES] if quick else CASES
    for bits in {case[0] for case in cases}:
        largest = max(b * t for other, _, b, t, _ in cases if other == bits)
        row_bytes = widths[bits].row_width * widths[bits].storage_dtype.itemsize
        pools[bits] = pool_of(bits, max(4 * largest * row_bytes, 2 * BYTES_BETWEEN_REUSE))
    copied = copy_bandwidth(pools[""])
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    rows = PrintedRows()
    rows += [{"case": "copy", "device": device, "GB/s": copied} | versions]
    for bits, h, b, t, cuts in cases:
        case = Case(pools[bits], bits, h, b, t)
        truth = case.exact()
        for cut in [None, *cuts]:
            rows += [case.row(truth, cut, copied)]
        if not bits and (b, t) == (8, 1 << 13):
            rows += [case.torch_row(copied)]
    if not quick:
        # several tokens in one step, as speculative decoding checks them
        case = Case(pools[""], "", 16, 1, 1 << 15, s=4)
        rows += [case.row(case_truth_causal(case), None, copied)]
    return rows


def case_truth_causal(case: Case) -> Tensor:
    """`exact` for several query tokens; each sees one more token than the one before it."""
    s = case.q.shape[1]
    both = case.buffers[0].float()
    scores = torch.einsum("bshw,btw->bsht", case.q.float(), both) * SCALE
    hidden = torch.arange(case.t, device="cuda") > torch.arange(case.t - s, case.t, device="cuda")[:, None]
    return torch.einsum("bsht,btc->bshc", scores.masked_fill(hidden[:, None], -math.inf).softmax(-1), both[..., :C])


if __name__ == "__main__":
    run("--quick" in sys.argv)
