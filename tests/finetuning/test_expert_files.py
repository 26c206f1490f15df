"""Trained experts are saved without the rest of the model, and load into it again or change nothing."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_latent import optimize_for_inference, whole_files
from deepseek_latent.finetuning.esft import load_experts, save_experts
from deepseek_latent.finetuning.expert_selection import ExpertSelection
from deepseek_latent.finetuning.packing import pack_experts
from tests.finetuning.support import CHOSEN, model_in_training, step
from tests.support import random_ids, tiny_model


@pytest.mark.parametrize(
    "selection",
    [
        ExpertSelection(CHOSEN),
        ExpertSelection(CHOSEN, shared_experts=True),
        ExpertSelection({2: [3]}, shared_experts=True, non_expert_modules=True),
    ],
    ids=["experts", "shared too", "all else too"],
)
@torch.no_grad()
def test_saved_experts_load_into_the_base_model(tmp_path, selection):
    model, ids = model_in_training(selection=selection), random_ids(2, 20)
    with torch.enable_grad():
        step(model)
    expected = model.eval()(ids).logits
    save_experts(model, selection, tmp_path)
    again = tiny_model()
    # DeepSeek's code expects every layer
    assert load_experts(again, tmp_path).experts == {layer: selection.experts.get(layer, []) for layer in (1, 2)}
    assert torch.equal(again(ids).logits, expected)
    # DeepSeek's code may leave the prefix of the backbone out of names
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    again = tiny_model()
    load_experts(again, tmp_path)
    assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.layers.2.mlp.experts.0.up_proj.weight"), "experts.0.up_proj.weight is missing"),
        (lambda x: x.update({"model.norm.weight": torch.ones(72)}), "model.norm.weight is unexpected"),
        (lambda x: x.update({"model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(3, 4)}), r"\[3, 4\], expected"),
    ],
    ids=["missing", "too many", "shape"],
)
def test_files_that_do_not_hold_the_selection_change_nothing(tmp_path, change, message):
    model = tiny_model()
    save_experts(model, ExpertSelection(CHOSEN), tmp_path)
    tensors = {name: x + 1 for name, x in load_file(tmp_path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_experts(model, tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_saving_another_selection_than_the_one_in_training_is_refused(tmp_path):
    model = model_in_training()
    others = {layer: [*chosen, 9] for layer, chosen in CHOSEN.items()}
    for selection in (ExpertSelection(others), ExpertSelection({1: CHOSEN[1]})):
        with pytest.raises(
            ValueError, match=r"expected the selection that is in training, with experts .* in layer \d, got"
        ):
            save_experts(model, selection, tmp_path / "experts")
    for part in ("shared_experts", "non_expert_modules"):
        with pytest.raises(ValueError, match=f"got one with {part}, which are frozen"):
            save_experts(model, ExpertSelection(CHOSEN, **{part: True}), tmp_path / "experts")
    one_layer = model_in_training(selection=ExpertSelection({1: CHOSEN[1]}))
    with pytest.raises(ValueError, match=r"with experts \[\] in layer 2, got \["):
        save_experts(one_layer, ExpertSelection(CHOSEN), tmp_path / "experts")
    assert not (tmp_path / "experts").exists()
    # a model without shared experts has none that are frozen
    selection = ExpertSelection(CHOSEN, shared_experts=True)
    save_experts(model_in_training(selection=selection, n_shared_experts=None), selection, tmp_path / "without shared")
    save_experts(model, ExpertSelection({layer: chosen[::-1] for layer, chosen in CHOSEN.items()}), tmp_path / "again")


def test_loading_a_truncated_file_or_no_folder_or_into_training_is_refused(tmp_path):
    model = tiny_model()
    save_experts(model, ExpertSelection(CHOSEN), tmp_path)
    with pytest.raises(ValueError, match="expected the folder that save_experts wrote, got the file"):
        load_experts(model, tmp_path / "expert_cfg.json")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off"):
        load_experts(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    training = model_in_training()
    with pytest.raises(ValueError, match="expected plain routed experts, and they are in training"):
        load_experts(training, tmp_path)


def test_saving_and_loading_experts_of_a_packed_model_is_refused(tmp_path):
    model = tiny_model()
    pack_experts(model)
    ExpertSelection(CHOSEN).save(tmp_path)
    for use in (lambda: load_experts(model, tmp_path), lambda: save_experts(model, ExpertSelection(CHOSEN), tmp_path)):
        with pytest.raises(ValueError, match=r"they are packed in 4 bits; unpack_experts\(model\) makes them plain"):
            use()


def test_saving_experts_into_the_folder_of_a_checkpoint_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which holds a checkpoint"):
        save_experts(tiny_model(), ExpertSelection(CHOSEN), tmp_path)


def test_saving_experts_into_a_folder_with_anything_else_is_refused(tmp_path):
    """It would be lost, since the folder is replaced as a whole."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"which holds notes\.txt; choose another"):
        save_experts(tiny_model(), ExpertSelection(CHOSEN), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["precious.safetensors", "model.safetensors"])
