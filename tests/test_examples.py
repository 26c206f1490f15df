"""The checkpoint examples/pydoc-tiny is as its card describes it, and the program that made it still runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_latent import DeepseekV2ForCausalLM
from deepseek_latent.commands.__main__ import main
from tests.support import NATIVE, relative_error

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "pydoc-tiny"
FIGURES = json.loads((FOLDER / "training.json").read_text())
WINDOW = 256


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def windows(tokenizer):
    """The held-out text in the windows of the training program, [windows s]."""
    topics = (FOLDER / "held_out.txt").read_text().split("\f")
    rows = tokenizer(topics, verbose=False)["input_ids"]
    tokens = torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def nats_per_token(model, windows, **options) -> float:
    with torch.no_grad():
        logits = torch.cat([model(part, **options).logits[:, :-1] for part in windows.split(8)]).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def test_every_mechanism_is_used_and_all_widths_differ(model):
    config = model.config
    assert None not in (config.q_lora_rank, config.n_shared_experts, config.n_routed_experts)
    assert config.first_k_dense_replace == 1
    assert config.topk_method == "group_limited_greedy"
    assert 1 < config.topk_group < config.n_group
    assert config.rope_parameters["rope_type"] == "yarn"
    names = "hidden_size q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim intermediate_size"
    widths = [getattr(config, name) for name in [*names.split(), "moe_intermediate_size"]]
    assert len(set(widths)) == len(widths)
    assert all(width % 8 == 0 for width in widths)


def test_the_checkpoint_is_small_and_in_the_official_layout(capsys):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 12e6
    assert main(["inspect", str(FOLDER)]) == 0
    assert f"{FIGURES['parameters']:,}" in capsys.readouterr().out


def test_held_out_loss_is_the_one_on_the_card(model, windows):
    assert model.dtype == torch.bfloat16
    assert nats_per_token(model, windows) == pytest.approx(FIGURES["model_nats_per_token"], abs=0.01)
    assert f"{FIGURES['model_nats_per_token']:.3f}" in (FOLDER / "README.md").read_text()


def test_the_model_is_clearly_better_than_n_grams():
    assert FIGURES["model_nats_per_token"] < FIGURES["bigram_nats_per_token"] - 0.5
    assert FIGURES["bigram_nats_per_token"] < FIGURES["unigram_nats_per_token"]


def test_transformers_own_class_reads_the_same_weights_and_computes_the_same(windows):
    ours = DeepseekV2ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    native = NATIVE.DeepseekV2ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(ours(windows[:4]).logits, native(windows[:4]).logits) < 1e-5


def test_decoding_trained_weights_from_latents_loses_nothing(windows):
    """Logits of real text, computed token by token from the cache, equal those of the whole window."""
    model, window = DeepseekV2ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32), windows[:2, :96]
    with torch.no_grad():
        cache, logits = None, []
        for token in window.split(1, dim=1):
            output = model(token, cache=cache, use_cache=True)
            cache = output.cache
            logits.append(output.logits)
        assert relative_error(torch.cat(logits, dim=1), model(window).logits) < 1e-5


def test_no_expert_is_idle_or_crowded(model, windows):
    with torch.no_grad():
        recorded = model(windows[:8], output_router_logits=True).router_logits
    for logits in recorded:
        # by score alone, since the group limit changes few choices
        experts = logits.topk(model.config.num_experts_per_tok).indices
        share = torch.bincount(experts.flatten(), minlength=model.config.n_routed_experts) / experts.numel()
        assert share.min() > 0.1 / model.config.n_routed_experts
        assert share.max() < 4 / model.config.n_routed_experts


def test_the_first_loss_of_a_training_is_that_of_the_checkpoint(windows):
    """So DPO starts from ln 2, and an adapter from the loss on the card."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    losses = [nats_per_token(mode(), windows[:4]) for mode in (model.eval, model.train)]
    assert losses[0] == losses[1]


def test_text_survives_the_tokenizer(tokenizer):
    text = "def f(x: int) -> str:\n\treturn 'naïve €' * x  # ∀"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(tokenizer) == 2048


def test_the_training_program_makes_a_checkpoint_that_loads(tmp_path):
    out = tmp_path / "made"
    command = [sys.executable, "examples/train_tiny.py", "--steps", "1", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    figures = json.loads((out / "training.json").read_text())
    # one step from random weights is hardly better than a uniform guess
    assert figures["model_nats_per_token"] > 0.9 * math.log(2048)
    assert figures["bigram_nats_per_token"] < figures["unigram_nats_per_token"] < figures["model_nats_per_token"]
    made = AutoModelForCausalLM.from_pretrained(out)
    assert made.num_parameters() == FIGURES["parameters"]
    assert made.config.attention_dropout == 0
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists; name another folder with --out, or write into it with --force" in again.stderr
