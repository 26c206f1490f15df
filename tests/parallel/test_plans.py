"""Two gloo processes compute what one does, in tensor, expert and pipeline parallelism by transformers' own plans."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepseek_latent import LatentCache
from tests.parallel.launch import run
from tests.support import random_ids, tiny_model

pytestmark = pytest.mark.parallel


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
    run("plans_program.py", tmp_path, sizes, processes=2)
