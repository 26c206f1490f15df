"""Sources that cannot be converted are refused before any work, and nothing is written."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.source import Source
from deepseek_latent.conversion.target import Target
from tests.conversion.sources import convert_to_mla, save_source


def assert_refused(capsys, tmp_path: Path, *words: str, options: tuple[str, ...] = ()) -> None:
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in words), error
    assert not [path.name for path in tmp_path.iterdir() if path.name != "source"]


@pytest.mark.parametrize(
    ("config_class", "options", "words"),
    [
        (Qwen3Config, {}, ("qwen3", "normalized")),
        (MistralConfig, {"sliding_window": 16}, ("sliding_window", "16")),
        (LlamaConfig, {"mlp_bias": True}, ("mlp_bias",)),
        (LlamaConfig, {"hidden_act": "xielu"}, ("hidden_act", "xielu")),
        (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ("dynamic",)),
    ],
    ids=str,
)
def test_features_that_deepseek_v2_lacks_are_refused(tmp_path, capsys, config_class, options, words):
    save_source(tmp_path / "source", config_class, **options)
    assert_refused(capsys, tmp_path, *words)


def test_biases_are_refused_with_bias_free(tmp_path, capsys):
    save_source(tmp_path / "source", Qwen2Config)
    assert_refused(capsys, tmp_path, "--bias-free", "biases", options=("--bias-free",))


def _write_index(folder: Path, file: str) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


def _change(folder: Path, name: str, value: float | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _configure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _cut(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(5000)


def _second_copy(folder: Path) -> None:
    _write_index(folder, "model-1.safetensors")
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model-2.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-2.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "cut off": (_cut, ("model.safetensors", "cut off")),
    "a path out": (lambda folder: _write_index(folder, "../model-1.safetensors"), ("../model-1", "same folder")),
    "an absolute path": (lambda folder: _write_index(folder, "/etc/passwd"), ("/etc/passwd", "same folder")),
    "no such shard": (lambda folder: _write_index(folder, "model-9.safetensors"), ("model-9.safetensors", "absent")),
    "twice": (_second_copy, ("model.norm.weight",)),
    "NaN": (lambda folder: _change(folder, "model.layers.2.mlp.up_proj.weight", torch.nan), ("up_proj", "NaN")),
    "infinity": (lambda folder: _change(folder, "model.layers.0.self_attn.v_proj.weight", torch.inf), ("v_proj",)),
    "a tensor less": (lambda folder: _change(folder, "model.layers.2.mlp.up_proj.weight", None), ("up_proj", "none")),
    "pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        ("pytorch_model.bin", "run code"),
    ),
    "10^9 layers": (lambda folder: _configure(folder, num_hidden_layers=10**9), ("1000000000", "hold 3")),
    "a layer too many": (lambda folder: _configure(folder, num_hidden_layers=2), ("num_hidden_layers 2", "hold 3")),
    "no biases": (lambda folder: _configure(folder, attention_bias=True), ("q_proj.bias", "none")),
    "RoPE": (lambda folder: _configure(folder, rope_parameters={"rope_type": "new", "rope_theta": 1e4}), ("new",)),
    "no dtype": (lambda folder: _configure(folder, dtype="float7"), ("config.json", "float7")),
    "quantized": (lambda folder: _configure(folder, quantization_config={"bits": 4}), ("quantization_config",)),
    "another width": (lambda folder: _configure(folder, intermediate_size=80), ("[64, 88]", "[64, 80]")),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), ("JSON", "config.json")),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_source_is_refused_by_name_and_nothing_is_written(tmp_path, capsys, kind):
    save_source(tmp_path / "source", LlamaConfig)
    damage, words = BROKEN[kind]
    damage(tmp_path / "source")
    assert_refused(capsys, tmp_path, *words)


def test_a_source_of_links_as_in_the_hubs_cache_is_read(tmp_path):
    snapshot = as_in_the_hubs_cache(tmp_path)
    (tmp_path / "link").symlink_to(snapshot)
    for source, name in ((snapshot, "out"), (tmp_path / "link", "other")):
        out = convert_to_mla(source, tmp_path / name)
        assert not [path for path in out.iterdir() if path.is_symlink()]
        assert (out / "tokenizer.json").read_text() == "{}"


def as_in_the_hubs_cache(place: Path) -> Path:
    blobs, snapshot = place / "models--me--llama" / "blobs", place / "models--me--llama" / "snapshots" / "0123abc"
    save_source(blobs, LlamaConfig)
    (blobs / "tokenizer.json").write_text("{}")
    snapshot.mkdir(parents=True)
    for number, path in enumerate([*blobs.iterdir()]):
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        path.rename(blobs / str(number))
    return snapshot


# what lies in the source beside a good checkpoint, and the words with which it is refused
HOSTILE = {
    "a license that is a link to a secret": (lambda path, secret: path.symlink_to(secret), "LICENSE", "is a link to"),
    "a tokenizer that is a link upwards": (
        lambda path, secret: path.symlink_to(f"../{secret.name}"),
        "tokenizer.json",
        "outside of the folder",
    ),
    "a config that is a link": (
        lambda path, secret: (path.unlink(), path.symlink_to(secret)),
        "generation_config.json",
        "outside of the folder",
    ),
    "a card that is a link": (lambda path, secret: path.symlink_to(secret), "README.md", "outside of the folder"),
    "a link to nothing": (lambda path, secret: path.symlink_to("nothing"), "LICENSE", "No such file"),
    "a link to itself": (lambda path, secret: path.symlink_to(path.name), "LICENSE", "cannot be read"),
    "a pipe": (lambda path, secret: os.mkfifo(path), "tokenizer.json", "not a regular file"),
    "a pipe among the weights": (lambda path, secret: os.mkfifo(path), "more.safetensors", "not a regular file"),
    "a device": (lambda path, secret: path.symlink_to("/dev/zero"), "vocab.txt", "not a regular file"),
    "a terabyte without content": (
        lambda path, secret: (path.touch(), os.truncate(path, 10**12)),
        "tokenizer.json",
        "1,000,000,000,000 bytes",
    ),
    "a config that does not end": (
        lambda path, secret: (path.touch(), os.truncate(path, 10**12)),
        "config.json",
        "1,000,000,000,000 bytes",
    ),
    "no JSON where a loader expects it": (
        lambda path, secret: path.write_text("<b>"),
        "generation_config.json",
        "expected JSON",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_is_not_a_regular_one_inside_the_source_is_refused(tmp_path, capsys, kind):
    save_source(tmp_path / "source", LlamaConfig)
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    plant, name, words = HOSTILE[kind]
    plant(tmp_path / "source" / name, secret)
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert name in error, error
    assert words in error, error
    assert {path.name for path in tmp_path.iterdir()} == {"source", "secret"}


def test_links_that_the_user_made_are_read_by_verify_which_copies_nothing(tmp_path):
    save_source(tmp_path / "source", LlamaConfig)
    out = convert_to_mla(tmp_path / "source", tmp_path / "out")
    (tmp_path / "links").mkdir()
    for path in out.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert main(["verify", str(tmp_path / "links")]) == 0


def test_a_cache_whose_blobs_are_elsewhere_is_refused(tmp_path, capsys):
    snapshot = as_in_the_hubs_cache(tmp_path)
    (tmp_path / "models--me--llama" / "blobs").rename(tmp_path / "private")
    (tmp_path / "models--me--llama" / "blobs").symlink_to("../private")
    assert main(["convert", "gqa-to-mla", str(snapshot), str(tmp_path / "out")]) == 2
    assert "outside of the folder" in capsys.readouterr().err


def test_a_link_that_replaces_a_file_while_the_source_is_converted_is_not_followed(tmp_path, monkeypatch, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    license, secret = tmp_path / "source" / "LICENSE", tmp_path / "secret"
    license.write_text("free")
    secret.write_text("s3cret")
    write_shards = Target._write_shards

    def exchanged(self, shards):
        license.unlink(missing_ok=True)
        license.symlink_to(secret)
        write_shards(self, shards)

    monkeypatch.setattr(Target, "_write_shards", exchanged)
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert "outside of the folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_copies_are_new_files_with_the_usual_permissions(tmp_path):
    save_source(tmp_path / "source", LlamaConfig)
    original = tmp_path / "source" / "tokenizer.json"
    original.write_text("{}")
    original.chmod(0o4777)
    (tmp_path / "usual").touch()
    out = convert_to_mla(tmp_path / "source", tmp_path / "out")
    assert (out / "tokenizer.json").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert not (out / "tokenizer.json").samefile(original)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("shard")
    save_file({f"model.layers.{i}.x": torch.ones(3, 2) for i in range(3)}, folder / "model.safetensors")
    return (folder / "model.safetensors").read_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6), data=st.data())
def test_a_source_with_any_bytes_changed_is_read_or_refused(tmp_path_factory, shard, changes, data):
    folder, content = tmp_path_factory.mktemp("fuzzed"), bytearray(shard)
    for place, value in changes:
        content[place % len(content)] = value
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    with suppress(ValueError):
        source = Source(folder)
        for name in source.tensors:
            assert source[name].shape == source.shape(name)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    index=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just("model-1.safetensors"),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["weight_map", "model.layers.0.x"]), inner)
        ),
        max_leaves=6,
    )
)
def test_a_source_with_any_index_is_read_or_refused(tmp_path_factory, shard, index):
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "model-1.safetensors").write_bytes(shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    with suppress(ValueError):
        Source(folder)


def test_only_the_files_that_are_read_are_downloaded(tmp_path, monkeypatch):
    save_source(tmp_path / "snapshot", LlamaConfig)
    asked = {}

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked[repo] = allow_patterns
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("deepseek_latent.conversion.places.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "gqa-to-mla", "somebody/llama", "out"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    (patterns,) = asked.values()
    assert "*.safetensors" in patterns
    assert not any(Path(name).match(pattern) for pattern in patterns for name in ("pytorch_model.bin", "code.py"))


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    def download(repo: str, allow_patterns: list[str]) -> str:
        raise OSError("offline")

    monkeypatch.setattr("deepseek_latent.conversion.places.snapshot_download", download)
    assert main(["convert", "gqa-to-mla", "somebody/llama", str(tmp_path / "out")]) == 2
    assert "expected a folder or a hub id, got somebody/llama" in capsys.readouterr().err


def test_a_weight_file_that_was_written_again_changes_the_fingerprint(tmp_path):
    """Otherwise an interrupted conversion would be resumed with shards of other weights."""
    save_source(tmp_path, LlamaConfig)
    file, before = tmp_path / "model.safetensors", Source(tmp_path).fingerprint()
    assert Source(tmp_path).fingerprint() == before
    date, tensors = file.stat().st_mtime_ns, load_file(file)
    save_file({name: -x for name, x in tensors.items()}, file, {"format": "pt"})
    os.utime(file, ns=(date, date + 1))
    assert Source(tmp_path).fingerprint() != before
