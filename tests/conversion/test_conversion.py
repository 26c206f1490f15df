"""Other models become DeepSeek-V2: the same logits here and in transformers' own class, and files all or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deepseek_latent import LatentCache
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion import target
from deepseek_latent.conversion.source import Source
from deepseek_latent.conversion.target import Piece, Target
from tests.support import NATIVE, random_ids, relative_error, tiny_model

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CLASSES = {
    LlamaConfig: LlamaForCausalLM,
    MistralConfig: MistralForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
SOURCES = {
    "MHA": (LlamaConfig, {"num_key_value_heads": 4}),
    "GQA": (LlamaConfig, {}),
    "MQA": (LlamaConfig, {"num_key_value_heads": 1}),
    "MQA, llama3": (LlamaConfig, {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "wide heads, tied": (LlamaConfig, {"head_dim": 24, "tie_word_embeddings": True}),
    "all biases": (LlamaConfig, {"attention_bias": True}),
    "Mistral": (MistralConfig, {"sliding_window": None}),
    "Qwen2": (Qwen2Config, {}),
    "Qwen2, tied": (Qwen2Config, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}


def saved(folder: Path, config_class, dtype=torch.float32, **options):
    """A source as transformers saves it, with norms and biases that are not trivial, and the model."""
    torch.manual_seed(0)
    model = CLASSES[config_class](config_class(**(SMALL | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif name.endswith("bias"):
                parameter.normal_()
            else:
                parameter.mul_(4)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


def write(target: Target, pieces: list[Piece], *rest) -> list[str]:
    return target.write(target.plan(pieces), *rest)


def converted(source: Path, out: Path, *options: str) -> Path:
    assert main(["convert", "gqa-to-mla", str(source), str(out), *options]) == 0
    return out


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_exact_conversion_gives_the_same_logits_here_and_in_transformers(tmp_path, name):
    config_class, options = SOURCES[name]
    expected, ids = saved(tmp_path / "source", config_class, **options)(random_ids(2, 50)).logits, random_ids(2, 50)
    out = converted(tmp_path / "source", tmp_path / "out")
    for model_class in (AutoModelForCausalLM, NATIVE.DeepseekV2ForCausalLM):
        model = model_class.from_pretrained(out, trust_remote_code=False)
        assert relative_error(model(ids).logits, expected) < 1e-5, model_class


@torch.no_grad()
def test_a_converted_model_decodes_from_a_cache_as_large_as_that_of_its_source(tmp_path):
    source, ids = saved(tmp_path / "source", LlamaConfig), random_ids(2, 9)
    model = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "source", tmp_path / "out"))
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = LatentCache(model.config)
    assert torch.equal(model.generate(ids, cache=cache, **options), source.generate(ids, **options))
    width = 2 * source.config.num_key_value_heads * source.config.head_dim
    # the latent has room for its constant channel
    assert width < model.config.cached_width <= width + 4 * width**0.5


@torch.no_grad()
def test_in_bfloat16_the_conversion_costs_no_more_than_the_dtype(tmp_path):
    source = saved(tmp_path / "source", Qwen2Config, dtype=torch.bfloat16)
    ids, exact = random_ids(4, 60), Qwen2ForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "source", tmp_path / "out"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    errors = [(x(ids).logits.float() - exact(ids).logits).abs().mean() for x in (model, source)]
    assert errors[0] < 1.5 * errors[1]


@torch.no_grad()
def test_without_biases_the_error_is_that_of_the_norms_eps(tmp_path):
    errors, ids = [], random_ids(2, 50)
    for eps in (1e-6, 1e-5):
        expected = saved(tmp_path / f"source{eps}", LlamaConfig, rms_norm_eps=eps)(ids).logits
        out = converted(tmp_path / f"source{eps}", tmp_path / f"out{eps}", "--bias-free")
        assert not [name for name in load_file(out / "model.safetensors") if "bias" in name]
        errors.append(relative_error(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected))
    assert errors[0] < 1e-3
    # the norm of the layer before has this eps, that of the latent 1e-6
    assert 3 < errors[1] / errors[0] < 12


def test_verify_finds_a_checkpoint_equal_to_its_source_and_one_that_is_not(tmp_path, capsys):
    saved(tmp_path / "source", LlamaConfig)
    out = converted(tmp_path / "source", tmp_path / "out", "--json")
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


# what is refused, and what is left of it: nothing


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
        (LlamaConfig, {"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ("dynamic",)),
    ],
    ids=str,
)
def test_what_latent_attention_cannot_hold_is_refused(tmp_path, capsys, config_class, options, words):
    saved(tmp_path / "source", config_class, **options)
    assert_refused(capsys, tmp_path, *words)


def test_biases_are_refused_where_none_are_wanted(tmp_path, capsys):
    saved(tmp_path / "source", Qwen2Config)
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
    "a path out": (lambda folder: _write_index(folder, "../model-1.safetensors"), ("../model-1", "beside")),
    "an absolute path": (lambda folder: _write_index(folder, "/etc/passwd"), ("/etc/passwd", "beside")),
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
    saved(tmp_path / "source", LlamaConfig)
    damage, words = BROKEN[kind]
    damage(tmp_path / "source")
    assert_refused(capsys, tmp_path, *words)


def test_a_source_made_of_links_is_read_as_the_hubs_cache_lays_it_out(tmp_path):
    saved(tmp_path / "blobs", LlamaConfig)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    out = converted(tmp_path / "snapshot", tmp_path / "out")
    assert not [path for path in out.iterdir() if path.is_symlink()]


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


# all or nothing


def pieces_of(count: int, made: list[str] | None = None) -> list[Piece]:
    def make(i: int) -> torch.Tensor:
        if made is not None:
            made.append(f"t{i}")
        return torch.full((10,), float(i))

    return [Piece(f"t{i}", (10,), torch.float32, lambda i=i: make(i)) for i in range(count)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(8))
def test_a_run_that_was_ended_anywhere_leaves_nothing_under_the_name_and_goes_on(tmp_path, monkeypatch, at):
    """Ended when the file system is asked for the nth time to name or flush something."""
    calls, made = iter(range(10**6)), []

    def dying(function):
        def called(*arguments, **options):
            if next(calls) == at:
                raise Killed
            return function(*arguments, **options)

        return called

    texts = {"config.json": "{}"}
    with monkeypatch.context() as patched:
        patched.setattr(target.os, "replace", dying(os.replace))
        patched.setattr(target.os, "rename", dying(os.rename))
        patched.setattr(target, "_flush", dying(target._flush))
        try:
            write(Target(tmp_path / "out", shard_bytes=80), pieces_of(4, made), texts, [], "one")
        except Killed:
            assert not (tmp_path / "out").exists() or at > 5
    before = list(made)
    if not (tmp_path / "out").exists():
        write(Target(tmp_path / "out", shard_bytes=80), pieces_of(4, made), texts, [], "one")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == "config.json"
    stored = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
    assert {name: x[0].item() for name, x in stored.items()} == {f"t{i}": float(i) for i in range(4)}
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    # what was written whole before is not made again
    assert len(made) < 2 * len(before) + 4


def test_a_write_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise SafetensorError("File too large (os error 27)")

    monkeypatch.setattr(target, "save_file", fail)
    with pytest.raises(ValueError, match=r"model\.safetensors could not be written: File too large"):
        write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    assert not (tmp_path / "out").exists()


def test_another_conversion_does_not_go_on_where_the_first_one_ended(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Target, "_publish", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    made = []
    write(Target(tmp_path / "out"), pieces_of(2, made), {}, [], "two")
    assert made == ["t0", "t1"]


def test_what_exists_is_replaced_only_when_asked_and_only_a_checkpoint(tmp_path, capsys):
    saved(tmp_path / "source", LlamaConfig)
    out = converted(tmp_path / "source", tmp_path / "out")
    before = (out / "model.safetensors").stat().st_ino
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_ino == before
    converted(tmp_path / "source", out, "--force")
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


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path, capsys):
    saved(tmp_path / "source", LlamaConfig)
    converted(tmp_path / "source", tmp_path / "out", "--dry-run", "--json")
    planned = json.loads(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    converted(tmp_path / "source", tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out) == planned


def test_a_full_disk_is_said_before_and_while_writing(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(target.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 79})())
        with pytest.raises(ValueError, match=r"80 bytes are to be written .* 79 left"):
            write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    monkeypatch.setattr(target, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write(Target(tmp_path / "out"), pieces_of(2), {}, [], "one")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_under_the_name_and_the_next_one_finishes(tmp_path):
    saved(tmp_path / "source", LlamaConfig, num_hidden_layers=40)
    command = [
        sys.executable,
        "-m",
        "deepseek_latent.commands",
        "convert",
        "gqa-to-mla",
        "--max-shard-size",
        "20KB",
    ]
    command += [str(tmp_path / "source"), str(tmp_path / "out")]
    process, partial = subprocess.Popen(command, stderr=subprocess.DEVNULL), tmp_path / ".out.partial"
    while process.poll() is None and len(list(partial.glob("*.safetensors"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(kept) >= 5
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "source")]) == 0


# dense to experts


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


def upcycled(source: Path, out: Path, scheme: str) -> Path:
    command = ["convert", "upcycle", str(source), str(out), "--scheme", scheme[:2], *UPCYCLED[scheme]]
    assert main(command) == 0
    return out


@pytest.mark.parametrize("scheme", UPCYCLED)
@torch.no_grad()
def test_a_dense_model_cut_into_experts_says_the_same(tmp_path, scheme):
    ids, dense = random_ids(2, 50), tiny_model(n_routed_experts=None)
    dense.save_pretrained(tmp_path / "source")
    out = upcycled(tmp_path / "source", tmp_path / "out", scheme)
    expected = dense(ids).logits
    model = AutoModelForCausalLM.from_pretrained(out)
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["DeepseekV2MLP"] + 2 * ["DeepseekV2MoE"]
    assert relative_error(model(ids).logits, expected) < 2e-6
    assert main(["verify", str(out), "--against", str(tmp_path / "source")]) == 0
    # transformers' own class always has shared experts, and leaves out to normalise
    if scheme[:2] in ("M0", "M5"):
        stock = NATIVE.DeepseekV2ForCausalLM.from_pretrained(out)
        assert relative_error(stock(ids).logits, expected) < 1e-5


@torch.no_grad()
def test_whole_groups_may_trade_places(tmp_path):
    """The sum does not depend on which of equal groups a zero router happens to take."""
    ids, dense = random_ids(2, 50), tiny_model(n_routed_experts=None)
    dense.save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(upcycled(tmp_path / "source", tmp_path / "out", "M3"))
    for layer in model.model.layers[1:]:
        layer.mlp.gate.weight.copy_(torch.tensor([0.0, 0.0, 1e-6]).repeat_interleave(4)[:, None].expand(12, 72))
    assert relative_error(model(ids).logits, dense(ids).logits) < 1e-4
    for layer in model.model.layers[1:]:
        layer.mlp.gate.routed_scaling_factor *= 2
    assert relative_error(model(ids).logits, dense(ids).logits) > 1e-2


def losses_while_learning(model, steps: int = 6) -> list[float]:
    optimizer, ids, losses = torch.optim.AdamW(model.train().parameters(), lr=1e-3), random_ids(4, 40), []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("name", ["GQA", "Qwen2"])
def test_a_converted_model_learns_as_its_source_does(tmp_path, name):
    """The constant that undoes the latent's norm is large; what reads it must not be moved by it."""
    config_class, options = SOURCES[name]
    source = saved(tmp_path / "source", config_class, **options)
    model = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "source", tmp_path / "out"))
    ours, theirs = losses_while_learning(model), losses_while_learning(source)
    assert theirs[-1] < theirs[0] - 0.5
    assert ours[-1] < ours[0] - 0.8 * (theirs[0] - theirs[-1])


