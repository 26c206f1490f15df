"""Dense models become experts: the same logits, and every expert learns."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
)

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.cast import Cast
from deepseek_latent.conversion.source import Source
from deepseek_latent.conversion.upcycle import Upcycle
from tests.conversion.sources import save_source
from tests.support import NATIVE, random_ids, relative_error, tiny_model

UPCYCLED = {
    "M0": ("--shared-experts", "2", "--routed-experts", "6", "--top-k", "2"),
    "M1": ("--routed-experts", "5", "--top-k", "5"),
    "M2": ("--routed-experts", "4", "--top-k", "2"),
    "M3": ("--routed-experts", "12", "--groups", "3", "--top-k", "4"),
    "M3, two groups": ("--routed-experts", "12", "--groups", "3", "--top-k", "8"),
    "M4": ("--routed-experts", "12", "--groups", "3", "--top-k", "8"),
    "M5": ("--shared-experts", "2", "--routed-experts", "9", "--groups", "3", "--top-k", "3"),
    "M5, with padding": ("--shared-experts", "3", "--routed-experts", "8", "--groups", "2", "--top-k", "8"),
}


def upcycle(source: Path, out: Path, scheme: str) -> Path:
    command = ["convert", "upcycle", str(source), str(out), "--scheme", scheme[:2], *UPCYCLED[scheme]]
    assert main(command) == 0
    return out


@pytest.mark.parametrize("scheme", UPCYCLED)
@torch.no_grad()
def test_a_dense_model_cut_into_experts_gives_the_same_logits(tmp_path, scheme):
    ids, dense = random_ids(2, 50), tiny_model(n_routed_experts=None)
    dense.save_pretrained(tmp_path / "source")
    out = upcycle(tmp_path / "source", tmp_path / "out", scheme)
    expected = dense(ids).logits
    model = AutoModelForCausalLM.from_pretrained(out)
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["DeepseekV2MLP"] + 2 * ["DeepseekV2MoE"]
    assert relative_error(model(ids).logits, expected) < 2e-6
    assert main(["verify", str(out), "--against", str(tmp_path / "source")]) == 0
    # transformers' own class always has shared experts, and does not normalize gate weights
    if scheme[:2] in ("M0", "M5"):
        stock = NATIVE.DeepseekV2ForCausalLM.from_pretrained(out)
        assert relative_error(stock(ids).logits, expected) < 1e-5


@pytest.mark.parametrize("scheme", ["M0", "M1", "M5, with padding"])
def test_the_reported_fraction_of_zeros_is_that_of_the_parts_that_hold_the_dense_neurons(tmp_path, capsys, scheme):
    tiny_model(n_routed_experts=None).save_pretrained(tmp_path / "source")
    out, command = tmp_path / "out", ["convert", "upcycle", str(tmp_path / "source"), str(tmp_path / "out"), "--json"]
    capsys.readouterr()
    assert main([*command, "--scheme", scheme[:2], *UPCYCLED[scheme]]) == 0
    reported = json.loads(capsys.readouterr().out)["fraction of neurons that are zeros"]
    tensors = load_file(out / "model.safetensors")
    # each part once: routed experts of M0 repeat the shared ones, and the groups of M5 repeat each other
    num_routed = {"M0": 0, "M1": 5, "M5": 4}[scheme[:2]]
    parts = [tensors[f"model.layers.1.mlp.experts.{i}.gate_proj.weight"] for i in range(num_routed)]
    if scheme[:2] != "M1":
        parts.append(tensors["model.layers.1.mlp.shared_experts.gate_proj.weight"])
    rows = torch.cat(parts)
    is_zero = (rows == 0).all(dim=1)
    assert len(rows) - is_zero.sum() == 88
    assert reported == pytest.approx(is_zero.double().mean().item())


@torch.no_grad()
def test_any_choice_of_whole_groups_gives_the_same_logits(tmp_path):
    """A zero router chooses an arbitrary group; any other choice gives the same sum."""
    ids, dense = random_ids(2, 50), tiny_model(n_routed_experts=None)
    dense.save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(upcycle(tmp_path / "source", tmp_path / "out", "M3"))
    for layer in model.model.layers[1:]:
        layer.mlp.gate.weight.copy_(torch.tensor([0.0, 0.0, 1e-6]).repeat_interleave(4)[:, None].expand(12, 72))
    assert relative_error(model(ids).logits, dense(ids).logits) < 1e-4
    for layer in model.model.layers[1:]:
        layer.mlp.gate.routed_scaling_factor *= 2
    assert relative_error(model(ids).logits, dense(ids).logits) > 1e-2


@torch.no_grad()
def test_a_llama_becomes_latent_attention_and_experts_in_one_step_and_learns(tmp_path):
    source, ids = save_source(tmp_path / "source", LlamaConfig, num_key_value_heads=1), random_ids(4, 40)
    model = AutoModelForCausalLM.from_pretrained(upcycle(tmp_path / "source", tmp_path / "out", "M5"))
    assert relative_error(model(ids).logits, source(ids).logits) < 1e-5
    with torch.enable_grad():
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
    for name in ("experts.gate_up_proj", "experts.down_proj", "shared_experts.up_proj.weight", "gate.weight"):
        assert model.get_parameter(f"model.layers.1.mlp.{name}").grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("M3", "--routed-experts", "10", "--groups", "3", "--top-k", "4"),
            ("whole groups", "3 groups", "change --groups or --top-k"),
        ),
        (
            ("M5", "--routed-experts", "12", "--groups", "3", "--top-k", "4"),
            ("at least one shared", "add --shared-experts"),
        ),
        (("M1", "--routed-experts", "5", "--top-k", "4"), ("top-k of 5", "change --top-k")),
        (("M2", "--routed-experts", "5", "--top-k", "4", "--groups", "5"), ("no groups", "leave out --groups")),
        (("M2", "--routed-experts", "5", "--top-k", "4", "--dense-layers", "3"), ("layers that stay dense",)),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_the_scheme_are_refused(tmp_path, capsys, options, words):
    save_source(tmp_path / "source", LlamaConfig)
    scheme, *rest = options
    assert main(["convert", "upcycle", str(tmp_path / "source"), str(tmp_path / "out"), "--scheme", scheme, *rest]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in words), error


def test_a_model_with_experts_is_not_upcycled(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "source")
    command = ["convert", "upcycle", str(tmp_path / "source"), str(tmp_path / "out"), "--scheme", "M2"]
    assert main([*command, "--routed-experts", "4", "--top-k", "2"]) == 2
    assert "dense" in capsys.readouterr().err


@torch.no_grad()
def test_noise_and_reinitialized_neurons_make_experts_differ_and_the_error_is_reported(tmp_path, capsys):
    ids, dense = random_ids(2, 50), tiny_model(n_routed_experts=None)
    dense.save_pretrained(tmp_path / "source")
    for name, options in {"noise": ["--router-noise", "0.01"], "redrawn": ["--reinitialize", "0.5"]}.items():
        out = tmp_path / name
        command = ["convert", "upcycle", str(tmp_path / "source"), str(out), "--scheme", "M3", *UPCYCLED["M3"]]
        capsys.readouterr()
        assert main([*command, *options, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        model = AutoModelForCausalLM.from_pretrained(out)
        error = (model(ids).logits - dense(ids).logits).abs().max() / dense(ids).logits.abs().max()
        # measured on other random tokens, so only the order of magnitude is the same
        assert 0.3 < report["relative error of logits, not exact"] / error < 3
        experts = model.model.layers[1].mlp.experts.gate_up_proj
        twins = experts[: len(experts) // 3], experts[len(experts) // 3 : 2 * len(experts) // 3]
        assert torch.equal(*twins) == (name == "noise")
        assert "not exact" in (out / "README.md").read_text()


@torch.no_grad()
def test_reinitializing_experts_that_add_nothing_is_exact(tmp_path, capsys):
    ids, dense = random_ids(2, 50), tiny_model(n_routed_experts=None)
    dense.save_pretrained(tmp_path / "source")
    command = ["convert", "upcycle", str(tmp_path / "source"), str(tmp_path / "out"), "--scheme", "M0"]
    assert main([*command, *UPCYCLED["M0"], "--reinitialize", "1", "--router-noise", "0.1", "--json"]) == 0
    assert not any("not exact" in name for name in json.loads(capsys.readouterr().out))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative_error(model(ids).logits, dense(ids).logits) < 2e-6
    redrawn = model.model.layers[1].mlp.experts.gate_up_proj
    assert len({tuple(expert[0, :4].tolist()) for expert in redrawn}) == len(redrawn)


def test_the_projections_of_a_redrawn_expert_are_drawn_independently(tmp_path):
    tiny_model(n_routed_experts=None).save_pretrained(tmp_path / "source")
    dense = Cast(Source(tmp_path / "source"), None)
    upcycled = Upcycle(dense, "M2", e=2, shared=0, k=1, groups=1, reinitialized=1.0)
    made = {piece.name: piece.make() for piece in upcycled.pieces() if ".experts.1." in piece.name}
    gate, up, down = (made[f"model.layers.2.mlp.experts.1.{name}_proj.weight"] for name in ("gate", "up", "down"))
    drawn = torch.stack((gate.flatten(), up.flatten(), down.T.flatten()))
    # 6,336 elements: the spread of a correlation by chance is 0.013
    assert (drawn.corrcoef() - torch.eye(3)).abs().max() < 0.1


@pytest.mark.parametrize("options", [["--router-noise", "-1"], ["--router-noise", "nan"], ["--reinitialize", "1.5"]])
def test_noise_out_of_range_is_refused(tmp_path, capsys, options):
    save_source(tmp_path / "source", LlamaConfig)
    command = ["convert", "upcycle", str(tmp_path / "source"), str(tmp_path / "out"), "--scheme", "M2"]
    assert main([*command, "--routed-experts", "4", "--top-k", "2", *options]) == 2
    assert "expected router noise of 0 or more" in capsys.readouterr().err
