"""examples/heal.py brings a compressed model closer to its source, and leaves the constants of the conversion alone."""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.calibration import Calibration
from deepseek_latent.conversion.compress import CompressedMla
from deepseek_latent.conversion.compression_report import build_model
from deepseek_latent.conversion.llama_source import LlamaSource
from deepseek_latent.conversion.source import Source
from deepseek_latent.conversion.text import WINDOW_LENGTH
from tests.conversion.sources import SMALL, save_source
from tests.support import NATIVE, random_ids, relative_error, seeded
from tests.test_examples import FOLDER as TOKENIZER

ROOT = Path(__file__).parents[2]
TEXT = TOKENIZER / "held_out.txt"
RATES = {"attention": 3e-4, "lora": 3e-4, "everything": 1e-4}
STEPS = 16


@pytest.fixture(scope="module")
def healing():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        import healing

        yield healing


@pytest.fixture(scope="module", params=[LlamaConfig, Qwen2Config], ids=["Llama", "Qwen2"])
def models(request, tmp_path_factory):
    """A source and its compressed form. Qwen2 has biases in queries, and hence a latent of queries."""
    folder = tmp_path_factory.mktemp("source")
    source = save_source(folder, request.param, max_position_embeddings=WINDOW_LENGTH)
    with torch.no_grad():
        # random attention hardly matters to the logits
        source.lm_head.weight.mul_(4)
        for layer in source.model.layers:
            for name in ("q_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).weight.mul_(3)
    source.save_pretrained(folder)
    source = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    statistics = Calibration(source, LlamaSource(Source(folder)), random_windows(8, seed=1))
    return source, build_model(CompressedMla(Source(folder), statistics, r=8, c=48))


def random_windows(count: int, seed: int) -> torch.Tensor:
    return torch.randint(2, SMALL["vocab_size"], (count, WINDOW_LENGTH), generator=seeded(seed))


def constants(model) -> dict[str, torch.Tensor]:
    """What makes the norms of latents exact: their weights, the constant's bias and its row of zeros."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(("q_a_proj", "kv_a_proj_with_mqa")):
            row = module.bias.abs().argmax()
            found |= {f"{name}.bias": module.bias[row], f"{name}.weight": module.weight[row]}
        elif name.endswith("_a_layernorm"):
            found[f"{name}.weight"] = module.weight
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.mark.parametrize("trained", ["attention", "lora", "everything"])
def test_some_steps_reduce_the_divergence_and_change_no_constant(healing, monkeypatch, models, trained):
    # a clock on which every step takes a second
    monkeypatch.setattr(healing, "processor_seconds", itertools.count().__next__)
    teacher, student = models[0], copy.deepcopy(models[1])
    before, mlp = constants(student), student.model.layers[1].mlp.gate_proj.weight.detach().clone()
    assert len(before) == 3 * 3 * (2 if student.config.q_lora_rank else 1)
    held_out = random_windows(4, seed=2)
    model = healing.choose_parameters(student, trained)
    divergence = healing.divergence(model, teacher, held_out).item()
    torch.manual_seed(0)
    windows = healing.mix([random_windows(64, seed=3)])
    *_, last = healing.heal(model, teacher, windows, learning_rate=RATES[trained], batch=2, seconds=STEPS)
    assert (last["seconds"], last["tokens"]) == (STEPS, STEPS * 2 * WINDOW_LENGTH)
    assert healing.divergence(model, teacher, held_out).item() < 0.97 * divergence
    if trained == "lora":
        student = model.merge_and_unload()
    for name, tensor in constants(student).items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(student.model.layers[1].mlp.gate_proj.weight, mlp) == (trained != "everything")


@torch.no_grad()
def test_the_program_writes_a_checkpoint_that_stock_transformers_opens(tmp_path):
    source, compressed, out = (tmp_path / name for name in ("source", "compressed", "healed"))
    figures = tmp_path / "healing.json"
    save_source(source, LlamaConfig, max_position_embeddings=WINDOW_LENGTH, vocab_size=2048)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(source)
    widths = ["--kv-lora-rank", "12", "--qk-rope-head-dim", "4"]
    assert main(["convert", "gqa-to-mla", str(source), str(compressed), *widths, "--calibrate", str(TEXT)]) == 0
    command = [sys.executable, "examples/heal.py", str(compressed), str(source), str(out), "--texts", str(TEXT)]
    command += ["--evaluate", str(TEXT), "--minutes", "0.02", "--windows", "4", "--train", "lora"]
    command += ["--figures", str(figures)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    run = json.loads(figures.read_text())["4 + 12, lora, 0.02 minutes"]
    first, last = run["evaluated"][0], run["evaluated"][-1]
    assert (first["tokens"], last["tokens"]) == (0, len(run["divergence_of_steps"]) * 4 * WINDOW_LENGTH)
    assert f"{last['texts'][TEXT.name]['perplexity']:.2f}" in (out / "README.md").read_text()
    ids, ours = random_ids(2, 50), AutoModelForCausalLM.from_pretrained(out)
    assert relative_error(ours(ids).logits, NATIVE.DeepseekV2ForCausalLM.from_pretrained(out)(ids).logits) < 1e-5
    assert relative_error(ours(ids).logits, AutoModelForCausalLM.from_pretrained(compressed)(ids).logits) > 1e-4
    assert len(AutoTokenizer.from_pretrained(out)) == 2048
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists; name another folder" in again.stderr
