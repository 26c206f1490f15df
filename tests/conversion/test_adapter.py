"""Adapters with separate experts, as transformers 4 trained them, become adapters of stacked experts, and back."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_latent import lora_config
from deepseek_latent.commands.__main__ import main
from tests.support import random_ids, relative_error, tiny_model

PREFIX = "base_model.model."
NAMES = {"gate": (32, 72), "up": (32, 72), "down": (72, 32)}  # out, in


def separate_adapter(folder, names=("gate", "up", "down"), r: int = 3, **config) -> dict[str, Tensor]:
    """Saves an adapter of transformers 4 on attention, all MLPs and every expert, and returns its tensors."""
    modules = ["o_proj", *(f"{name}_proj" for name in names)]
    model = get_peft_model(
        tiny_model(), LoraConfig(r=r, lora_alpha=7, target_modules=modules, init_lora_weights=False, **config)
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


def test_loading_separate_experts_names_the_command_that_converts_them(tmp_path):
    separate_adapter(tmp_path / "old")
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "old")


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
