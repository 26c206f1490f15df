"""Experts that accelerate's own loading leaves without weights raise an error and are never multiplied."""

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model
from safetensors.torch import load_file

from deepseek_latent import DeepseekV2ForCausalLM
from tests.support import random_ids, tiny_model

IDS = random_ids(2, 9)
MESSAGE = r"expected the weights of all routed experts, and none were loaded.*from_pretrained\(folder, device_map=...\)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


def empty() -> DeepseekV2ForCausalLM:
    with init_empty_weights():
        return DeepseekV2ForCausalLM(tiny_model().config).eval()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_dispatching_without_experts_is_refused(folder, device_map):
    with pytest.raises(ValueError, match=MESSAGE):
        load_checkpoint_and_dispatch(empty(), folder, device_map=device_map)


def test_calling_experts_that_are_missing_on_disk_is_refused(folder, tmp_path):
    places = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = load_checkpoint_and_dispatch(empty(), folder, device_map=places, offload_folder=tmp_path)
    with torch.no_grad(), pytest.raises(ValueError, match=MESSAGE):
        model(IDS)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_calling_experts_that_were_never_loaded_is_refused(folder, implementation):
    model = empty()
    load_checkpoint_in_model(model, folder, device_map={"": "cpu"})
    model.set_experts_implementation(implementation)
    with torch.no_grad(), pytest.raises(ValueError, match=MESSAGE):
        model(IDS)


@torch.no_grad()
def test_the_state_dict_of_a_file_fills_an_empty_model(folder):
    model = empty()
    model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)


@torch.no_grad()
def test_shards_of_a_checkpoint_fill_an_empty_model_one_after_the_other(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    model, files = empty(), sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        model.load_state_dict(load_file(file), assign=True, strict=False)
    assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)


@torch.no_grad()
def test_shapes_can_be_computed_without_weights():
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(tiny_model().config).eval()
    # on the meta device, torch has no grouped products in float32
    model.set_experts_implementation("batched_mm")
    hidden = torch.empty(2, 9, 72, device="meta")
    assert model.model.layers[1].mlp(hidden).shape == hidden.shape
