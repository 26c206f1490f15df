"""`export-code`: a folder with exported code loads where this package is not installed, and gives the same logits."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek_latent import (
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
)
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.remote_code import auto_map, export_code, exported_files
from tests.commands.terminal import assert_refused
from tests.support import random_ids, tiny_model

# runs in a Python that cannot import the package, and prints one JSON object
ELSEWHERE = """
import json, sys
from pathlib import Path
sys.modules["deepseek_latent"] = None
import torch, transformers
folder, again = Path(sys.argv[1]), Path(sys.argv[2])
ids = torch.load(folder / "ids.pt")
answers = torch.load(folder / "answers.pt")
found = {"errors": {}, "modules": {}}
for auto, expected in answers.items():
    torch.manual_seed(0)
    model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    found["modules"][auto] = type(model).__module__, type(model.config).__module__
    found.setdefault("missing", {})[auto] = sorted(info["missing_keys"])
    if hasattr(model, "score"):
        torch.nn.init.constant_(model.score.weight, 0.01)
    with torch.no_grad():
        found["errors"][auto] = (model.eval()(ids)[0] - expected).abs().max().item()
    if auto == "AutoModelForCausalLM":
        causal = model
output = causal.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
found["cache"] = type(output.cache).__name__
found["tokens"] = output.sequences.tolist()
found["experts"] = causal.config._experts_implementation
causal.save_pretrained(again)
model = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
found["again_module"] = type(model).__module__
with torch.no_grad():
    found["again_error"] = (model.eval()(ids)[0] - answers["AutoModelForCausalLM"]).abs().max().item()
print(json.dumps(found))
"""


def without_the_package(tmp_path, script, *arguments) -> dict:
    """Runs `script` in a new Python, in another folder, offline and with empty caches. Returns what it prints."""
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    # on some processors the order of a sum depends on the number of threads
    own = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    (tmp_path / "cwd").mkdir(exist_ok=True)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=keep | own, cwd=tmp_path / "cwd", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def classifier(model_class, causal):
    model = model_class(causal.config)
    model.model.load_state_dict(causal.model.state_dict())
    torch.nn.init.constant_(model.score.weight, 0.01)
    return model.eval()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The report of a Python without the package on an exported folder, the model, and both folders."""
    place = tmp_path_factory.mktemp("elsewhere")
    folder, again = place / "checkpoint", place / "again"
    causal = tiny_model(pad_token_id=0)
    causal.save_pretrained(folder, max_shard_size="100KB")
    ids = random_ids(2, 9)
    models = {
        "AutoModel": causal.model,
        "AutoModelForCausalLM": causal,
        "AutoModelForSequenceClassification": classifier(DeepseekV2ForSequenceClassification, causal),
        "AutoModelForTokenClassification": classifier(DeepseekV2ForTokenClassification, causal),
    }
    with torch.no_grad():
        answers = {auto: model(ids)[0] for auto, model in models.items()}
    torch.save(ids, folder / "ids.pt")
    torch.save(answers, folder / "answers.pt")
    assert main(["export-code", str(folder)]) == 0
    return without_the_package(place, ELSEWHERE, folder, again), causal, folder, again


def test_every_auto_class_uses_the_folders_code(elsewhere):
    found = elsewhere[0]["modules"]
    assert set(found) == set(auto_map()) - {"AutoConfig"}
    assert all(module.startswith("transformers_modules.") for modules in found.values() for module in modules)


def test_the_folders_code_gives_the_same_logits(elsewhere):
    assert set(elsewhere[0]["errors"].values()) == {0.0}


def test_remote_code_loads_all_experts_from_the_checkpoint(elsewhere):
    missing = elsewhere[0]["missing"]
    assert missing["AutoModelForCausalLM"] == missing["AutoModel"] == []
    assert {name.partition(".")[0] for names in missing.values() for name in names} == {"score"}


