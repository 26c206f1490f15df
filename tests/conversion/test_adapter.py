"""Adapters with separate experts, as transformers 4 trained them, become adapters of stacked experts, and back."""

import json
import os
import re
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_latent import lora_config
from deepseek_latent.commands.__main__ import main
from tests.conversion.separate_experts import SeparateExperts, deltas
from tests.support import random_ids, relative_error, tiny_model

PREFIX = "base_model.model."
NAMES = {"gate": (32, 72), "up": (32, 72), "down": (72, 32)}  # out, in


def separate_adapter(folder, names=("gate", "up", "down"), r: int = 3, **config) -> dict[str, Tensor]:
    """Saves an adapter of transformers 4 on attention, all MLPs and every expert, and returns its tensors."""
    modules = ["o_proj", *(f"{name}_proj" for name in names)]
    model = get_peft_model(
        tiny_model(),
        LoraConfig(**{"r": r, "lora_alpha": 7, "target_modules": modules, "init_lora_weights": False} | config),
    )
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for layer in (1, 2):
        for expert in range(12):
            for name in names:
                out, into = NAMES[name]
                place = f"{PREFIX}model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
                tensors[f"{place}.lora_A.weight"] = torch.randn(r, into)
                tensors[f"{place}.lora_B.weight"] = torch.randn(out, r)
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def merged_by_hand(tensors: dict[str, Tensor], scaling_of):
    """The model with B A added to every weight, from an adapter with separate experts."""
    model = tiny_model()
    with torch.no_grad():
        for name in [name for name in tensors if "lora_A" in name]:
            place = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            delta = scaling_of(place) * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            single = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj", place)
            if single is None:
                model.get_submodule(place).weight.add_(delta)
                continue
            experts, expert = model.get_submodule(single[1]), int(single[2])
            if single[3] == "down":
                experts.down_proj[expert].add_(delta)
            else:
                experts.gate_up_proj[expert].chunk(2)[single[3] == "up"].add_(delta)
    return model


CASES = {
    "all": ({}, 7 / 3),
    "gate and up": ({"names": ("gate", "up")}, 7 / 3),
    "down": ({"names": ("down",)}, 7 / 3),
    "rsLoRA": ({"use_rslora": True}, 7 / 3**0.5),
}


