"""`inspect` finds every way in which the files of a folder do not fit its config.json."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_latent import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2Model,
)
from deepseek_latent.commands.__main__ import main
from deepseek_latent.commands.inspect import MAX_PROBLEMS_SHOWN
from deepseek_latent.conversion.checkpoint import check_checkpoint, checkpoint_tensors, read_config
from tests.commands.terminal import assert_refused
from tests.support import V2, official_state_dict, tiny_model


def inspect(capsys, *arguments) -> tuple[int, str]:
    status = main(["inspect", *(str(argument) for argument in arguments)])
    return status, capsys.readouterr().out


def rewrite(folder, change) -> None:
    """Applies `change` to the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    tiny_model(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    tiny_model(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    return tmp_path


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"n_routed_experts": None},
        {"n_shared_experts": None},
        {"moe_layer_freq": 2},
        {"tie_word_embeddings": True},
    ],
    ids=lambda overrides: "-".join(overrides) or "V2",
)
def test_expected_tensors_are_those_that_saving_writes(overrides):
    model = tiny_model(**overrides)
    written = {name: tuple(tensor.shape) for name, tensor in official_state_dict(model).items()}
    assert checkpoint_tensors(model.config) == written


def test_listing_tensors_does_not_change_the_config():
    config = DeepseekV2Config(**V2)
    before = dict(vars(config))
    checkpoint_tensors(config)
    assert vars(config) == before


@pytest.mark.parametrize("model_class", [DeepseekV2Model, DeepseekV2ForSequenceClassification])
def test_files_of_other_heads_are_checked_against_their_own_class(tmp_path, capsys, model_class):
    model_class(DeepseekV2Config(**V2)).save_pretrained(tmp_path)
    status, out = inspect(capsys, tmp_path)
    assert status == 0
    assert model_class.__name__ in out


@pytest.mark.parametrize("shards", ["folder", "sharded"])
def test_saved_files_fit(request, capsys, shards):
    folder = request.getfixturevalue(shards)
    status, out = inspect(capsys, folder)
    assert status == 0
    num_files = len(list(folder.glob("*.safetensors")))
    assert f"{len(checkpoint_tensors(read_config(str(folder))))} tensors, {num_files} file(s)." in out


def test_missing_misshapen_foreign_and_unexpected_tensors_are_named(folder, capsys):
    def damage(tensors):
        del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
        tensors["model.layers.2.self_attn.o_proj.weight"] = torch.zeros(72, 71, dtype=torch.bfloat16)
        tensors["model.norm.weight"] = torch.ones(72)
        tensors["model.layers.3.input_layernorm.weight"] = torch.ones(72, dtype=torch.bfloat16)

    rewrite(folder, damage)
    status, out = inspect(capsys, folder)
    assert status == 1
    assert "model.layers.1.mlp.experts.7.up_proj.weight is missing\n" in out
    assert "model.layers.2.self_attn.o_proj.weight has shape [72, 71], expected [72, 72]" in out
    assert "model.norm.weight has dtype F32, expected BF16" in out
    assert "model.layers.3.input_layernorm.weight is unexpected" in out
    assert "4 problems" in out


def test_stacked_experts_in_a_file_are_not_the_official_layout(folder):
    name = "model.layers.1.mlp.experts"
    rewrite(folder, lambda tensors: tensors.update({f"{name}.down_proj": torch.zeros(12, 72, 32).bfloat16()}))
    report = check_checkpoint(folder, read_config(str(folder)))
    assert report.problems == [f"{name}.down_proj is unexpected, in model.safetensors"]


def test_without_a_dtype_in_the_config_any_float_fits_and_integers_do_not(folder):
    edit_json(folder / "config.json", lambda config: (config.pop("dtype"), config.pop("torch_dtype", None)))
    assert check_checkpoint(folder, read_config(str(folder))).problems == []
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(72, dtype=torch.int8)}))
    (problem,) = check_checkpoint(folder, read_config(str(folder))).problems
    assert "model.norm.weight has dtype I8" in problem


