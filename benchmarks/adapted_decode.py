"""Times decoding with adapters that are not merged: python -m benchmarks.adapted_decode

Lite-4 in bfloat16 decodes one token, in plain torch and after `optimize_for_inference`: without adapters, and with LoRA
(r = 16) on the projections of attention, then also on dense and shared MLPs, then also on routed experts. All variants
are timed in turn in one process. Before that, the logits of each variant are compared with those of a pass with
gradients, which calls every module, and the adapter must change them.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from deepseek_latent import lora_config
from deepseek_latent.kernels import optimize_for_inference

from .decode import decode
from .lite4 import build, filled, twin
from .machine import alternated, described, report
from .train import PROJECTIONS, adapted

ADAPTERS = {
    "attention": lambda config: LoraConfig(r=16, target_modules=PROJECTIONS),
    "attention and MLPs": lora_config,
    "all with routed experts": partial(lora_config, routed_experts=True),
}


def sides() -> dict[str, PreTrainedModel | PeftModel]:
    """Builds all variants, which share one set of weights."""
    bare = build("ours")
    made = {"bare": bare} | {name: adapted(twin(bare), config(bare.config)).eval() for name, config in ADAPTERS.items()}
    with_kernels = {"bare": twin(bare)}
    with_kernels |= {name: adapted(twin(bare), config(bare.config)).eval() for name, config in ADAPTERS.items()}
    for model in with_kernels.values():
        print(optimize_for_inference(model))
    return {f"{name}, plain": x for name, x in made.items()} | {
        f"{name}, kernels": x for name, x in with_kernels.items()
    }


def check(models: dict[str, PreTrainedModel | PeftModel]) -> dict[str, float]:
    """Compares decoding with a pass with gradients, checks that adapters act, and returns relative differences."""
    ids = torch.randint(0, 1000, (1, 12), generator=torch.Generator().manual_seed(0))
    expected, decoded = {}, {}
    for name, model in models.items():
        with torch.enable_grad():
            expected[name] = model(input_ids=ids).logits[:, -1].detach().float()
        cache = filled(model, 0, None)
        model(input_ids=ids[:, :-1], cache=cache)
        decoded[name] = model(input_ids=ids[:, -1:], cache=cache).logits[:, -1].float()
    differences = {}
    for name in models:
        error = ((decoded[name] - expected[name]).norm() / expected[name].norm()).item()
        assert error < 0.05, f"{name} differs by {error}"
        bare = expected["bare, plain"]
        effect = ((expected[name] - bare).norm() / bare.norm()).item()
        assert name.startswith("bare") or effect > 2 * error, f"{name}: the adapter does not act ({effect})"
        differences[name] = round(error, 4)
    return differences


@torch.no_grad()
def measure(context: int, repetitions: int) -> dict:
    models, token = sides(), torch.tensor([[17]])
    differences = check(models)
    caches = {name: filled(model, context, None) for name, model in models.items()}
    turns = {name: partial(decode, model, caches[name], token) for name, model in models.items()}
    seconds = {name: statistics.median(x) for name, x in alternated(turns, repetitions).items()}
    speed = {name: seconds[f"bare, {name.rpartition(', ')[2]}"] / x for name, x in seconds.items()}
    return {
        "relative_difference": differences,
        "milliseconds": {name: round(1e3 * x, 2) for name, x in seconds.items()},
        "speed_of_the_bare_model": {name: round(x, 3) for name, x in speed.items() if not name.startswith("bare")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    result = described("python -m benchmarks.adapted_decode") | {
        "model": "Lite-4, bfloat16",
        "context": options.context,
    }
    result |= measure(options.context, options.repetitions)
    report(result, options.out)


if __name__ == "__main__":
    main()