@torch.no_grad()
def test_a_llama_becomes_latent_attention_and_experts_in_one_go_and_learns(tmp_path):
    source, ids = saved(tmp_path / "source", LlamaConfig, num_key_value_heads=1), random_ids(4, 40)
    model = AutoModelForCausalLM.from_pretrained(upcycled(tmp_path / "source", tmp_path / "out", "M5"))
    assert relative_error(model(ids).logits, source(ids).logits) < 1e-5
    with torch.enable_grad():
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
    for name in ("experts.gate_up_proj", "experts.down_proj", "shared_experts.up_proj.weight", "gate.weight"):
        assert model.get_parameter(f"model.layers.1.mlp.{name}").grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("M3", "--routed-experts", "10", "--groups", "3", "--top-k", "4"), ("whole groups", "3 groups")),
        (("M5", "--routed-experts", "12", "--groups", "3", "--top-k", "4"), ("at least one shared",)),
        (("M1", "--routed-experts", "5", "--top-k", "4"), ("top-k of 5",)),
        (("M2", "--routed-experts", "5", "--top-k", "4", "--groups", "5"), ("no groups",)),
        (("M2", "--routed-experts", "5", "--top-k", "4", "--dense-layers", "3"), ("layers that stay dense",)),
    ],
    ids=str,
)
def test_numbers_of_which_no_experts_can_be_made_are_refused(tmp_path, capsys, options, words):
    saved(tmp_path / "source", LlamaConfig)
    scheme, *rest = options
    assert main(["convert", "upcycle", str(tmp_path / "source"), str(tmp_path / "out"), "--scheme", scheme, *rest]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in words), error


