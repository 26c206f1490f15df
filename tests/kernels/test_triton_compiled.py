"""The kernels compile for GPUs, which Triton's interpreter does not show, and fit into registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.compile_kernels import SHARED_MEMORY

ROOT = Path(__file__).parents[2]
EXPERTS = {"activate_vector", "down_vector", "activate_matrix", "down_matrix"}


@pytest.fixture(scope="module", params=SHARED_MEMORY, ids="sm_{}".format)
def compiled(request) -> tuple[int, list[dict]]:
    # a process of its own, because the interpreter takes the place of the compiler for a whole process
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", str(request.param)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return request.param, [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_kernels_of_decoding_compile_for_every_cache_and_kind_of_experts(compiled):
    _, kernels = compiled
    found = {kernel["kernel"] for kernel in kernels}
    assert found >= EXPERTS | {"_attend_to_splits", "_combine", "_project_kernel", "_rotate_write_absorb_kernel"}
    attended = {kernel["case"].rpartition(", ")[2] for kernel in kernels if kernel["kernel"] == "_attend_to_splits"}
    assert attended == {"bfloat16", "float16", "float32", "int8", "int6", "int4", "fp8"}
    for bits in (16, 8, 4):
        of_bits = {kernel["kernel"] for kernel in kernels if f"experts in {bits} bits" in kernel["case"]}
        assert of_bits >= EXPERTS, bits


def test_only_attention_spills_more_than_a_few_registers(compiled):
    _, kernels = compiled
    assert {kernel["kernel"] for kernel in kernels if kernel["stack"] > 16} <= {"_attend_to_splits"}
    # 16 rows of queries; with 64, accumulators alone fill the registers
    one_token = "Lite, experts in 16 bits, 1 x 1 tokens, bfloat16"
    (attention,) = [k for k in kernels if k["kernel"] == "_attend_to_splits" and k["case"] == one_token]
    assert attention["stack"] <= 16


def test_programs_fit_into_shared_memory(compiled):
    capability, kernels = compiled
    assert max(kernel["shared"] for kernel in kernels) <= SHARED_MEMORY[capability]
