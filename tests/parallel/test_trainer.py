"""Trainer on several processes trains an adapter as it does in one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.launch import run
from tests.support import random_ids, relative_error, tiny_model

pytestmark = pytest.mark.parallel


def test_an_adapter_with_routed_experts_is_trained_as_in_one_process(tmp_path):
    tiny_model(num_attention_heads=4).save_pretrained(tmp_path)
    torch.save(random_ids(12, 9), tmp_path / "ids.pt")
    runs = {"one": {}, "two": {"fsdp_size": 2, "ep_size": 2}}
    for name, sizes in runs.items():
        (tmp_path / name).mkdir()
        run("trainer_program.py", tmp_path, tmp_path / name, sizes, processes=sizes.get("fsdp_size", 1))
    one, two = (json.loads((tmp_path / name / "log.json").read_text()) for name in runs)
    for step in range(3):
        for field in ("loss", "grad_norm"):
            assert two[step][field] == pytest.approx(one[step][field], rel=1e-6)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in runs)
    assert one.keys() == two.keys()
    assert max(relative_error(two[name], one[name]) for name in one) < 1e-6
