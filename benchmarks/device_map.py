"""The cost of a decoded token with a device_map or tensor parallelism: python -m benchmarks.device_map

A model with V2-Lite's attention in 2 layers and narrow dense MLPs decodes one token over 16,384 cached ones, in float32
on the CPU. Sides: one device; hooks on every layer that move nothing, as with a `device_map` over several devices; the
second layer on disk; one rank of two tensor-parallel gloo processes, which split the heads; transformers' own class on
one device. The results are milliseconds, timed in turn (not for the two processes, which share this machine's cores),
and the floating-point operations that torch counts. The logits of all sides are compared.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

from deepseek_latent import DeepseekV2ForCausalLM

from .decode import as_native, decode
from .lite4 import build, filled
from .machine import alternated, described, report

CACHED = 16384
WIDTHS = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "vocab_size": 1024, "intermediate_size": 1024}
TOKEN = torch.tensor([[17]])


@torch.no_grad()
def counted(model: nn.Module, cache: DynamicCache) -> tuple[Tensor, int]:
    """The logits of one token, and the number of floating-point operations for it."""
    with FlopCounterMode(display=False) as counter:
        logits = decode(model, cache, TOKEN)
    return logits, counter.get_total_flops()


def on_disk(folder: str) -> nn.Module:
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.1": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=f"{folder}/offloaded")


def rank_of_two(folder: str) -> None:
    """Counts operations in one of two processes; the first process writes its result beside the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    logits, flops = counted(model, filled(model, CACHED, None))
    if dist.get_rank() == 0:
        torch.save({"logits": logits, "flops": flops}, f"{folder}/rank.pt")
    dist.destroy_process_group()


def by_two_processes(folder: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "benchmarks.device_map", "--rank-of", folder]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return torch.load(f"{folder}/rank.pt")


@torch.no_grad()
def measure(repetitions: int) -> dict[str, dict]:
    plain = build("ours", torch.float32, **WIDTHS)
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        models = {
            "one device": plain,
            "hooks on every layer": dispatch_model(
                DeepseekV2ForCausalLM.from_pretrained(folder), {"model": "cpu", "lm_head": "cpu"}, force_hooks=True
            ),
            "second layer on disk": on_disk(folder),
            "transformers' own class, one device": build("native", torch.float32, weights=plain, **WIDTHS),
        }
        caches = {name: filled(plain, CACHED, None) for name in models}
        caches["transformers' own class, one device"] = as_native(caches["one device"])
        found = {name: counted(model, caches[name]) for name, model in models.items()}
        two = by_two_processes(folder)
        found["one rank of two processes"] = two["logits"], two["flops"]
        exact, flops_of_one = found["one device"]
        steps = {name: lambda name=name: decode(models[name], caches[name], TOKEN) for name in models}
        seconds = alternated(steps, repetitions)
    rows = {}
    for name, (logits, flops) in found.items():
        error = ((logits - exact).abs().max() / exact.abs().max()).item()
        assert error < 1e-5, (name, error)
        rows[name] = {"mflop": round(flops / 1e6, 1), "of_one_device": round(flops / flops_of_one, 3), "error": error}
        if name in seconds:
            rows[name]["milliseconds"] = round(1e3 * statistics.median(seconds[name]), 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rank-of", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank_of_two(arguments.rank_of)
        return
    result = described("python -m benchmarks.device_map") | {"cached": CACHED, "rows": measure(arguments.repetitions)}
    report(result, arguments.out)


if __name__ == "__main__":
    main()
