"""Measures time and memory of a training step: python -m benchmarks.train --out benchmarks/results/train.json

V2-Lite's widths in bfloat16 with LoRA (r = 16) on the projections of attention, and on routed experts too. A step is
one sequence of random tokens forward and backward, in this package and in stock peft on transformers' own class, with
the same weights and adapters. (Stock peft drops adapters on this architecture's dense and shared MLPs, so neither side
has any.) Losses and gradients are compared first, then steps are timed in turn. Memory is the peak of each side in a
process of its own, minus what was resident before the step.

On a GPU, with as many layers as fit: --device cuda --layers 27 --tokens 4096
"""

import argparse
import gc
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from .lite4 import build
from .machine import alternated, described, report, resident, yardsticks

SIDES = ("native", "ours")
PROJECTIONS = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
ADAPTERS = {
    "attention": [],
    "attention and routed experts": ["experts.gate_up_proj", "experts.down_proj"],
}


def adapted(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Adds adapters with a nonzero effect, the same on both sides."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.01))
    return model.train()


def step(model: nn.Module, tokens: int) -> float:
    """Computes the loss of one sequence and its gradients, which stay in the adapters until the next step."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item()


def peak(model: nn.Module, tokens: int) -> int:
    """Peak bytes above the weights during a step, in this process."""
    step(model, 16)
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(model, tokens)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(model, tokens)
    return resident("VmHWM") - before


def peak_elsewhere(benchmark: str, *arguments: str) -> int:
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.float().flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


def compared(models: dict[str, nn.Module], tokens: int, repetitions: int) -> tuple[dict, dict[str, float]]:
    """Checks that losses and gradients of both sides agree, and times steps and yardsticks in turn."""
    losses = {side: step(model, tokens) for side, model in models.items()}
    own, other = (gradients(models[side]) for side in ("ours", "native"))
    error = ((own - other).norm() / other.norm()).item()
    # in bfloat16, a router near a tie may choose another expert
    assert abs(losses["ours"] - losses["native"]) < 0.01 * losses["native"], losses
    assert error < 0.2, f"gradients differ by {error}"
    turns = {side: lambda model=model: step(model, tokens) for side, model in models.items()} | yardsticks()
    seconds = {name: statistics.median(x) for name, x in alternated(turns, repetitions).items()}
    return {"loss": losses, "gradients_relative_difference": round(error, 4)}, seconds


def built(side: str, adapters: str, options: argparse.Namespace, weights: nn.Module | None = None) -> nn.Module:
    config = LoraConfig(r=16, target_modules=PROJECTIONS, target_parameters=ADAPTERS[adapters])
    return adapted(build(side, weights=weights, device=options.device, num_hidden_layers=options.layers), config)


def measure(adapters: str, options: argparse.Namespace) -> dict:
    shape = ["--tokens", str(options.tokens), "--layers", str(options.layers), "--device", options.device]
    memory = {side: peak_elsewhere("train", "--here", side, "--adapters", adapters, *shape) for side in SIDES}
    plain = build("ours", device=options.device, num_hidden_layers=options.layers)
    models = {side: built(side, adapters, options, plain) for side in SIDES}
    agreement, seconds = compared(models, options.tokens, options.repetitions)
    return agreement | {
        "seconds": {side: round(seconds[side], 3) for side in SIDES},
        "times_faster_than_stock_peft": round(seconds["native"] / seconds["ours"], 2),
        "memory_above_weights_bytes": memory,
        "memory_of_stock_peft": round(memory["ours"] / memory["native"], 2),
        "cpu_float32_flop_per_second": round(2 * 2048**3 / seconds["product of 2048"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--here", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--adapters", choices=ADAPTERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(peak(built(options.here, options.adapters, options), options.tokens))
        return
    result = described("python -m benchmarks.train") | {
        "model": f"V2-Lite's widths, {options.layers} layers, bfloat16, LoRA r=16, {options.tokens} tokens",
        "device": options.device,
        "rows": {},
    }
    for adapters in ADAPTERS:
        result["rows"][adapters] = measure(adapters, options)
        gc.collect()
    report(result, options.out)


if __name__ == "__main__":
    main()
