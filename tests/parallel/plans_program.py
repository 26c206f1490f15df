"""Generates on a model that processes share: python plans_program.py FOLDER SIZES

given.pt in FOLDER holds what one process found.
"""

import ast
import sys

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import deepseek_latent
from deepseek_latent.kernels import optimize_for_inference
from tests.parallel.launch import finish

folder, sizes = sys.argv[1], ast.literal_eval(sys.argv[2])
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
    # some layers would be rounded, and others not
    with pytest.raises(ValueError, match="these are split over processes"):
        optimize_for_inference(model, "int8")
    with torch.no_grad():
        assert torch.equal(model(given["ids"]).logits, logits)
    optimize_for_inference(model)
    with torch.no_grad():
        assert (model(given["ids"]).logits - logits).abs().max() < 1e-5 * logits.abs().max()
finish()