def test_remote_code_caches_latents_and_generates_the_same_tokens(elsewhere):
    found, causal, *_ = elsewhere
    expected = causal.generate(random_ids(2, 9), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert found["cache"] == "LatentCache"
    assert found["tokens"] == expected.tolist()


def test_remote_code_chooses_the_same_experts_implementation(elsewhere):
    found, causal, *_ = elsewhere
    assert found["experts"] == causal.config._experts_implementation


def test_a_model_saved_by_remote_code_loads_as_remote_code(elsewhere):
    found = elsewhere[0]
    assert found["again_module"].startswith("transformers_modules.")
    assert found["again_error"] == 0.0


def test_a_model_saved_by_remote_code_loads_with_the_packages_classes(elsewhere):
    _, causal, _, again = elsewhere
    model = AutoModelForCausalLM.from_pretrained(again)
    assert type(model) is DeepseekV2ForCausalLM
    assert torch.equal(model(random_ids(2, 9)).logits, causal(random_ids(2, 9)).logits)


def test_a_model_saved_by_remote_code_still_names_every_class(elsewhere):
    assert json.loads((elsewhere[3] / "config.json").read_text())["auto_map"] == auto_map()


def test_a_pipeline_does_not_load_an_incomplete_checkpoint_with_transformers_own_class(tmp_path):
    """Nor does it initialize what is missing, as transformers' own class would."""
    folder = tmp_path / "checkpoint"
    tiny_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    export_code(folder)
    script = """
import json, sys
sys.modules["deepseek_latent"] = None
from transformers import pipeline
try:
    loaded = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
    print(json.dumps({"loaded": type(loaded.model).__module__}))
except LookupError as error:
    print(json.dumps({"error": str(error)}))
"""
    found = without_the_package(tmp_path, script, folder)
    assert "model.layers.1.self_attn.o_proj.weight is missing" in found.get("error", ""), found


def test_the_package_is_used_if_it_is_installed(elsewhere):
    model = AutoModelForCausalLM.from_pretrained(elsewhere[2], trust_remote_code=True)
    assert type(model) is DeepseekV2ForCausalLM


def test_saving_with_the_package_removes_auto_map(elsewhere, tmp_path):
    AutoModelForCausalLM.from_pretrained(elsewhere[2]).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_exactly_the_files_that_the_model_imports_are_exported(elsewhere):
    names = exported_files().keys()
    assert {"configuration_deepseek_v2.py", "modeling_deepseek_v2.py", "cache_latent_cache.py"} <= names
    assert {file.name for file in elsewhere[2].glob("*.py")} == names
    rooms = {name.partition("_")[0] for name in names}
    assert not rooms & {"commands", "conversion", "finetuning", "kernels"}


def test_the_code_can_be_in_a_subfolder(tmp_path):
    folder, again = tmp_path / "checkpoint", tmp_path / "again"
    causal = tiny_model()
    causal.save_pretrained(folder)
    ids = random_ids(2, 9)
    with torch.no_grad():
        torch.save({"AutoModelForCausalLM": causal(ids)[0], "AutoModel": causal.model(ids)[0]}, folder / "answers.pt")
    torch.save(ids, folder / "ids.pt")
    assert main(["export-code", str(folder), "--subfolder", "code"]) == 0
    assert not [*folder.glob("*.py")]
    found = without_the_package(tmp_path, ELSEWHERE, folder, again)
    assert set(found["errors"].values()) == {0.0}
    assert found["again_error"] == 0.0
    # transformers saves code beside the weights
    saved = json.loads((again / "config.json").read_text())["auto_map"]
    assert saved == auto_map()
    with pytest.raises(ValueError, match="a subfolder that Python can import"):
        export_code(folder, "../code")


def test_other_fields_of_config_json_are_kept(tmp_path):
    before = {
        "model_type": "deepseek_v2",
        "a_key_nobody_knows": {"deep": [1, 2.5, None, "ü"]},
        "rms_norm_eps": 1e-06,
        "auto_map": {"AutoModel": "modeling_deepseek.DeepseekV2Model", "AutoTokenizer": ["tok.Tok", None]},
        "transformers_version": "4.39.3",
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(before))
    export_code(tmp_path)
    after = json.loads(config.read_text(encoding="utf-8"))
    assert list(after) == list(before)
    assert after.pop("auto_map") == {"AutoTokenizer": ["tok.Tok", None]} | auto_map()
    before.pop("auto_map")
    assert after == before


def test_exporting_twice_changes_nothing(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    export_code(tmp_path)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    export_code(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == first


def test_the_permissions_of_config_json_are_kept(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "deepseek_v2"}')
    config.chmod(0o640)
    export_code(tmp_path)
    assert config.stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_config_json_unchanged(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    assert main(["export-code", str(tmp_path)]) == 2
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("at", [0, 1, 2, 3, 20, -2, -1])
def test_an_export_over_an_earlier_one_never_mixes_the_files_of_both(tmp_path, monkeypatch, at):
    """It ends at the nth file that it puts in place; config.json names the code of one export, or none."""
    export_over(tmp_path, "before")
    names = [*exported_files()]
    at = at if at >= 0 else len(names) + 2 + at
    replace, calls = os.replace, itertools.count()

    def ending(source, target):
        if next(calls) == at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", ending)
        with pytest.raises(KeyboardInterrupt):
            export_code(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    are_old = {(tmp_path / name).read_text() == "before" for name in names}
    assert config["auto_map"] == {"AutoTokenizer": ["tok.Tok", None]} | (auto_map() if at == 0 else {})
    assert at > 0 or are_old == {True}
    export_code(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in names} == exported_files()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"].items() >= auto_map().items()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "config.json"])


def export_over(folder, text: str) -> None:
    """An export into `folder` whose files all have another text."""
    named = {"AutoTokenizer": ["tok.Tok", None]} | auto_map()
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v2", "auto_map": named}))
    for name in exported_files():
        (folder / name).write_text(text)


def test_a_linked_config_is_replaced_and_the_cache_it_points_to_is_not(tmp_path):
    blob, snapshot = tmp_path / "blob", tmp_path / "snapshot"
    blob.write_text('{"model_type": "deepseek_v2"}')
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to(blob)
    export_code(snapshot)
    assert blob.read_text() == '{"model_type": "deepseek_v2"}'
    assert "auto_map" in json.loads((snapshot / "config.json").read_text())


def test_export_refuses_in_one_sentence(tmp_path, capsys):
    config = tmp_path / "config.json"
    assert_refused(capsys, "export-code", tmp_path, saying="expected a folder with config.json")
    assert_refused(capsys, "export-code", tmp_path / "absent", saying="expected a folder with config.json")
    for content, saying in {
        '{"model_type": "llama"}': "model_type must be 'deepseek_v2', got 'llama'",
        "{}": "model_type must be 'deepseek_v2', got None",
        "[]": "expected a JSON object",
        "{": "expected JSON",
        '{"model_type": "deepseek_v2", "use_mla": false}': "use_mla must be true",
    }.items():
        config.write_text(content)
        assert_refused(capsys, "export-code", tmp_path, saying=saying)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_code_is_not_written_through_a_link_in_the_folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint" / "code").symlink_to("../elsewhere")
    with pytest.raises(ValueError, match="code is a link"):
        export_code(tmp_path / "checkpoint", "code")
    assert not [*(tmp_path / "elsewhere").iterdir()]
