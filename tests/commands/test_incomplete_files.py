"""Commands that run a model refuse files that hold another model than config.json says, and print nothing else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from deepseek_latent.commands.__main__ import main
from tests.commands.terminal import assert_refused
from tests.conversion.sources import save_source


def changed(folder, tmp_path, without=(), added=None, **config):
    """A copy of a checkpoint with other tensors and another config."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    tensors = load_file(copy / "model.safetensors")
    tensors = {name: x for name, x in tensors.items() if name not in without} | (added or {})
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | config))
    return copy


# what is changed, and what the refusal names
OTHER_FILES = {
    "no head": ({"without": ["lm_head.weight"]}, "lm_head.weight is missing"),
    "shared experts under a config without": ({"n_shared_experts": None}, "shared_experts"),
    "a head of another size": (
        {"added": {"lm_head.weight": torch.zeros(97, 72)}},
        "lm_head.weight has shape [97, 72], expected [264, 72]",
    ),
    "a layer more than the config": ({"num_hidden_layers": 2}, "model.layers.2."),
    "a tensor of another model": ({"added": {"vision.weight": torch.zeros(2)}}, "vision.weight is unexpected"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.parametrize("command", ["generate", "experts"])
def test_a_model_that_the_files_do_not_hold_is_not_run(folder, tmp_path, capsys, command, kind):
    changes, named = OTHER_FILES[kind]
    other = changed(folder, tmp_path, **changes)
    (tmp_path / "text").write_text("latent attention")
    rest = ["latent"] if command == "generate" else ["--text", tmp_path / "text"]
    capsys.readouterr()
    assert_refused(capsys, command, other, *rest, saying=named)


def test_tied_embeddings_need_no_head_in_the_files(folder, tmp_path, capsys):
    tied = changed(folder, tmp_path, without=["lm_head.weight"], tie_word_embeddings=True)
    assert main(["generate", str(tied), "latent", "--max-new-tokens", "2", "--device", "cpu"]) == 0


def test_verify_refuses_a_source_whose_files_hold_another_model(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    other = changed(tmp_path / "source", tmp_path, without=["lm_head.weight"])
    capsys.readouterr()
    assert_refused(capsys, "verify", tmp_path / "out", "--against", other, saying="expected lm_head.weight")


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(folder, tmp_path, monkeypatch):
    """Older releases of transformers load such a tokenizer without its code, later ones refuse it."""
    other = changed(folder, tmp_path)
    content = json.loads((other / "tokenizer_config.json").read_text())
    content |= {"auto_map": {"AutoTokenizer": [None, "tokens.Tokens"]}, "tokenizer_class": "Tokens"}
    (other / "tokenizer_config.json").write_text(json.dumps(content))
    (other / "tokens.py").write_text("raise SystemExit('code of the checkpoint was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the command asks a question"))
    assert main(["generate", str(other), "latent", "--max-new-tokens", "2", "--device", "cpu"]) in (0, 2)
