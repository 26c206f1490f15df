"""Time and memory of a training step: python -m benchmarks.train --out benchmarks/results/train.json

Lite-4 in bfloat16 with LoRA (r = 16) on the projections of attention, one sequence of random tokens forwards and
backwards, by this package and by transformers' own class, whose weights and adapters are the same; losses and gradients
are compared first, then steps taken in turn. Memory is the peak of each side in a process of its own, less what was
resident before the step.
"""

import argparse
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
LORA = LoraConfig(r=16, target_modules=PROJECTIONS)


def adapted(model: nn.Module, config: LoraConfig) -> nn.Module:
    """The model with adapters whose effect is not zero, the same on both sides."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.01))
    return model.train()


def step(model: nn.Module, tokens: int) -> float:
    """The loss of one sequence; gradients are left in the adapters and cleared before the next step."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item()


def peak(model: nn.Module, tokens: int) -> int:
    """Bytes above the weights in a step, in this process."""
    step(model, 16)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(model, tokens)
    return resident("VmHWM") - before


def peak_elsewhere(benchmark: str, side: str, tokens: int) -> int:
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--here", side, "--tokens", str(tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.float().flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


def compared(models: dict[str, nn.Module], tokens: int, repetitions: int) -> tuple[dict, dict[str, float]]:
    """Losses and gradients of both sides, which must agree, and seconds of steps and yardsticks taken in turn."""
    losses = {side: step(model, tokens) for side, model in models.items()}
    own, other = (gradients(models[side]) for side in ("ours", "native"))
    error = ((own - other).norm() / other.norm()).item()
    # bfloat16, and a router near a tie may choose another expert
    assert abs(losses["ours"] - losses["native"]) < 0.01 * losses["native"], losses
    assert error < 0.2, f"gradients differ by {error}"
    turns = {side: lambda model=model: step(model, tokens) for side, model in models.items()} | yardsticks()
    seconds = {name: statistics.median(x) for name, x in alternated(turns, repetitions).items()}
    return {"loss": losses, "gradients_relative_difference": round(error, 4)}, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--here", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(peak(adapted(build(options.here), LORA), options.tokens))
        return
    memory = {side: peak_elsewhere("train", side, options.tokens) for side in SIDES}
    ours = build("ours")
    models = {"native": adapted(build("native", weights=ours), LORA), "ours": adapted(ours, LORA)}
    agreement, seconds = compared(models, options.tokens, options.repetitions)
    result = described("python -m benchmarks.train") | {
        "model": f"Lite-4, bfloat16, LoRA r=16 on {', '.join(PROJECTIONS)}, {options.tokens} tokens",
        **agreement,
        "seconds": {side: round(seconds[side], 3) for side in SIDES},
        "times_faster_than_native": round(seconds["native"] / seconds["ours"], 2),
        "memory_above_weights_bytes": memory,
        "float32_flop_per_second": round(2 * 2048**3 / seconds["product of 2048"]),
    }
    report(result, options.out)


if __name__ == "__main__":
    main()