def test_tensors_that_are_not_trained_experts_are_not_replaced(name, tmp_path):
    model = tiny_model()
    save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=f"which holds {name}"):
        save_experts(model, ExpertSelection({1: [0]}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_earlier_save_is_replaced_as_a_whole(tmp_path):
    """Files of DeepSeek's code may be several; load_experts reads all of them."""
    model = tiny_model()
    save_experts(model, ExpertSelection(CHOSEN), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001.safetensors")
    # what a killed ExpertSelection.save leaves
    (tmp_path / ".expert_cfg.json.abcdefgh.unfinished").mkdir()
    save_experts(model, ExpertSelection({2: [3]}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert_cfg.json", "model.safetensors"]
    assert load_experts(tiny_model(), tmp_path).experts == {1: [], 2: [3]}


@pytest.mark.parametrize("failing", ["tensors", "selection"])
def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch, failing):
    model = tiny_model()
    save_experts(model, ExpertSelection(CHOSEN), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    target, name = (whole_files, "save_file") if failing == "tensors" else (Path, "write_bytes")
    monkeypatch.setattr(target, name, full_disk)
    with pytest.raises(OSError, match=r"could not be written: it needs [\d,]+ bytes, .* \(No space left"):
        save_experts(model, ExpertSelection({2: [3]}), tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_files_have_the_usual_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    save_experts(tiny_model(), ExpertSelection(CHOSEN), tmp_path / "experts")
    assert {path.stat().st_mode for path in (tmp_path / "experts").iterdir()} == {usual.stat().st_mode}


def test_saving_experts_that_are_not_an_expert_selection_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected an ExpertSelection, got dict"):
        save_experts(tiny_model(), CHOSEN, tmp_path)


def test_loading_a_folder_without_a_selection_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expert_cfg.json, as save_experts .* it is not there; checkpoints load with"):
        load_experts(tiny_model(), tmp_path)


def whole_folder(folder) -> tuple[torch.nn.Module, dict]:
    """A model, and the files of some of its experts, in which all weights are larger by 1."""
    model = tiny_model()
    save_experts(model, ExpertSelection(CHOSEN, shared_experts=True), folder)
    tensors = {name: x + 1 for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return model, tensors


NAME = "model.layers.2.mlp.experts.0.up_proj.weight"
WRONG = {
    "NaN": (lambda x: x.fill_(torch.nan), "has numbers that are infinite or none"),
    "one infinity": (lambda x: x.view(-1)[5:6].fill_(torch.inf), "has numbers that are infinite or none"),
    "integers": (lambda x: x.to(torch.int64), r"has dtype torch.int64, expected floats"),
    "8 bits": (lambda x: x.to(torch.float8_e4m3fn), "has dtype torch.float8_e4m3fn, expected floats"),
    "too large for the model": (lambda x: x.double().fill_(1e300), "infinite or none in torch.float32"),
    "transposed": (lambda x: x.T.contiguous(), r"has shape \[72, 32\], expected \[32, 72\]"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
@torch.no_grad()
def test_tensors_that_the_model_cannot_hold_change_nothing(tmp_path, change, message):
    model, tensors = whole_folder(tmp_path)
    changed = change(tensors[NAME])
    save_file(tensors if changed.shape == (1,) else tensors | {NAME: changed}, tmp_path / "model.safetensors")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_experts(model, tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    model, tensors = whole_folder(tmp_path)
    save_file({NAME: tensors[NAME]}, tmp_path / "older.safetensors")
    with pytest.raises(ValueError, match=f"{NAME} is there twice"):
        load_experts(model, tmp_path)
    (tmp_path / "older.safetensors").unlink()
    save_file(tensors | {NAME.removeprefix("model."): tensors[NAME].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{NAME} is there twice"):
        load_experts(model, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"shared_experts": "false"},
        {"non_expert_modules": 0},
        {"experts": {"1": [True]}},
        {"experts": {"1": [0], "01": [2]}},
        {"experts": {"1.0": [0]}},
        {"experts": {" 1": [0]}},
        {"experts": {"1": "0"}},
        {"experts": {"1": [0.0]}},
        {"experts": [[0]]},
        {"experts": "x" * 100_000},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_selection_that_says_something_else_is_refused_in_one_sentence(tmp_path, change):
    whole = {"experts": {"1": [0]}, "shared_experts": False, "non_expert_modules": False}
    (tmp_path / "expert_cfg.json").write_text(json.dumps(whole | change))
    with pytest.raises(ValueError, match="got something else") as error:
        ExpertSelection.load(tmp_path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "", "\x00", "[1]", "{}", '{"experts": null}', '{"experts": {"1": [0], "1": [2]}}'],
    ids=lambda x: repr(x[:15]),
)
def test_a_selection_that_is_no_selection_is_refused(tmp_path, text):
    (tmp_path / "expert_cfg.json").write_text(text)
    with pytest.raises(ValueError, match="got something else"):
        ExpertSelection.load(tmp_path)


def test_loading_into_weights_that_are_not_in_memory_or_rounded_is_refused_and_changes_nothing(tmp_path):
    model = tiny_model()
    save_experts(model, ExpertSelection({}, shared_experts=True, non_expert_modules=True), tmp_path / "experts")
    model.save_pretrained(tmp_path / "model")
    in_memory = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(in_memory, "cpu") | {"model.layers.2": "disk"}
    offloaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    with pytest.raises(ValueError, match=r"expected weights in memory .* model\.layers\.2\."):
        load_experts(offloaded, tmp_path / "experts")
    optimize_for_inference(model, weights="int8")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected plain routed experts"):
        load_experts(model, tmp_path / "experts")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
