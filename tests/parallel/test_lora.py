"""LoRA on all linear layers and on routed experts, in one process and in several that share the model."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as native

from tests.parallel.launch import run
from tests.support import random_ids, relative_error, tiny_model

pytestmark = pytest.mark.parallel
ATTENTION = "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj"
ALL = f"{ATTENTION},gate_proj,up_proj,down_proj"
MESHES = [
    {"tp_size": 2},
    {"tp_size": 2, "ep_size": 2},
    {"fsdp_size": 2, "ep_size": 2},
    {"fsdp_size": 2},
    {"fsdp_size": 4, "ep_size": 4},
    {"fsdp_size": 4, "ep_size": 2},
]


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    """A checkpoint, and by bits what one process finds."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(num_attention_heads=4).save_pretrained(folder)
    torch.save(random_ids(4, 9), folder / "ids.pt")
    made: dict[int, Path] = {}

    def found(bits: int) -> tuple[Path, Path]:
        if bits not in made:
            made[bits] = folder / f"one-{bits}"
            made[bits].mkdir()
            run("lora_program.py", folder, made[bits], {}, bits, ALL, processes=1)
        return folder, made[bits]

    return found


def processes_of(sizes: dict) -> int:
    return sizes.get("tp_size", 1) * sizes.get("fsdp_size", 1)


# packed, tensor parallelism alone rounds other groups: it divides the rows that share a scale
PACKED = [{"tp_size": 2, "ep_size": 2}, {"fsdp_size": 4, "ep_size": 2}]


@pytest.mark.parametrize(("sizes", "bits"), [(x, 16) for x in MESHES] + [(x, 8) for x in PACKED], ids=str)
def test_gradients_logits_and_files_are_those_of_one_process(sizes, bits, of_one_process, tmp_path):
    folder, expected = of_one_process(bits)
    run("lora_program.py", folder, tmp_path, sizes, bits, ALL, processes=processes_of(sizes))
    one, several = (torch.load(path / "found.pt") for path in (expected, tmp_path))
    assert one.keys() == several.keys()
    assert sum(".experts." in name for name in one) == 8
    share, tokens = several.pop("bytes of codes"), several.pop("tokens")
    assert share == one.pop("bytes of codes") // sizes.get("ep_size", 1)
    assert torch.equal(tokens, one.pop("tokens"))
    errors = {name: relative_error(several[name], one[name]) for name in one}
    assert max(errors.values()) < 1e-6, errors
    adapters = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (expected, tmp_path)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_an_adapter_of_several_processes_opens_in_stock_transformers(of_one_process, tmp_path):
    folder, _ = of_one_process(16)
    run("lora_program.py", folder, tmp_path, {"tp_size": 2, "ep_size": 2}, 16, ATTENTION, processes=2)
    found, ids = torch.load(tmp_path / "found.pt"), torch.load(folder / "ids.pt")
    base = native.DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert relative_error(model(ids).logits, found["logits"]) < 1e-6
