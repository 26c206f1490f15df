"""`convert` and `verify` end to end: what they write, report, replace and upload."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
)

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion import places
from deepseek_latent.conversion import verify as verification
from deepseek_latent.conversion.cast import Cast
from tests.conversion.sources import convert_to_mla, save_source
from tests.support import tiny_model


def test_verify_passes_an_equal_checkpoint_and_fails_a_changed_one(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    out = convert_to_mla(tmp_path / "source", tmp_path / "out", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == ["model.safetensors"]
    assert report["bytes"] == sum(x.nbytes for x in load_file(out / "model.safetensors").values())
    check = ["verify", str(out), "--against", str(tmp_path / "source"), "--json"]
    assert main(check) == 0
    report = json.loads(capsys.readouterr().out)
    assert max(report["logits_error_against_source"], report["logits_error_in_transformers"]) < 1e-5
    assert report["equal_greedy_tokens"] == "32 of 32"
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.self_attn.kv_b_proj.weight"] *= 1.1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert main(check) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["logits_error_against_source"] > 1e-3
    assert "differ" in report["problems"][0]
    del tensors["model.norm.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert main(check) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["model.norm.weight is missing"]


def test_verify_says_dtype_allowance_and_verdict(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    out = convert_to_mla(tmp_path / "source", tmp_path / "out")
    capsys.readouterr()
    reports = {}
    for dtype in ("float32", "bfloat16"):
        assert main(["verify", str(out), "--against", str(tmp_path / "source"), "--dtype", dtype, "--json"]) == 0
        reports[dtype] = json.loads(capsys.readouterr().out)
        assert reports[dtype]["dtype"] == dtype
    exact, rounded = reports.values()
    assert (exact["allowed_logits_error"], rounded["allowed_logits_error"]) == (1e-3, 0.1)
    assert exact["verdict"].startswith("passed: a logits error of ")
    assert exact["verdict"].endswith(", and 0.001 is allowed in float32")
    assert "0.1 is allowed in bfloat16; rounding alone makes 0.03 or less" in rounded["verdict"]
    (out / "model.safetensors").write_bytes(b"")
    assert main(["verify", str(out), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "failed: the files do not fit their config.json"


def test_the_verdict_says_that_nothing_was_compared(tmp_path, capsys):
    tiny_model(n_shared_experts=None).save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict.endswith("compared with nothing; name the source with --against")


def test_an_intact_bias_free_conversion_is_allowed_the_error_of_its_eps_and_a_changed_one_is_not(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig, rms_norm_eps=1e-5)
    out = convert_to_mla(tmp_path / "source", tmp_path / "out", "--bias-free")
    capsys.readouterr()
    check = ["verify", str(out), "--against", str(tmp_path / "source"), "--json"]
    assert main(check) == 0
    assert json.loads(capsys.readouterr().out)["allowed_logits_error"] == pytest.approx(3e-3)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.self_attn.kv_b_proj.weight"] *= 1.1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert main(check) == 1
    assert json.loads(capsys.readouterr().out)["verdict"].startswith("failed: a logits error of ")
    # the conversion with biases is exact, whatever the eps
    assert verification._allowed_error(tiny_model(rms_norm_eps=1e-5).config, torch.float32) == 1e-3


def test_verify_takes_hub_ids(tmp_path, capsys, monkeypatch):
    save_source(tmp_path / "source", LlamaConfig)
    convert_to_mla(tmp_path / "source", tmp_path / "out")
    folders = {"owner/mla": tmp_path / "out", "owner/llama": tmp_path / "source"}
    monkeypatch.setattr(places, "snapshot_download", lambda hub_id, allow_patterns: str(folders[hub_id]))
    assert main(["verify", "owner/mla", "--against", "owner/llama"]) == 0
    assert "passed" in capsys.readouterr().out


def test_verify_counts_greedy_tokens_only_up_to_the_first_that_differs(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    continuations = iter(([7, 8, 9, 3], [7, 8, 5, 3]))

    def logits_and_continuation(model, ids):
        return verification._logits(model, ids), torch.tensor(next(continuations))

    monkeypatch.setattr(verification, "_logits_and_continuation", logits_and_continuation)
    report = verification.verify(tmp_path, against=tmp_path, text=None, dtype=None)
    assert report["equal_greedy_tokens"] == "2 of 4"


def test_cast_rounds_every_tensor_once_and_nothing_else(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    command = ["convert", "cast", str(tmp_path / "source"), str(out), "--dtype", "bfloat16", "--max-shard-size", "90KB"]
    assert main(command) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    stored = load_file(tmp_path / "source" / "model.safetensors")
    assert index["weight_map"].keys() == stored.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], stored[name].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_only_a_checkpoint_is_replaced_and_only_with_force(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    out = convert_to_mla(tmp_path / "source", tmp_path / "out")
    before = (out / "model.safetensors").stat().st_ino
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_ino == before
    convert_to_mla(tmp_path / "source", out, "--force")
    assert (out / "model.safetensors").stat().st_ino != before
    (tmp_path / "link").symlink_to("source")
    for name in ("link", "out/../source", "source/inside", "."):
        command = ["convert", "gqa-to-mla", str(tmp_path / "source"), f"{tmp_path}/{name}", "--force"]
        assert main(command) == 2, name
    assert json.loads((tmp_path / "source" / "config.json").read_text())["model_type"] == "llama"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "thesis"), "--force"]) == 2
    assert (tmp_path / "thesis").is_dir()
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "source" / "out")]) == 2


def test_a_dry_run_reports_what_would_be_written_and_writes_nothing(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    convert_to_mla(tmp_path / "source", tmp_path / "out", "--dry-run", "--json")
    planned = json.loads(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert_to_mla(tmp_path / "source", tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out) == planned


def test_the_repository_is_created_before_the_conversion_and_filled_after_it(tmp_path, monkeypatch, capsys):
    events, sent = [], set()

    class Hub:
        def create_repo(self, repo, exist_ok):
            events.append(("made", repo, (tmp_path / "out").exists()))

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            (Path(folder_path) / ".tmpABCDEF").touch()
            present = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")]
            sent.update(filter_repo_objects(present, allow_patterns=allow_patterns))
            events.append(("sent", repo_id, (Path(folder_path) / "README.md").is_file()))

    monkeypatch.setattr("deepseek_latent.conversion.convert.HfApi", Hub)
    save_source(tmp_path / "source", LlamaConfig)
    (tmp_path / "source" / "LICENSE[1]").touch()
    command = ["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out"), "--push-to-hub", "me/mla"]
    assert main([*command, "--dry-run"]) == 0
    assert events == []
    assert main(command) == 0
    assert events == [("made", "me/mla", False), ("sent", "me/mla", True)]
    assert sent == {"config.json", "generation_config.json", "model.safetensors", "README.md", "LICENSE[1]"}

    def refuse(self, repo, exist_ok):
        raise OSError("no token")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    assert main([*command[:3], str(tmp_path / "other"), *command[4:]]) == 2
    assert "no token" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def says_bfloat16(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


UPCYCLE = ("upcycle", "--scheme", "M2", "--routed-experts", "2", "--top-k", "1", "--dense-layers", "1")


@pytest.mark.parametrize("kind", [("gqa-to-mla",), ("gqa-to-mla", "--bias-free"), UPCYCLE], ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_written_has_the_dtype_of_the_files_and_passes_inspect(tmp_path, capsys, kind, dtype):
    """A source whose config.json says another dtype than its files hold."""
    save_source(tmp_path / "source", LlamaConfig, dtype)
    says_bfloat16(tmp_path / "source")
    options = ["--bias-free"] if kind == ("gqa-to-mla",) and dtype == torch.float16 else []
    if kind == UPCYCLE:
        convert_to_mla(tmp_path / "source", tmp_path / "dense", "--bias-free")
        source = tmp_path / "dense"
    else:
        source = tmp_path / "source"
    assert main(["convert", kind[0], str(source), str(tmp_path / "out"), *kind[1:], *options]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0, capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_a_source_in_two_dtypes_is_refused_before_any_work(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert "BF16 (model.norm.weight)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["cast", "export-deepseek"])
def test_files_that_would_not_pass_our_own_checks_are_not_published(tmp_path, kind, monkeypatch):
    tiny_model(num_attention_heads=4, max_position_embeddings=300).save_pretrained(tmp_path / "source")
    pieces = Cast.pieces
    # a mistake in a conversion
    monkeypatch.setattr(Cast, "pieces", lambda self: pieces(self)[:-1])
    with pytest.raises(AssertionError, match=r"is missing|expected .* in the files"):
        main(["convert", kind, str(tmp_path / "source"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
