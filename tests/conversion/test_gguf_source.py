"""A GGUF file is a source like the folder that it came from, and what transformers would leave out of it is refused."""

import json
import shutil
import sys
import tempfile
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from deepseek_latent.commands.terminal import quiet_transformers
from deepseek_latent.conversion.gguf_source import source_folder
from deepseek_latent.conversion.source import Source
from tests.commands.terminal import NUM_IDS, assert_refused, printed
from tests.conversion.sources import save_source
from tests.support import relative_error

pytest.importorskip("gguf")
from tests.conversion.gguf_files import gguf_metadata, gguf_tensors, write_gguf

UPCYCLE = ("--scheme", "M0", "--shared-experts", 1, "--routed-experts", 3, "--top-k", 2)
SOURCES = {
    "Llama": (LlamaConfig, {}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "Qwen2": (Qwen2Config, {}),
}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The system's temporary folder, which is empty after every test."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with quiet_transformers():
        yield
    assert not [*(tmp_path / "temporary").iterdir()]


def make(tmp_path, config_class=LlamaConfig, dtype=torch.float32, **options):
    """A model and its GGUF file."""
    model = save_source(tmp_path / "folder", config_class, dtype, vocab_size=NUM_IDS, **options)
    file = tmp_path / "Small-1B.Q8.gguf"
    return model, write_gguf(file, gguf_tensors(model), gguf_metadata(model), model.config.model_type)


@pytest.mark.parametrize("kind", [("gqa-to-mla",), ("upcycle", *UPCYCLE)], ids=["gqa-to-mla", "upcycle"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_model_of_a_gguf_file_is_converted_with_its_tokenizer(tmp_path, capsys, source, kind):
    model, file = make(tmp_path, SOURCES[source][0], **SOURCES[source][1])
    command, *options = kind
    assert printed(capsys, "convert", command, file, tmp_path / "out", *options)[0] == 0
    ids = torch.randint(0, NUM_IDS, (2, 40))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert relative_error(converted(ids).logits, model(ids).logits) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([*range(2, 40)])
    status, out, _ = printed(capsys, "verify", tmp_path / "out", "--against", file, "--json")
    report = json.loads(out)
    assert (status, report["equal_greedy_tokens"]) == (0, "32 of 32")
    assert report["logits_error_against_source"] < 1e-5


def test_the_card_names_the_file_and_keeps_its_license(tmp_path, capsys):
    _, file = make(tmp_path)
    assert printed(capsys, "convert", "gqa-to-mla", file, tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# `Small-1B.Q8` as DeepSeek-V2" in card
    assert "license: apache-2.0" in card
    assert "- en" in card
    assert not [*(tmp_path / "out").glob("*.gguf")]


def test_a_file_of_a_folder_is_named_and_nothing_beside_it_is_read(tmp_path, capsys):
    model, file = make(tmp_path)
    for name in ("config.json", "adapter_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{")
    command = ("convert", "gqa-to-mla", tmp_path, tmp_path / "elsewhere" / "out", "--gguf-file", file.name)
    assert printed(capsys, *command)[0] == 0
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "out")
    assert converted.num_parameters() > model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_bfloat16_where_the_file_has_them_so_and_else_float32(tmp_path, dtype):
    model, file = make(tmp_path, dtype=dtype)
    with source_folder(str(file), None) as folder:
        source = Source(folder)
        assert {tensor.dtype for tensor in source.tensors.values()} == {"BF16" if dtype == torch.bfloat16 else "F32"}
        for name, tensor in model.state_dict().items():
            assert torch.equal(source[name].float(), tensor.float())


def test_the_same_file_is_the_same_source_so_that_an_interrupted_conversion_continues(tmp_path):
    _, file = make(tmp_path)
    fingerprints = []
    for _ in range(2):
        with source_folder(str(file), None) as folder:
            fingerprints.append(Source(folder).fingerprint())
    assert fingerprints[0] == fingerprints[1]


def test_the_folder_that_holds_the_file_is_not_replaced(tmp_path, capsys):
    (tmp_path / "models").mkdir()
    _, file = make(tmp_path)
    file = shutil.move(file, tmp_path / "models")
    options = ("--force", "--replace-any-folder")
    status, _, err = printed(capsys, "convert", "gqa-to-mla", file, tmp_path / "models", *options)
    assert status == 2
    assert "the same folder" in err
    assert (tmp_path / "models" / "Small-1B.Q8.gguf").is_file()


@pytest.mark.parametrize("place", ["absent.gguf", "folder"])
def test_an_absent_file_is_named(tmp_path, capsys, place):
    save_source(tmp_path / "folder", LlamaConfig)
    source = tmp_path / place
    options = ("--gguf-file", "other.gguf") if place == "folder" else ()
    for command in (("convert", "gqa-to-mla", source, tmp_path / "out"), ("verify", tmp_path, "--against", source)):
        assert_refused(capsys, *command, *options, saying="gguf")


def test_what_transformers_would_leave_out_is_refused(tmp_path, capsys):
    model, _ = make(tmp_path)
    tensors, metadata = gguf_tensors(model), gguf_metadata(model)
    without = dict(tensors)
    del without["blk.1.attn_q.weight"]
    cases = {
        "has a sliding window": (tensors, metadata | {"llama.attention.sliding_window": 64}),
        "scales RoPE": (tensors | {"rope_freqs.weight": torch.ones(8)}, metadata),
        "it scales RoPE": (tensors, metadata | {"llama.rope.scaling.type": "yarn"}),
        "but it holds": (tensors | {"blk.0.attn_q.bias": torch.ones(64)}, metadata),
        "describes a model of": (without, metadata),
        "num_hidden_layers must be at most": (tensors, metadata | {"llama.block_count": 10**9}),
    }
    for reason, contents in cases.items():
        file = write_gguf(tmp_path / "x.gguf", *contents)
        assert_refused(capsys, "convert", "gqa-to-mla", file, tmp_path / "out", saying=reason)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "deepseek2", "unheard-of"])
def test_an_architecture_that_cannot_be_converted_is_named(tmp_path, capsys, architecture):
    model, _ = make(tmp_path)
    metadata = {name.replace("llama", architecture): value for name, value in gguf_metadata(model).items()}
    file = write_gguf(tmp_path / "x.gguf", gguf_tensors(model), metadata, architecture)
    assert_refused(capsys, "convert", "gqa-to-mla", file, tmp_path / "out", saying=architecture)


def test_the_absent_package_is_named(tmp_path, capsys, monkeypatch):
    _, file = make(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_refused(capsys, "convert", "gqa-to-mla", file, tmp_path / "out", saying="pip install gguf")


def test_a_disk_without_room_is_named_before_anything_is_dequantized(tmp_path, capsys, monkeypatch):
    _, file = make(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")
    assert_refused(capsys, "convert", "gqa-to-mla", file, tmp_path / "out", saying="TMPDIR")


def test_damaged_files_are_refused_in_one_sentence_or_converted(tmp_path, capsys):
    _, file = make(tmp_path, num_hidden_layers=1)
    whole, random = file.read_bytes(), Random(0)
    header = whole.index(b"token_embd.weight") + 2000
    for _ in range(25):
        damaged = bytearray(whole[: random.choice([len(whole), random.randrange(len(whole))])])
        for _ in range(random.randrange(4)):
            damaged[random.randrange(min(header, len(damaged)))] = random.choice([0, 1, 127, 128, 255])
        file.write_bytes(damaged)
        status, _, err = printed(capsys, "convert", "gqa-to-mla", file, tmp_path / "out", "--force")
        assert status in (0, 2)
        # a bar may stand before it
        assert status == 0 or err.split("\n")[-2].startswith("deepseek-latent convert: expected ")
