"""Times LoRA on routed experts: python -m benchmarks.expert_lora --out benchmarks/results/expert_lora.json

Two layers with experts of V2-Lite's widths in bfloat16 and LoRA (r = 16) on all routed experts, in this package and in
stock peft on transformers' own class with the same weights and adapters: a training step of 512 tokens, and one decoded
token without merging the adapter. Losses, gradients and logits are compared first, then both sides are timed in turn.
Memory is the peak of each side in a process of its own, minus what was resident before the step. The vocabulary is
small, since lm_head would otherwise dominate the step and is the same on both sides.
"""

import argparse
import statistics
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import DynamicCache

from deepseek_latent import LatentCache
from deepseek_latent.compat.cache_name import CACHE

from .lite4 import build
from .machine import alternated, described, report
from .train import SIDES, adapted, compared, peak, peak_elsewhere

LAYERS = {"num_hidden_layers": 2, "first_k_dense_replace": 0, "vocab_size": 1024}
LORA = LoraConfig(r=16, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
CACHED = 128  # tokens before the decoded one


@torch.no_grad()
def decode(model: nn.Module, cache: DynamicCache) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[17]]), **{CACHE: cache}).logits
    cache.crop(-1)
    return logits


@torch.no_grad()
def prefill(model: nn.Module, cache: DynamicCache) -> DynamicCache:
    model(input_ids=torch.arange(CACHED)[None], **{CACHE: cache})
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--here", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(peak(adapted(build(options.here, **LAYERS), LORA), options.tokens))
        return
    memory = {side: peak_elsewhere("expert_lora", "--here", side, "--tokens", str(options.tokens)) for side in SIDES}
    ours = build("ours", **LAYERS)
    models = {"native": adapted(build("native", weights=ours, **LAYERS), LORA), "ours": adapted(ours, LORA)}
    agreement, training = compared(models, options.tokens, options.repetitions)
    caches = {"native": prefill(models["native"].eval(), DynamicCache())}
    caches["ours"] = prefill(models["ours"].eval(), LatentCache(ours.config))
    logits = [decode(models[side], caches[side]).float() for side in SIDES]
    difference = ((logits[0] - logits[1]).norm() / logits[0].norm()).item()
    assert difference < 0.05, f"logits differ by {difference}"
    turns = {side: lambda side=side: decode(models[side], caches[side]) for side in SIDES}
    decoding = {name: statistics.median(x) for name, x in alternated(turns, 10 * options.repetitions).items()}
    result = described("python -m benchmarks.expert_lora") | {
        "model": f"2 layers of V2-Lite's experts, bfloat16, LoRA r=16 on all routed experts, {options.tokens} tokens",
        **agreement,
        "logits_relative_difference": round(difference, 4),
        "step_seconds": {side: round(training[side], 3) for side in SIDES},
        "step_times_faster_than_stock_peft": round(training["native"] / training["ours"], 2),
        "memory_above_weights_bytes": memory,
        "memory_of_stock_peft": round(memory["ours"] / memory["native"], 2),
        "decode_milliseconds": {side: round(1e3 * decoding[side], 2) for side in SIDES},
        "decode_times_faster_than_stock_peft": round(decoding["native"] / decoding["ours"], 1),
        "float32_flop_per_second": round(2 * 2048**3 / training["product of 2048"]),
    }
    report(result, options.out)


if __name__ == "__main__":
    main()
