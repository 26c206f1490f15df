"""Every way of loading gives the same model, with the right dtypes and rotary frequencies."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM
from tests.model.official_checkpoints import files_of, logits_of, official_tensors, write_checkpoint
from tests.support import V2, tiny_model


def test_dtype_of_the_file_is_kept(tmp_path):
    config = DeepseekV2Config(**V2)
    write_checkpoint(tmp_path, config, official_tensors(config, torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_requested_dtype_is_used(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.bfloat16)
    # except for routers, which are in float32 in the file
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith("mlp.gate.weight")]
    assert {parameter.dtype for parameter in others} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options",
    [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"use_safetensors": True}, {"low_cpu_mem_usage": True}],
    ids=lambda options: f"{options}",
)
def test_every_way_of_loading_gives_the_same_model(options, checkpoint):
    folder = checkpoint()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert torch.equal(logits_of(model), logits_of(plain))


def test_state_dict_in_memory_loads_like_a_file(official, checkpoint):
    model = DeepseekV2ForCausalLM.from_pretrained(None, config=DeepseekV2Config(**V2), state_dict=dict(official))
    assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(checkpoint())))


@pytest.mark.parametrize("rope_type", ["yarn", "default", "linear", "dynamic"])
def test_rotary_frequencies_are_computed_again_at_loading(rope_type, tmp_path):
    scaling = {"yarn": V2["rope_scaling"], "default": None}.get(rope_type, {"type": rope_type, "factor": 2.0})
    model = tiny_model(rope_scaling=scaling)
    model.save_pretrained(tmp_path)
    assert not any("inv_freq" in name for name in files_of(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    rotary, rotary_again = model.model.rotary_emb, again.model.rotary_emb
    assert torch.equal(rotary.inv_freq, rotary_again.inv_freq)
    assert torch.equal(rotary.original_inv_freq, rotary_again.original_inv_freq)
    assert rotary.attention_scaling == rotary_again.attention_scaling
    assert torch.equal(logits_of(again), logits_of(model))


def test_loading_under_a_meta_default_device_leaves_nothing_on_it(checkpoint):
    folder = checkpoint()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.device("meta"):
        skeleton = DeepseekV2ForCausalLM(AutoConfig.from_pretrained(folder))
    assert {tensor.device.type for tensor in (*skeleton.parameters(), *skeleton.buffers())} == {"meta"}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    assert torch.equal(logits_of(loaded), logits_of(plain))


def test_model_moved_from_meta_is_initialized_with_the_right_frequencies():
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**V2))
    model.to_empty(device="cpu")
    model.init_weights()
    rotary = tiny_model().model.rotary_emb
    assert torch.equal(model.model.rotary_emb.inv_freq, rotary.inv_freq)
    assert torch.equal(model.model.rotary_emb.original_inv_freq, rotary.original_inv_freq)


def test_half_precision_model_keeps_exact_frequencies_after_reload(tmp_path):
    model = tiny_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again.model.rotary_emb.inv_freq, tiny_model().model.rotary_emb.inv_freq)
