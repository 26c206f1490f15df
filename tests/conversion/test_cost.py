"""What a conversion costs is printed before the work, and is what it writes and caches."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from deepseek_latent import LatentCache
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion import target
from deepseek_latent.conversion.target import Piece
from tests.commands.terminal import byte_tokenizer
from tests.conversion.sources import save_source
from tests.support import tiny_model

MIXED = ["--scheme", "M3", "--routed-experts", "4", "--top-k", "2", "--groups", "2"]
SHARED = ["--scheme", "M5", "--routed-experts", "4", "--shared-experts", "1", "--top-k", "2", "--groups", "2"]
COMPRESSED = ["--kv-lora-rank", "24", "--qk-rope-head-dim", "16", "--calibrate", "text.txt"]
KINDS = {
    "exact": ("llama", ["gqa-to-mla"]),
    "exact, tied": ("tied", ["gqa-to-mla"]),
    "bias-free": ("llama", ["gqa-to-mla", "--bias-free"]),
    "compressed": ("llama", ["gqa-to-mla", *COMPRESSED]),
    "experts": ("llama", ["upcycle", *SHARED]),
    "experts, inexact": ("llama", ["upcycle", *MIXED, "--router-noise", "0.1"]),
    "experts of a DeepSeek-V2": ("dense", ["upcycle", *SHARED]),
    "cast": ("experts", ["cast", "--dtype", "bfloat16"]),
    "export": ("experts", ["export-deepseek", "--model-parallel", "2"]),
    "import": ("ranks", ["import-deepseek"]),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    save_source(folder / "llama", LlamaConfig, vocab_size=264)
    save_source(folder / "tied", LlamaConfig, tie_word_embeddings=True)
    byte_tokenizer().save_pretrained(folder / "llama")
    (folder / "text.txt").write_text("".join(f"{i} is {i * i % 97}. " for i in range(400)))
    tiny_model(torch.float32, num_attention_heads=4).save_pretrained(folder / "experts")
    tiny_model(torch.float32, n_routed_experts=None, num_hidden_layers=2).save_pretrained(folder / "dense")
    assert main(["convert", "export-deepseek", str(folder / "experts"), str(folder / "ranks")]) == 0
    return folder


def costs(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("cost: ")]


def numbers(sentence: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"(?<![\d.])\d[\d,]*(?![\d.]*\d* times)\b", sentence)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_said_first_is_that_of_the_files_and_the_cache(sources, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(sources)
    name, (which, *options) = KINDS[kind]
    command = ["convert", which, str(sources / name), str(tmp_path / "out"), *options, "--json"]
    assert main([*command, "--dry-run"]) == 0
    dry = capsys.readouterr()
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    done = capsys.readouterr()
    report = json.loads(done.out)
    assert json.loads(dry.out) == report
    assert costs(dry.err) == costs(done.err)
    size, cache, *_ = costs(done.err)
    read, written = numbers(size)[:2]
    assert read == sum(file.stat().st_size for file in (sources / name).glob("*.safetensors"))
    files = [*(tmp_path / "out").glob("*.safetensors")]
    assert written == report["bytes"] == sum(x.nbytes for file in files for x in load_file(file).values())
    before, after, in_bytes = numbers(cache)[:3]
    assert report["cached elements per token"] == after
    assert report["cached elements per token before"] == before
    if which != "export-deepseek":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        held = LatentCache(model.config)
        model(torch.tensor([[3]]), cache=held)
        assert held.nbytes == in_bytes == report["cached bytes per token"]
    if name in ("llama", "tied"):
        source = AutoModelForCausalLM.from_pretrained(sources / name)
        cached = source(torch.tensor([[3]]), use_cache=True).past_key_values
        assert before == sum(layer.keys.numel() + layer.values.numel() for layer in cached.layers)
    else:
        assert before == after


def test_bias_free_says_how_much_the_cache_grows_and_what_avoids_it(sources, tmp_path, capsys):
    command = ["convert", "gqa-to-mla", str(sources / "llama"), str(tmp_path / "out"), "--dry-run", "--json"]
    assert main(command) == 0
    exact = json.loads(capsys.readouterr().out)["cached elements per token"]
    assert main([*command, "--bias-free"]) == 0
    said = costs(capsys.readouterr().err)
    assert "(1.50 times as many)" in said[1]
    assert f"without it, a token takes {exact:,} elements" in said[2]


def test_a_disk_with_too_little_room_is_found_before_a_tensor_is_made(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(sources)
    command = ["convert", "gqa-to-mla", str(sources / "llama"), str(tmp_path / "out"), *COMPRESSED]
    assert main([*command, "--dry-run", "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["bytes"]
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: type("Usage", (), {"free": needed - 1})())
    monkeypatch.setattr(Piece, "make", lambda self: pytest.fail("a tensor was made"), raising=False)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert len(costs(error)) == 2
    assert f"{needed - 1:,} left" in error.splitlines()[-1]
    assert "calibrating" not in error
    assert not [*tmp_path.iterdir()]


def test_the_files_of_an_interrupted_run_are_room_for_the_next_one(tmp_path, monkeypatch):
    out = target.Target(tmp_path / "out")
    out.partial.mkdir()
    (out.partial / "model-00001-of-00002.safetensors").write_bytes(bytes(60))
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 40})())
    out.check_room(100)
    with pytest.raises(OSError, match=r"101 bytes are to be written .* 100 left"):
        out.check_room(101)
