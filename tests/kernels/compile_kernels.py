"""Compiles the kernels of decoding for a GPU that need not be there: python -m tests.kernels.compile_kernels 90

The models have the widths of the published ones, few layers and experts, and memory that nobody wrote. Their decoder
layers launch as on a GPU, and every launch compiles its kernel for that compute capability and runs nothing. Prints a
line of JSON per compiled kernel: what launched it, registers, bytes of stack (spilled registers) and of shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM, LatentCache, pack_experts
from deepseek_latent.kernels.gpu import layers as gpu_layers
from deepseek_latent.kernels.gpu import triton_attention, triton_tiling
from tests.kernels.support import with_gpu_layers
from tests.model.published_configs import DEEPSEEK_V2, DEEPSEEK_V2_LITE

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FEW = {"num_hidden_layers": 2, "n_routed_experts": 8, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1}
LITE = DEEPSEEK_V2_LITE | FEW
V2 = DEEPSEEK_V2 | FEW | {"n_routed_experts": 16}
COMPRESSED = LITE | {"kv_lora_rank": 144, "qk_rope_head_dim": 48, "num_unquantized_channels": 8}
# latent and rotary key of an exact conversion of a Llama with 8 key heads of 128
WIDE = LITE | {"kv_lora_rank": 1156, "qk_rope_head_dim": 1024}
CONTEXT = 4096
DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# bytes of shared memory that one program may have, by compute capability: A100, RTX 40, H100
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


class AbsentDevice:
    """What Triton asks of a driver while it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class CompilingLaunches:
    """Has launches compile and run nothing, with the options that they have on a GPU, and reports each kernel once."""

    def __init__(self, capability: int):
        driver.set_active(AbsentDevice(capability))
        self.capability, self.case, self.dtype, self.seen = capability, "", torch.bfloat16, set()
        launch = JITFunction.run

        def compile_only(function, *args, grid, warmup, **kwargs):
            on_gpu = {"PTX": True, "WIDENS": False, "OVERLAPS": capability >= 90}
            kwargs |= {name: value for name, value in on_gpu.items() if name in kwargs}
            if "DOT" in kwargs:
                kwargs["DOT"] = DOT[self.dtype]
            self.report(launch(function, *args, grid=grid, warmup=True, **kwargs))

        JITFunction.run = compile_only

    def report(self, kernel) -> None:
        if kernel.hash in self.seen:
            return
        self.seen.add(kernel.hash)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        row = {"kernel": kernel.metadata.name, "case": self.case} | found | {"shared": kernel.metadata.shared}
        print(json.dumps(row), flush=True)


def decode(
    compiled: CompilingLaunches,
    name: str,
    fields: dict,
    shapes: list[tuple[int, int]],
    cache_dtypes: list[str | None],
    *,
    bits: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Decodes (batch, tokens) after a context, with experts in `bits`, over each kind of cache."""
    compiled.dtype = dtype
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**fields)).to(dtype)
    model = model.to_empty(device="cpu").eval()
    if bits < 16:
        pack_experts(model, bits)
    with_gpu_layers(model)
    widths = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    for batch, tokens in shapes:
        for cache_dtype in cache_dtypes:
            cached = cache_dtype or str(dtype).removeprefix("torch.")
            compiled.case = f"{name}, experts in {bits} bits, {batch} x {tokens} tokens, {cached}"
            cache = LatentCache(model.config, cache_dtype=cache_dtype, max_cache_len=CONTEXT + 16)
            for layer in range(model.config.num_hidden_layers):
                cache.append(*(torch.zeros(batch, 1, CONTEXT, width, dtype=dtype) for width in widths), layer)
            model(torch.zeros(batch, tokens, dtype=torch.long), cache=cache)


@torch.no_grad()
def main() -> None:
    compiled = CompilingLaunches(int(sys.argv[1]))
    gpu_layers.DEVICES = ("cpu",)
    for module in (triton_attention, triton_tiling):
        module.shared_memory = lambda device: SHARED_MEMORY[compiled.capability]
    decode(compiled, "Lite", LITE, [(1, 1), (1, 2), (1, 4), (64, 1)], [None, "int8", "int4"])
    decode(compiled, "Lite", LITE, [(1, 1)], ["int6", "fp8"])
    decode(compiled, "V2", V2, [(1, 1), (1, 4)], [None, "int8"])
    decode(compiled, "compressed", COMPRESSED, [(1, 1), (8, 1)], [None, "int4"])
    decode(compiled, "wide", WIDE, [(1, 1)], [None, "int8"])
    for bits in (8, 4):
        decode(compiled, "Lite", LITE, [(1, 1), (8, 1), (64, 1)], [None], bits=bits)
    for dtype in (torch.float16, torch.float32):
        decode(compiled, "Lite", LITE, [(1, 1), (1, 4), (64, 1)], [None], dtype=dtype)


if __name__ == "__main__":
    main()