def test_what_has_experts_already_is_not_upcycled(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "source")
    command = ["convert", "upcycle", str(tmp_path / "source"), str(tmp_path / "out"), "--scheme", "M2"]
    assert main([*command, "--routed-experts", "4", "--top-k", "2"]) == 2
    assert "dense" in capsys.readouterr().err


@torch.no_grad()
def test_noise_and_neurons_drawn_anew_part_experts_at_an_error_that_is_said(tmp_path, capsys):
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
        # other random tokens, the same order
        assert 0.3 < report["not exact: error of logits"] / error < 3
        experts = model.model.layers[1].mlp.experts.gate_up_proj
        twins = experts[: len(experts) // 3], experts[len(experts) // 3 : 2 * len(experts) // 3]
        assert torch.equal(*twins) == (name == "noise")
        assert "not exact" in (out / "README.md").read_text()


@torch.no_grad()
def test_experts_that_add_nothing_yet_may_be_drawn_anew_exactly(tmp_path, capsys):
    ids, dense = random_ids(2, 50), tiny_model(n_routed_experts=None)
    dense.save_pretrained(tmp_path / "source")
    command = ["convert", "upcycle", str(tmp_path / "source"), str(tmp_path / "out"), "--scheme", "M0"]
    assert main([*command, *UPCYCLED["M0"], "--reinitialize", "1", "--router-noise", "0.1", "--json"]) == 0
    assert not any("not exact" in name for name in json.loads(capsys.readouterr().out))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative_error(model(ids).logits, dense(ids).logits) < 2e-6
    redrawn = model.model.layers[1].mlp.experts.gate_up_proj
    assert len({tuple(expert[0, :4].tolist()) for expert in redrawn}) == len(redrawn)


@pytest.mark.parametrize("options", [["--router-noise", "-1"], ["--router-noise", "nan"], ["--reinitialize", "1.5"]])
def test_noise_that_is_none_is_refused(tmp_path, capsys, options):
    saved(tmp_path / "source", LlamaConfig)
    command = ["convert", "upcycle", str(tmp_path / "source"), str(tmp_path / "out"), "--scheme", "M2"]
    assert main([*command, "--routed-experts", "4", "--top-k", "2", *options]) == 2
    assert "expected router noise of 0 or more" in capsys.readouterr().err


# the hub


def test_a_source_on_the_hub_is_downloaded_without_what_is_not_read(tmp_path, monkeypatch):
    saved(tmp_path / "snapshot", LlamaConfig)
    asked = {}

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked[repo] = allow_patterns
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("deepseek_latent.conversion.source.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "gqa-to-mla", "somebody/llama", "out"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    (patterns,) = asked.values()
    assert "*.safetensors" in patterns
    assert not any(Path(name).match(pattern) for pattern in patterns for name in ("pytorch_model.bin", "code.py"))


def test_what_neither_disk_nor_hub_has_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    def download(repo: str, allow_patterns: list[str]) -> str:
        raise OSError("offline")

    monkeypatch.setattr("deepseek_latent.conversion.source.snapshot_download", download)
    assert main(["convert", "gqa-to-mla", "somebody/llama", str(tmp_path / "out")]) == 2
    assert "expected a folder or a hub id, got somebody/llama" in capsys.readouterr().err


def test_a_result_is_uploaded_when_it_is_whole_to_a_place_known_before(tmp_path, monkeypatch, capsys):
    events = []

    class Hub:
        def create_repo(self, repo, exist_ok):
            events.append(("made", repo, (tmp_path / "out").exists()))

        def upload_folder(self, repo_id, folder_path, commit_message):
            events.append(("sent", repo_id, (Path(folder_path) / "README.md").is_file()))

    monkeypatch.setattr("deepseek_latent.conversion.convert.HfApi", Hub)
    saved(tmp_path / "source", LlamaConfig)
    command = ["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out"), "--push-to-hub", "me/mla"]
    assert main([*command, "--dry-run"]) == 0
    assert events == []
    assert main(command) == 0
    assert events == [("made", "me/mla", False), ("sent", "me/mla", True)]

    def refuse(self, repo, exist_ok):
        raise OSError("no token")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    assert main([*command[:3], str(tmp_path / "other"), *command[4:]]) == 2
    assert "no token" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
