"""Two gloo processes compute what one does, in tensor, expert and pipeline parallelism by transformers' own plans."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepseek_latent import LatentCache
from tests.support import random_ids, relative_error, tiny_model

PROGRAM = """
import os, sys, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import deepseek_latent
from deepseek_latent.kernels import optimize_for_inference
from torch.utils.flop_counter import FlopCounterMode

folder, sizes = sys.argv[1], eval(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))
assert type(model) is deepseek_latent.DeepseekV2ForCausalLM
given = torch.load(folder + "/given.pt")
with torch.no_grad():
    logits = model(given["ids"]).logits
tokens = model.generate(given["ids"], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
if dist.get_rank() == 0:
    error = (logits - given["logits"]).abs().max() / given["logits"].abs().max()
    assert error < 1e-5, error
    assert torch.equal(tokens, given["tokens"]), (tokens, given["tokens"])
if sizes == {"tp_size": 2}:
    cache = deepseek_latent.LatentCache(model.config)
    with torch.no_grad():
        model(given["long"][:, :-1], cache=cache)
        with FlopCounterMode(display=False) as counter:
            last = model(given["long"][:, -1:], cache=cache).logits
    assert (last - given["last"]).abs().max() < 1e-5 * given["last"].abs().max()
    # each process computes half of the heads; the work that both do is small
    assert counter.get_total_flops() < 0.51 * given["flops"], counter.get_total_flops() / given["flops"]
    try:
        optimize_for_inference(model, "int8")
    except ValueError as error:
        assert "these are split over processes" in str(error), error
    else:
        raise AssertionError("some layers would be rounded, and others not")
    with torch.no_grad():
        assert torch.equal(model(given["ids"]).logits, logits)
    optimize_for_inference(model)
    with torch.no_grad():
        assert (model(given["ids"]).logits - logits).abs().max() < 1e-5 * logits.abs().max()
dist.barrier()
# gloo's threads may abort a process that ends as usual
os._exit(0)
"""


# writes the loss and gradients of LoRA, in float64 and with factors that depend on their names only
GRADIENTS = """
import os, sys, torch, torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import deepseek_latent

folder, file, sizes = sys.argv[1], sys.argv[2], eval(sys.argv[3])
given = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **given)
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=sys.argv[4].split(",")))
for name, parameter in model.named_parameters():
    if "lora_" in name:
        torch.manual_seed(sum(map(ord, name)))
        value = 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.data.copy_(value)
ids = torch.load(folder + "/ids.pt")
loss = model(ids, labels=ids).loss
loss.backward()
found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
found = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}
if not sizes or dist.get_rank() == 0:
    torch.save(found | {"loss": loss.detach()}, file)
if sizes:
    dist.barrier()
    os._exit(0)
"""
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
MLPS = ["gate_proj", "up_proj", "down_proj"]


def run(program: Path, *arguments: str, processes: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, *launcher, str(program), *arguments], **options)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["kv_a_proj_with_mqa"], ATTENTION + MLPS], ids=["kv_a", "all"])
def test_gradients_of_lora_under_tensor_parallelism_are_those_of_one_process(targets, tmp_path):
    tiny_model(num_attention_heads=4).save_pretrained(tmp_path)
    torch.save(random_ids(2, 9), tmp_path / "ids.pt")
    (tmp_path / "program.py").write_text(GRADIENTS)
    found = []
    for name, sizes in (("one", {}), ("two", {"tp_size": 2})):
        given = str(tmp_path), str(tmp_path / name), str(sizes), ",".join(targets)
        run(tmp_path / "program.py", *given, processes=2 if sizes else 1)
        found.append(torch.load(tmp_path / name))
    one, two = found
    assert one.keys() == two.keys()
    assert len(one) > 2 * len(targets)
    errors = {name: relative_error(two[name], one[name]) for name in one}
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"pp_size": 2}], ids=str)
def test_two_processes_compute_what_one_does(sizes, tmp_path):
    model, ids = tiny_model(num_attention_heads=4), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    long, cache = random_ids(1, 2000), LatentCache(model.config)
    with torch.no_grad():
        model(long[:, :-1], cache=cache)
        with FlopCounterMode(display=False) as counter:
            last = model(long[:, -1:], cache=cache).logits
    given = {"ids": ids, "logits": logits, "tokens": tokens, "long": long, "last": last}
    torch.save(given | {"flops": counter.get_total_flops()}, tmp_path / "given.pt")
    (tmp_path / "program.py").write_text(PROGRAM)
    run(tmp_path / "program.py", str(tmp_path), str(sizes), processes=2)