def test_a_tied_head_may_be_absent_or_present_but_not_misshapen(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    config = read_config(str(tmp_path))
    assert check_checkpoint(tmp_path, config).problems == []
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 72)}))
    assert check_checkpoint(tmp_path, config).problems == []
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 73)}))
    (problem,) = check_checkpoint(tmp_path, config).problems
    assert "lm_head.weight has shape [96, 73], expected [96, 72]" in problem


def test_an_untied_head_must_be_present(folder):
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert check_checkpoint(folder, read_config(str(folder))).problems == ["lm_head.weight is missing"]


def test_an_index_that_names_an_absent_file_is_found(sharded, capsys):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    names = set(load_file(shard))
    shard.unlink()
    status, out = inspect(capsys, sharded, "--all")
    assert status == 1
    assert f"{shard.name} is absent" in out
    assert f"{len(names)} tensors are missing, including those of the unreadable files" in out
    assert "2 problems" in out


def test_a_tensor_in_another_file_than_the_index_names_is_found(sharded):
    index = sharded / "model.safetensors.index.json"
    first, second, *_ = sorted(file.name for file in sharded.glob("model-*.safetensors"))
    name = next(iter(load_file(sharded / first)))
    edit_json(index, lambda content: content["weight_map"].update({name: second}))
    (problem,) = check_checkpoint(sharded, read_config(str(sharded))).problems
    assert problem == f"{name} is not in {second}, where model.safetensors.index.json places it"


def test_a_tensor_missing_from_the_index_is_found(sharded):
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].pop("model.norm.weight"))
    (problem,) = check_checkpoint(sharded, read_config(str(sharded))).problems
    assert problem.startswith("model.norm.weight is in model-")
    assert problem.endswith("but model.safetensors.index.json does not name it")


def test_a_tensor_in_two_files_is_found(sharded):
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    problems = check_checkpoint(sharded, read_config(str(sharded))).problems
    assert problems == [f"{name} is in two files, {first.name} and {second.name}"]


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', "{}"])
def test_a_broken_index_is_found(sharded, capsys, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    status, out = inspect(capsys, sharded)
    assert status == 1
    assert "model.safetensors.index.json is not JSON with a weight_map" in out


def test_shards_without_an_index_are_found(sharded, capsys):
    (sharded / "model.safetensors.index.json").unlink()
    status, out = inspect(capsys, sharded)
    assert status == 1
    assert "model.safetensors.index.json is absent" in out


def test_a_single_file_beside_an_index_is_found(sharded):
    save_file({}, sharded / "model.safetensors")
    (problem,) = check_checkpoint(sharded, read_config(str(sharded))).problems
    assert "both exist" in problem


@pytest.mark.parametrize("content", ["cut off", "git lfs pointer"])
def test_an_incomplete_file_is_found(folder, capsys, content):
    file = folder / "model.safetensors"
    if content == "cut off":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n")
    status, out = inspect(capsys, folder)
    assert status == 1
    assert "model.safetensors is cut off or not a safetensors file" in out


def test_many_problems_are_counted_and_all_are_listed_on_request(folder, capsys):
    rewrite(folder, dict.clear)
    total = len(checkpoint_tensors(read_config(str(folder))))
    _, out = inspect(capsys, folder)
    assert out.count("is missing\n") == MAX_PROBLEMS_SHOWN
    assert f"... and {total - MAX_PROBLEMS_SHOWN} more" in out
    assert inspect(capsys, folder, "--all")[1].count("is missing\n") == total


def test_checking_files_loads_no_weights(folder, monkeypatch):
    monkeypatch.setattr(DeepseekV2ForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(torch, "frombuffer", None)
    assert main(["inspect", str(folder)]) == 0


def test_quantized_weights_are_refused_and_not_called_broken(folder, capsys):
    edit_json(folder / "config.json", lambda config: config.update({"quantization_config": {"quant_method": "fp8"}}))
    assert main(["inspect", str(folder)]) == 2
    assert "expected unquantized weights" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(folder, capsys):
    edit_json(folder / "config.json", lambda config: config.update({"use_mla": False}))
    assert_refused(capsys, "inspect", folder, saying="use_mla must be true")


def test_the_config_of_the_first_upload_is_read(folder, capsys):
    first_upload = {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"]}
    edit_json(folder / "config.json", lambda config: config.update(first_upload))
    assert inspect(capsys, folder)[0] == 0
