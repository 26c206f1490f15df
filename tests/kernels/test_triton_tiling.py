"""Programs of attention fit into the shared memory of GPUs, by arithmetic; test_triton_compiled.py compiles them."""

import pytest
import torch

pytest.importorskip("triton")

from deepseek_latent.kernels.gpu import triton_tiling
from deepseek_latent.kernels.gpu.triton_tiling import columns_of, fitting, has_room, shared_bytes, tiling

# rows of queries in a program, and bits of a code
SHAPES = {
    "bfloat16, one token": (16, ""),
    "bfloat16, two tokens": (32, ""),
    "bfloat16, V2": (128, ""),
    "int8": (16, "8"),
}
LIMITS = {"RTX 40": 99 << 10, "A100": 163 << 10, "H100": 227 << 10}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize(("rows", "bits"), SHAPES.values(), ids=SHAPES)
def test_programs_fit_into_shared_memory_and_an_h100_keeps_its_tiling(rows, bits, limit):
    usual = tiling(rows, bits)
    columns = columns_of(bits, 512, 64, 0, usual.rows)
    cut = fitting(usual, columns, 2, bool(bits), limit)
    assert shared_bytes(cut, columns, 2, bool(bits)) <= limit
    assert cut.programs_per_sm * (shared_bytes(cut, columns, 2, bool(bits)) + 1024) <= limit + 1024
    assert limit < LIMITS["H100"] or cut == usual


def test_the_widest_conversions_have_no_room(monkeypatch):
    has_room.cache_clear()
    monkeypatch.setattr(triton_tiling, "shared_memory", lambda device: LIMITS["RTX 40"])
    device = torch.device("cpu")
    assert has_room("", 512, 64, 0, torch.bfloat16, device)
    assert not has_room("", 1156, 1024, 0, torch.bfloat16, device)
    has_room.cache_clear()
