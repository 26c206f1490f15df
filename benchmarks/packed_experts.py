"""Routed experts in 16, 8 and 4 bits under LoRA: python -m benchmarks.packed_experts

Two layers of experts at V2-Lite's widths with LoRA (r = 16) on all routed experts, a training step of 512 tokens: bytes
of the experts; peak memory of a step above the weights, each in a process of its own, where glibc gives freed blocks
back at once (by default it keeps up to 2 GB of them); seconds of steps taken in turn. Before, the loss of packed
experts is compared with that of the same experts unpacked. And the perplexity of the trained checkpoint,
examples/pydoc-tiny, on its held-out text.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from deepseek_latent.conversion.calibration import perplexity, windows_of
from deepseek_latent.experts.routed import DeepseekV2Experts
from deepseek_latent.finetuning.packing import pack_experts, unpack_experts

from .expert_lora import LAYERS, LORA
from .lite4 import build, twin
from .machine import alternated, described, report
from .train import adapted, peak, step

BITS = (16, 8, 4)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "4194304"}
PYDOC = Path(__file__).parent.parent / "examples" / "pydoc-tiny"


def built(bits: int, weights: nn.Module | None = None) -> nn.Module:
    model = build("ours", **LAYERS) if weights is None else twin(weights)
    if bits < 16:
        pack_experts(model, bits)
    return adapted(model, LORA)


def bytes_of_experts(model: nn.Module) -> int:
    kept = {}
    for module in model.modules():
        if isinstance(module, DeepseekV2Experts):
            tensors = (*module.parameters(), *module.buffers())
            kept |= {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(kept.values())


def perplexities() -> dict[int, float]:
    _, windows = windows_of(PYDOC, (PYDOC / "held_out.txt").read_text(encoding="utf-8"))
    found = {}
    for bits in BITS:
        model = AutoModelForCausalLM.from_pretrained(PYDOC, dtype=torch.float32).eval()
        if bits < 16:
            pack_experts(model, bits)
        found[bits] = round(perplexity(model, windows), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--here", type=int, choices=BITS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(peak(built(options.here), options.tokens))
        return
    memory = {}
    for bits in BITS:
        command = [
            sys.executable,
            "-m",
            "benchmarks.packed_experts",
            "--here",
            str(bits),
            "--tokens",
            str(options.tokens),
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | GIVE_BACK)
        memory[bits] = int(done.stdout.splitlines()[-1])
    plain = build("ours", **LAYERS)
    models = {bits: built(bits, plain) for bits in BITS}
    losses = {bits: step(model, options.tokens) for bits, model in models.items()}
    for bits in (8, 4):
        rounded = built(bits, plain)
        unpack_experts(rounded)
        expected = step(rounded, options.tokens)
        assert abs(losses[bits] - expected) < 2e-3 * expected, (bits, losses[bits], expected)
    turns = {str(bits): lambda model=model: step(model, options.tokens) for bits, model in models.items()}
    seconds = {bits: statistics.median(x) for bits, x in alternated(turns, options.repetitions).items()}
    result = described("python -m benchmarks.packed_experts") | {
        "model": f"2 layers of V2-Lite's experts, LoRA r=16 on all routed experts, {options.tokens} tokens",
        "expert_bytes": {bits: bytes_of_experts(model) for bits, model in models.items()},
        "memory_above_weights_bytes": memory,
        "step_seconds": {bits: round(x, 3) for bits, x in seconds.items()},
        "loss": {bits: round(x, 4) for bits, x in losses.items()},
        "perplexity_of_pydoc_tiny": perplexities(),
    }
    report(result, options.out)


if __name__ == "__main__":
    main()
