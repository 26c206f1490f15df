"""Two gloo processes compute what one does, in tensor, expert and pipeline parallelism by transformers' own plans."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepseek_latent import LatentCache
from tests.support import random_ids, tiny_model

PROGRAM = """
import sys, torch, torch.distributed as dist
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
        assert "its forward was replaced before, as tensor parallelism does" in str(error), error
    else:
        raise AssertionError("layers would still multiply by weights that were removed")
    with torch.no_grad():
        assert torch.equal(model(given["ids"]).logits, logits)
    optimize_for_inference(model)
    with torch.no_grad():
        assert (model(given["ids"]).logits - logits).abs().max() < 1e-5 * logits.abs().max()
dist.destroy_process_group()
"""


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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "program.py"), str(tmp_path), str(sizes)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 300}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout[-3000:]
