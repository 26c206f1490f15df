"""A source or checkpoint with impossible numbers, types or files is refused in one sentence before any work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion import compression_report, convert
from tests.conversion.sources import LLAMA3, YARN, save_source
from tests.support import tiny_model


def configure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def assert_refused(capsys, words: str, *command: str | Path) -> None:
    capsys.readouterr()  # of commands before this one
    assert main([str(word) for word in command]) == 2
    lines = capsys.readouterr().err.splitlines()
    # a tensor may be refused when it is read, after the cost and the progress were printed
    lines = [x for x in lines if x and not x.startswith("cost: ") and not x.endswith(" ...")]
    assert len(lines) == 1, lines
    assert words in lines[0]
    assert len(lines[0]) < 1_200


IMPOSSIBLE_IN_LLAMA = {
    "negative heads": ({"num_attention_heads": -4}, "num_attention_heads must be at least 1, got -4"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
    "half a head": ({"num_attention_heads": 1.5}, "num_attention_heads must be a whole number, got 1.5"),
    "true heads": ({"num_attention_heads": True}, "num_attention_heads must be a whole number, got True"),
    "no key heads": ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
    "negative key heads": ({"num_key_value_heads": -2}, "num_key_value_heads must be at least 1, got -2"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads (4)"),
    "odd heads": ({"head_dim": 7}, "even"),
    "10^12 tokens": ({"vocab_size": 10**12}, "vocab_size must be at most 100,000,000, got 1000000000000"),
    "a vocabulary of text": ({"vocab_size": "x" * 10**5}, "vocab_size must be a whole number, got 'xxxxxxxxxxxx"),
    "10^9 of a width": ({"intermediate_size": 10**9}, "intermediate_size must be at most 1,000,000"),
    "dtype 16": ({"dtype": 16}, "dtype must be a floating-point type of torch, such as 'bfloat16', got 16"),
    "architectures": ({"architectures": [5]}, "architectures must be a list of class names, or null, got [5]"),
    "rope as a list": ({"rope_parameters": [1]}, "rope_parameters"),
    "theta as text": ({"rope_parameters": {"rope_type": "default", "rope_theta": "a"}}, "positive rope_theta"),
    "llama3 without factors": ({"rope_parameters": LLAMA3 | {"factor": None}}, "factor"),
    "yarn with a factor of text": ({"rope_parameters": YARN | {"factor": "four"}}, "factor"),
    "windows": ({"layer_types": ["sliding_attention"] * 3}, "does not support layer_types ['sliding_attention',"),
    "layers of their own": ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config must be left out"),
}


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE_IN_LLAMA.values(), ids=IMPOSSIBLE_IN_LLAMA.keys())
def test_a_llama_with_impossible_fields_is_refused_and_nothing_is_written(changes, words, tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    configure(tmp_path / "source", **changes)
    assert_refused(capsys, words, "convert", "gqa-to-mla", tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bias_free_refuses_norms_with_a_large_eps(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig, rms_norm_eps=0.01)
    command = ("convert", "gqa-to-mla", tmp_path / "source", tmp_path / "out")
    assert_refused(capsys, "--bias-free needs an rms_norm_eps of at most 0.0001", *command, "--bias-free")
    assert main([str(word) for word in command]) == 0


OURS = (
    ("inspect", "SRC"),
    ("verify", "SRC"),
    ("convert", "cast", "SRC", "OUT"),
    ("convert", "export-deepseek", "SRC", "OUT"),
    ("export-code", "SRC"),
)
IMPOSSIBLE_IN_OURS = {
    "10^9 layers": ({"num_hidden_layers": 10**9}, "10"),
    "10^9 experts": ({"n_routed_experts": 10**9}, "n_routed_experts must be at most 100,000"),
    "dtype 16": ({"dtype": 16}, "dtype must be a floating-point type of torch"),
    "architectures": ({"architectures": [5]}, "architectures must be a list of class names, or null, got [5]"),
    "auto_map": ({"auto_map": False}, "auto_map must be an object, got False"),
    "widths of text": ({"hidden_size": "x" * 10**5}, "Field 'hidden_size' expected int, got str"),
    "deep": ({"extra": json.loads("[" * 100 + "]" * 100)}, "nested more than 64 deep"),
}


@pytest.mark.parametrize("command", OURS, ids=" ".join)
@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE_IN_OURS.values(), ids=IMPOSSIBLE_IN_OURS.keys())
def test_every_command_refuses_an_impossible_config_in_one_sentence(changes, words, command, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "source")
    configure(tmp_path / "source", **changes)
    places = {"SRC": tmp_path / "source", "OUT": tmp_path / "out"}
    assert_refused(capsys, words, *(places.get(word, word) for word in command))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_index_without_metadata_is_named_before_transformers_fails_on_it(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    index = tmp_path / "source" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    words = "model.safetensors.index.json has no metadata, without which transformers cannot read it"
    assert main(["verify", str(tmp_path / "source"), "--json"]) == 1
    assert words in json.loads(capsys.readouterr().out)["problems"][0]
    assert_refused(capsys, words, "convert", "cast", tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"a": ' * 10**5, '{"max_new_tokens": []}', '{"output_hidden_states": [null]}'],
    ids=["list", "half", "deep", "list of tokens", "list as flag"],
)
def test_a_generation_config_that_could_not_be_loaded_is_not_copied(content, tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    (tmp_path / "source" / "generation_config.json").write_text(content)
    command = ("convert", "gqa-to-mla", tmp_path / "source", tmp_path / "out")
    assert_refused(capsys, "generation_config.json", *command)


IMPOSSIBLE_IN_LAYOUT = {
    "experts as a list": ({"n_expert_groups": [1]}, "n_expert_groups must be a whole number, got [1]"),
    "length as text": ({"max_seq_len": "long"}, "max_seq_len must be a whole number, got 'long'"),
    "length of 10^30": ({"original_seq_len": 10**30}, "original_seq_len must be at most 1,000,000,000"),
    "no factor": ({"rope_factor": None}, "rope_factor must be a number of 0 or more, got None"),
    "no mscale": ({"mscale": None}, "mscale must be a number of 0 or more, got None"),
    "theta": ({"rope_theta": 1e-300}, "rope_theta in rope_scaling must be above 1"),
    "a width of 10^30": ({"qk_rope_head_dim": 10**30}, "qk_rope_head_dim must be at most 1,000,000"),
    "10^9 layers": ({"n_layers": 10**9}, "num_hidden_layers must be at most 500"),
    "a layer too many": ({"n_layers": 4}, "expected layers.3."),
}


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE_IN_LAYOUT.values(), ids=IMPOSSIBLE_IN_LAYOUT.keys())
def test_deepseeks_own_config_with_impossible_fields_is_refused(changes, words, tmp_path, capsys):
    tiny_model(torch.bfloat16, num_attention_heads=4).save_pretrained(tmp_path / "model")
    command = ["convert", "export-deepseek", str(tmp_path / "model"), str(tmp_path / "source")]
    assert main([*command, "--model-parallel", "2"]) == 0
    configure(tmp_path / "source", **changes)
    assert_refused(capsys, words, "convert", "import-deepseek", tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ten_to_the_nine_ranks_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"dim": 8}))
    tiny_model(torch.bfloat16).save_pretrained(tmp_path / "model")
    assert main(["convert", "export-deepseek", str(tmp_path / "model"), str(tmp_path / "source")]) == 0
    (tmp_path / "source" / "model0-mp1.safetensors").rename(tmp_path / "source" / "model0-mp1000000000.safetensors")
    words = "expected one file model<rank>-mp<ranks>.safetensors for each rank"
    assert_refused(capsys, words, "convert", "import-deepseek", tmp_path / "source", tmp_path / "out")


@pytest.fixture
def calibrated(tmp_path, monkeypatch) -> tuple:
    """The command of a calibrated conversion, which fails the test if it begins to calibrate."""
    save_source(tmp_path / "source", LlamaConfig)
    (tmp_path / "text").write_text("text " * 2000)

    def work(*arguments, **options):
        pytest.fail("the model was loaded before everything was checked")

    monkeypatch.setattr(compression_report, "load_model", work)
    options = ("--kv-lora-rank", "48", "--qk-rope-head-dim", "16", "--calibrate", tmp_path / "text")
    return ("convert", "gqa-to-mla", tmp_path / "source", tmp_path / "out", *options)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", "[]", "expected a JSON object in"),
        ("tokenizer.json", "{}", "expected the files of a tokenizer in"),
        ("tokenizer_config.json", "[" * 10**5, "nested too deeply"),
        ("generation_config.json", "[]", "expected a JSON object in"),
    ],
    ids=("list as tokenizer", "empty tokenizer", "deep tokenizer_config", "list as generation_config"),
)
def test_broken_files_beside_the_weights_are_refused_before_calibration(calibrated, file, content, words, capsys):
    source = calibrated[2]
    (source / "tokenizer.json").write_text("{}")
    (source / file).write_text(content)
    assert_refused(capsys, words, *calibrated)


def test_a_place_that_cannot_be_written_to_is_refused_before_calibration(calibrated, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = "expected a folder that can be written to"
    assert_refused(capsys, words, *calibrated[:3], tmp_path / "file" / "out", *calibrated[4:])


def test_a_full_disk_is_refused_before_calibration(calibrated, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=100))
    assert_refused(capsys, "which has 100 left", *calibrated)


def test_a_hub_that_is_not_reached_is_refused_before_calibration(calibrated, monkeypatch, capsys):
    class Unreachable:
        def create_repo(self, repo, exist_ok):
            # the HTTP library of huggingface_hub raises neither OSError nor ValueError
            raise RuntimeError("Name or service not known")

    monkeypatch.setattr(convert, "HfApi", Unreachable)
    assert_refused(capsys, "Name or service not known", *calibrated, "--push-to-hub", "me/model")
