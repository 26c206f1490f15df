"""Memory of conversions: python -m benchmarks.conversion_memory --out benchmarks/results/conversion_memory.json

A synthetic Llama of 20 GB in bfloat16 (random weights, shards of 2 GB) is written to a scratch folder and converted on
the command line. Each conversion is a separate process, which reports its peak resident memory. This takes 50 GB of
disk and ten minutes, and runs on Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlamaConfig

from .machine import described, resident

CONFIG = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
}
SHARD_BYTES = 2 * 10**9
COMMANDS = {
    "gqa-to-mla": "gqa-to-mla",
    "upcycle M5": "upcycle --scheme M5 --shared-experts 2 --routed-experts 14 --groups 1 --top-k 14",
    "upcycle M5, shards of 1 GB": "upcycle --scheme M5 --shared-experts 2 --routed-experts 14 --groups 1 --top-k 14 "
    "--max-shard-size 1GB",
}


def tensor_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    d, f, w, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], 128, CONFIG["vocab_size"]
    keys = CONFIG["num_key_value_heads"] * w
    layer = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (keys, d), "self_attn.v_proj": (keys, d)}
    layer |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    layer |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    named = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,), "lm_head.weight": (vocab, d)}
    return ends | named


def write_source(folder: Path, num_bytes: int) -> int:
    """Writes a source with as many layers as fit into `num_bytes`. Returns the bytes written."""
    per_layer = sum(2 * torch.Size(shape).numel() for name, shape in tensor_shapes(1).items() if ".layers." in name)
    layers = num_bytes // per_layer
    LlamaConfig(**CONFIG, num_hidden_layers=layers, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    noise, placed, shards, size = torch.randn(3 * CONFIG["intermediate_size"], 4096).bfloat16() / 64, {}, [{}], 0
    for name, shape in tensor_shapes(layers).items():
        if sum(2 * torch.Size(held).numel() for held in shards[-1].values()) > SHARD_BYTES * 0.9:
            shards.append({})
        shards[-1][name] = shape
    for i, held in enumerate(tqdm(shards, desc="writing the source")):
        file = f"model-{i:05}.safetensors"
        flat = noise.flatten()
        tensors = {name: flat[: torch.Size(shape).numel()].view(shape).clone() for name, shape in held.items()}
        save_file(tensors, folder / file)
        placed |= dict.fromkeys(held, file)
        size += sum(x.nbytes for x in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return size


def measure_peak(arguments: list[str]) -> int:
    """Runs a conversion in this process and returns the peak of its resident bytes."""
    from deepseek_latent.commands.__main__ import main

    assert main(["convert", *arguments]) == 0
    return resident("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument(
        "--scratch", type=Path, help="a folder with 50 GB of free space; default: the folder for temporary files"
    )
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--convert", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        print(json.dumps(measure_peak(options.convert)))
        return
    result = described("python -m benchmarks.conversion_memory") | {"rows": {}}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        source, out = Path(scratch, "source"), Path(scratch, "out")
        source.mkdir()
        result["source_bytes"] = write_source(source, int(options.gigabytes * 1e9))
        for name, command in COMMANDS.items():
            kind, *rest = command.split()
            own = [
                sys.executable,
                "-m",
                "benchmarks.conversion_memory",
                "--convert",
                kind,
                str(source),
                str(out),
                *rest,
            ]
            start = time.perf_counter()
            done = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True)
            peak = int(done.stdout.splitlines()[-1])
            result["rows"][name] = {"peak_bytes": peak, "seconds": round(time.perf_counter() - start)}
            print(name, result["rows"][name], flush=True)
            shutil.rmtree(out)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