@pytest.mark.parametrize(("options", "scaling"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_a_converted_adapter_acts_on_everything_it_was_trained_on(tmp_path, options, scaling):
    tensors, ids = separate_adapter(tmp_path / "old", **options), random_ids(2, 20)
    assert main(["convert", "adapter", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    expected = merged_by_hand(tensors, lambda place: scaling)(ids).logits
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "new").eval()
    assert relative_error(model(ids).logits, expected) < 1e-5
    loaded = tiny_model()
    loaded.load_adapter(str(tmp_path / "new"))
    assert relative_error(loaded.eval()(ids).logits, expected) < 1e-5


def test_the_report_names_targets_that_have_no_effect_in_other_programs(tmp_path, capsys):
    separate_adapter(tmp_path / "old", target_modules=["kv_b_proj", "gate_proj", "up_proj", "down_proj"])
    assert main(["convert", "adapter", str(tmp_path / "old"), str(tmp_path / "new"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["no_effect_in_vllm"].startswith("kv_b_proj; merge the adapter")
    assert report["no_effect_in_transformers"].startswith("down_proj, gate_proj, up_proj; import deepseek_latent")
    assert report["no_effect_in_llama.cpp"].startswith("kv_b_proj; ")


def test_loading_separate_experts_names_the_command_that_converts_them(tmp_path):
    separate_adapter(tmp_path / "old")
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "old")
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        tiny_model().load_adapter(str(tmp_path / "old"))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
@torch.no_grad()
def test_separate_experts_add_the_same_as_stacked_ones(tmp_path, options):
    torch.manual_seed(2)
    ids, config = (
        random_ids(2, 20),
        lora_config(tiny_model(), r=9, routed_experts=True, init_lora_weights=False, **options),
    )
    model = get_peft_model(tiny_model(), config).eval()
    model.save_pretrained(tmp_path / "stacked")
    assert main(["convert", "adapter", str(tmp_path / "stacked"), str(tmp_path / "single")]) == 0
    tensors = load_file(tmp_path / "single" / "adapter_model.safetensors")
    assert tensors[f"{PREFIX}model.layers.1.mlp.experts.11.up_proj.lora_A.weight"].shape == (3, 72)
    written = json.loads((tmp_path / "single" / "adapter_config.json").read_text())
    assert written["target_parameters"] is None

    def scaling_of(place: str) -> float:
        rank = next((r for key, r in written["rank_pattern"].items() if re.search(key, place)), written["r"])
        alpha = next((x for key, x in written["alpha_pattern"].items() if re.search(key, place)), written["lora_alpha"])
        return alpha / (rank**0.5 if options else rank)

    by_hand = merged_by_hand(tensors, scaling_of)
    assert relative_error(by_hand(ids).logits, model(ids).logits) < 1e-5


def test_unsuitable_adapters_are_refused(tmp_path, capsys):
    def refused(*words: str) -> None:
        assert main(["convert", "adapter", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert all(word in error for word in words), error
        assert not (tmp_path / "b").exists()

    refused("adapter_config.json")
    tensors = separate_adapter(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    one = next(name for name in tensors if ".experts.3.up_proj.lora_A" in name)
    save_file({name: x for name, x in tensors.items() if name != one}, weights)
    refused("all experts in every layer")
    save_file({name: x for name, x in tensors.items() if ".experts." not in name}, weights)
    refused("expected routed experts", "got none")
    save_file(tensors | {f"{PREFIX}model.layers.1.mlp.experts.lora_A.weight": torch.zeros(36, 72)}, weights)
    refused("got both")
    weights.write_bytes(b"nothing")
    refused("adapter_model.safetensors")
    separate_adapter(tmp_path / "a", use_dora=True)
    refused("without DoRA")


# ---- There and back --------------------------------------------------------------------------------------------------


def small_model(dtype: torch.dtype = torch.float32):
    return tiny_model(dtype, n_routed_experts=4, n_group=2, num_experts_per_tok=2)


def stacked_adapter(folder, **options) -> None:
    """Saves an adapter of this package on stacked experts; with a `dtype`, of a model in it."""
    model = small_model(options.pop("dtype", torch.float32))
    model = get_peft_model(model, lora_config(model, **{"routed_experts": True, "init_lora_weights": False} | options))
    model.save_pretrained(folder)


def saved(folder) -> tuple[dict[str, Tensor], dict]:
    config = json.loads((folder / "adapter_config.json").read_text())
    # peft writes sets in any order
    config["target_modules"] = sorted(config["target_modules"])
    return load_file(folder / "adapter_model.safetensors"), config


def convert(tmp_path, *names: str) -> None:
    for source, out in pairwise(names):
        assert main(["convert", "adapter", str(tmp_path / source), str(tmp_path / out)]) == 0


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


BY_LAYER = ["model.layers.2.mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj"]
MADE = {
    "as it is": {},
    "as it starts": {"init_lora_weights": True},
    "an odd rank": {"r": 7, "lora_alpha": 5},
    "rsLoRA": {"r": 9, "use_rslora": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "gate and up": {"target_parameters": ["experts.gate_up_proj"]},
    "down": {"target_parameters": ["mlp.experts.down_proj"]},
    "one layer": {"target_parameters": BY_LAYER},
    "each layer another": {"target_parameters": ["layers.1.mlp.experts.gate_up_proj", "experts.down_proj"]},
    "the router too": {"target_parameters": ["gate.weight", "experts.gate_up_proj"]},
    "ranks by layer": {"rank_pattern": {r"model\.layers\.1\.mlp\.experts\.gate.*": 4, "mlp.experts.down_proj": 2}},
    "ranks by any pattern": {"rank_pattern": {".*down_proj": 5}, "alpha_pattern": {".*": 3}},
    "a pattern of modules": {"target_modules": r".*\.self_attn\.(o|q_b)_proj"},
    "attention alone": {"target_modules": ["o_proj", "kv_b_proj"]},
    "no modules": {"target_modules": []},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": [".*layers.0.*", "down_proj"]},
    "a whole head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("options", MADE.values(), ids=MADE)
def test_an_adapter_of_this_package_is_the_same_after_there_and_back(tmp_path, options):
    stacked_adapter(tmp_path / "made", **options)
    convert(tmp_path, "made", "separate", "again")
    assert_same_bits(saved(tmp_path / "again")[0], saved(tmp_path / "made")[0])
    between = PeftModel.from_pretrained(SeparateExperts(small_model()), tmp_path / "separate")
    # what the config names is what the file holds
    assert get_peft_model_state_dict(between).keys() == saved(tmp_path / "separate")[0].keys()
    made, again = (PeftModel.from_pretrained(small_model(), tmp_path / name).eval() for name in ("made", "again"))
    assert torch.equal(again(random_ids(1, 8)).logits, made(random_ids(1, 8)).logits)
    expected, found = deltas(made), deltas(between)
    assert expected.keys() == found.keys()
    for place, delta in expected.items():
        assert relative_error(found[place], delta) < 1e-13 or torch.equal(found[place], delta)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["o_proj"]}], ids=str)
def test_the_config_of_an_adapter_of_this_package_is_the_same_after_there_and_back(tmp_path, options):
    stacked_adapter(tmp_path / "made", **options)
    convert(tmp_path, "made", "separate", "again")
    assert saved(tmp_path / "again")[1] == saved(tmp_path / "made")[1]


MLP = ["gate_proj", "up_proj", "down_proj"]
TRAINED = {
    "all": {"target_modules": ["o_proj", *MLP]},
    "rsLoRA": {"target_modules": MLP, "use_rslora": True},
    "a pattern": {"target_modules": r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj"},
    "a pattern of one layer": {"target_modules": r"(.*\.)?layers\.2\.mlp\.experts\.\d+\.(gate|up)_proj|.*o_proj"},
    "some layers": {"target_modules": ["o_proj", *MLP], "layers_to_transform": [0, 2]},
    "excluded": {"target_modules": MLP, "exclude_modules": r".*layers\.1\..*"},
    "ranks": {"target_modules": MLP, "rank_pattern": {r".*\.experts\..*": 5, "down_proj": 2}},
    "ranks by layer": {"target_modules": MLP, "rank_pattern": {"layers.1.*": 5}, "alpha_pattern": {"layers.2.*": 3}},
}


@pytest.mark.parametrize("is_shared", [False, True], ids=["of their own", "gate and up share A"])
@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
@torch.no_grad()
def test_an_adapter_of_separate_experts_is_the_same_after_there_and_back(tmp_path, options, is_shared):
    config = LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **options)
    model = get_peft_model(SeparateExperts(small_model()), config)
    for layer in model.modules():
        if (
            is_shared
            and isinstance(layer, torch.nn.ModuleDict)
            and "gate_proj" in layer
            and hasattr(layer["gate_proj"], "lora_A")
        ):
            layer["up_proj"].lora_A["default"].weight.copy_(layer["gate_proj"].lora_A["default"].weight)
    model.save_pretrained(tmp_path / "made")
    convert(tmp_path, "made", "stacked", "again")
    assert_same_bits(saved(tmp_path / "again")[0], saved(tmp_path / "made")[0])
    stacked = PeftModel.from_pretrained(small_model(), tmp_path / "stacked")
    assert get_peft_model_state_dict(stacked).keys() == saved(tmp_path / "stacked")[0].keys()
    again = PeftModel.from_pretrained(SeparateExperts(small_model()), tmp_path / "again")
    expected = deltas(model)
    for found in (deltas(stacked), deltas(again)):
        assert found.keys() == expected.keys()
        assert all(relative_error(found[place], delta) < 1e-13 for place, delta in expected.items())


def test_the_dropout_that_stacked_experts_cannot_have_is_reported_and_gone(tmp_path, capsys):
    separate_adapter(tmp_path / "old", lora_dropout=0.05)
    convert(tmp_path, "old", "new")
    assert "0.05 before, 0 now" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["lora_dropout"] == 0
    PeftModel.from_pretrained(tiny_model(), tmp_path / "new")


NOT_UNDERSTOOD = {
    "r": (True, 0, "3", None, 4),
    "lora_alpha": (float("nan"), None, "7", 10**400),
    "use_rslora": ("yes",),
    "init_lora_weights": ("pissa", "olora", 3),
    "rank_pattern": ({"o_proj": 0}, {"(": 3}, [3], {"experts.3.gate_proj": 4}, {"gate_proj": 1}),
    "alpha_pattern": ({"up_proj": 2}, {"experts.0.*": 4}, {"x": None}),
    "target_modules": (None, "all-linear", "(", 3, ["o_proj"], ["o_proj", "gate_proj", "down_proj"], ["a", 1]),
    "exclude_modules": (r".*experts\.3\..*", ["down_proj"], "(", 1),
    "modules_to_save": (["mlp"], "mlp", ["("]),
    "layers_to_transform": ([1], "1", [True]),
    "target_parameters": ("experts", [1]),
    "fan_in_fan_out": (True,),
    "lora_bias": (True,),
    "use_qalora": (True,),
    "megatron_config": ({"a": 1},),
    "alora_invocation_tokens": ([1, 2],),
    "layer_replication": ([[0, 2], [1, 3]],),
    "peft_type": ("IA3", None),
    "an_option_of_later": (True,),
}


@pytest.mark.parametrize("field", NOT_UNDERSTOOD)
def test_what_a_config_says_and_is_not_understood_is_refused_by_name(tmp_path, capsys, field):
    separate_adapter(tmp_path / "a")
    config = saved(tmp_path / "a")[1]
    for value in NOT_UNDERSTOOD[field]:
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {field: value}))
        assert main(["convert", "adapter", str(tmp_path / "a"), str(tmp_path / "b")]) == 2, value
        (error,) = capsys.readouterr().err.splitlines()
        assert len(error) < 800
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_adapter_with_another_number_of_experts_than_its_model_is_refused(tmp_path, capsys):
    small_model().config.save_pretrained(tmp_path / "model")
    stacked_adapter(tmp_path / "a", r=4)
    config = saved(tmp_path / "a")[1] | {"base_model_name_or_path": str(tmp_path / "model")}
    assert set(config["rank_pattern"].values()) == {2}
    for rank, status in ((2, 0), (1, 2), (4, 2)):
        config["rank_pattern"] = dict.fromkeys(config["rank_pattern"], rank)
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
        assert main(["convert", "adapter", str(tmp_path / "a"), str(tmp_path / f"b{rank}")]) == status
    assert "expected 4 experts" in capsys.readouterr().err


def test_a_conversion_that_fails_while_it_writes_leaves_nothing(tmp_path, monkeypatch):
    separate_adapter(tmp_path / "a")
    monkeypatch.setattr("deepseek_latent.conversion.adapter.json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["convert", "adapter", str(tmp_path / "a"), str(tmp_path / "b")])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@torch.no_grad()
def test_a_model_is_as_before_after_it_refused_an_adapter(tmp_path):
    separate_adapter(tmp_path / "old", init_lora_weights=False)
    model, ids = tiny_model(), random_ids(1, 8)
    expected = model(ids).logits
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        PeftModel.from_pretrained(model, tmp_path / "old")
    assert torch.equal(model.eval()(ids).logits, expected)
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        model.load_adapter(str(tmp_path / "old"))
    assert torch.equal(model.eval()(ids).logits, expected)
    model = tiny_model()
    get_peft_model(tiny_model(), lora_config(model, routed_experts=True)).save_pretrained(tmp_path / "stacked")
    adapted = PeftModel.from_pretrained(model, tmp_path / "stacked").eval()
    expected = adapted(ids).logits
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        adapted.load_adapter(tmp_path / "old", "second")
    assert {*adapted.peft_config} == {"default"}
    assert torch.equal(adapted.eval()(ids).logits, expected)


@torch.no_grad()
def test_an_adapter_that_was_there_stays_after_a_load_under_its_name_fails(tmp_path):
    separate_adapter(tmp_path / "old")
    model, ids = tiny_model(), random_ids(1, 8)
    config = lora_config(model, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    expected = adapted(ids).logits
    for names in (["default"], ["default", "second"]):
        for name in names:
            with pytest.raises(ValueError, match="mistyped"):
                adapted.load_adapter(str(tmp_path / "a" / "mistyped" / "path"), name)
        assert [*adapted.peft_config] == names
        assert torch.equal(adapted(ids).logits, expected)
        if names == ["default"]:
            adapted.add_adapter("second", config)
    # some of its weights may be replaced then, and it is still there
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        adapted.load_adapter(tmp_path / "old", "default")
    assert [*adapted.peft_config] == ["default", "second"]
    config = LoraConfig(r=3, target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"])
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "plain")
    model = tiny_model()
    model.load_adapter(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        model.load_adapter(str(tmp_path / "old"), "default", hotswap=True)
    assert [*model.peft_config] == ["default"]


@torch.no_grad()
def test_an_adapter_that_from_pretrained_refuses_leaves_no_layers(tmp_path):
    separate_adapter(tmp_path / "old")
    model, ids = tiny_model(), random_ids(1, 8)
    names = [*model.state_dict()]
    for _ in range(2):
        with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
            PeftModel.from_pretrained(model, tmp_path / "old", adapter_name="old")
        assert [*model.state_dict()] == names
    adapted = get_peft_model(model, lora_config(model, init_lora_weights=False)).eval()
    names, expected = [*model.state_dict()], adapted(ids).logits
    refuses = pytest.raises(ValueError, match="deepseek-latent convert adapter")
    with pytest.warns(UserWarning, match="multiple adapters"), refuses:
        PeftModel.from_pretrained(model, tmp_path / "old", "old")
    assert [*adapted.peft_config] == ["default"]
    assert [*model.state_dict()] == names
    assert torch.equal(adapted.eval()(ids).logits, expected)


def test_an_adapter_whose_file_is_cut_off_leaves_no_layers(tmp_path):
    model = tiny_model()
    names = [*model.state_dict()]
    get_peft_model(tiny_model(), lora_config(model)).save_pretrained(tmp_path)
    os.truncate(tmp_path / "adapter_model.safetensors", 100)
    with pytest.raises((SafetensorError, OSError)):
        PeftModel.from_pretrained(model, tmp_path)
    assert [*model.state_dict()] == names


TARGETS = {
    "as converted": None,
    "one expert": ["experts.11.up_proj"],
    "a pattern": r".*\.experts\.\d+\.(gate|up)_proj",
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_an_adapter_on_nothing_but_single_experts_is_refused_with_the_command(tmp_path, targets):
    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "use_rslora": True, "r": 8}
    # a model that compresses its queries has no q_proj
    config = LoraConfig(target_modules=["q_proj"], rank_pattern={"1.mlp.experts.down_proj": 4}, **options)
    with pytest.warns(RuntimeWarning, match="no module was matched"):
        adapted = get_peft_model(tiny_model(), config)
    adapted.save_pretrained(tmp_path / "stacked")
    assert main(["convert", "adapter", str(tmp_path / "stacked"), str(tmp_path / "single")]) == 0
    if targets is not None:
        file = tmp_path / "single" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": targets}))
    model = tiny_model()
    names = [*model.state_dict()]
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        PeftModel.from_pretrained(model, tmp_path / "single")
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        model.load_adapter(str(tmp_path / "single"))
    assert [*model.state_dict()] == names
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        adapted.load_adapter(tmp_path / "single", "second")
    assert [*adapted.peft_config] == ["default"]
    # other targets that a model lacks are left to peft
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(model, LoraConfig(target_modules=["query"]))
