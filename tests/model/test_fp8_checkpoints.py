"""Checkpoints in fp8 with a scale per block, as DeepSeek publishes them, load with their dequantized values."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config
from transformers.core_model_loading import WeightConverter

from deepseek_latent import DeepseekV2ForCausalLM
from tests.support import random_ids, tiny_model

BLOCK = 16
# all widths are multiples of the block
WIDTHS = {
    "hidden_size": 64,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
DEQUANTIZED = {"quantization_config": FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK))}


def quantized(weight):
    """Codes, scales, and the weight that they decode to."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.reshape(weight.shape), scales, (codes.float() * scales[:, None, :, None]).reshape(weight.shape)


@pytest.fixture
def folders(tmp_path):
    """A folder in fp8, and one with the dequantized weights."""
    folders = [tmp_path / "fp8", tmp_path / "plain"]
    for folder in folders:
        tiny_model(**WIDTHS).save_pretrained(folder)
    in_fp8, plain = {}, {}
    for name, weight in load_file(folders[0] / "model.safetensors").items():
        in_fp8[name] = plain[name] = weight
        if re.search(r"_(proj|mqa)\.weight$", name):
            in_fp8[name], in_fp8[f"{name}_scale_inv"], plain[name] = quantized(weight)
    for folder, tensors in zip(folders, (in_fp8, plain)):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folders[0] / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (folders[0] / "config.json").write_text(json.dumps(config))
    return folders


# without a GPU, transformers dequantizes without being asked
@pytest.mark.parametrize("options", [DEQUANTIZED, {}], ids=["requested", "automatic"])
def test_weights_in_fp8_load_with_their_dequantized_values(folders, options):
    if not options and torch.cuda.is_available():
        pytest.skip("with a GPU, transformers keeps fp8")
    model, expected = (
        DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
        for folder, more in zip(folders, (options, {}))
    )
    for (name, weight), exact in zip(model.named_parameters(), expected.parameters()):
        assert torch.equal(weight, exact), name
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("lost", [EXPERT, f"{EXPERT}_scale_inv"])
def test_a_missing_weight_or_scale_of_one_expert_is_named(folders, lost):
    file = folders[0] / "model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    # before 5.23, transformers replaces our converters by its own, which only count
    names_all = "copy" in vars(WeightConverter)
    sentence = rf"{re.escape(lost)} is missing\." if names_all else r"_proj\.weight cannot be stacked .*count mismatch"
    with pytest.raises(ValueError, match=sentence):
        DeepseekV2ForCausalLM.from_pretrained(folders[0], dtype=torch.float32, **DEQUANTIZED)


def test_routers_in_float32_keep_their_dtype_beside_dequantized_weights(folders):
    model = DeepseekV2ForCausalLM.from_pretrained(folders[0], dtype=torch.bfloat16, **DEQUANTIZED)
    routers = {name: x for name, x in model.named_parameters() if name.endswith("mlp.gate.weight")}
    assert {x.dtype for x in routers.values()} == {torch.float32}
    stored = load_file(folders[0] / "model.safetensors")
    assert all(torch.equal(x, stored[name]) for name, x in routers.items())
    assert model.lm_head.weight.dtype == torch.bfloat16
