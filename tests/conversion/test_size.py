"""Sizes of models are those of the published models and of the paper's tables."""

import json

import pytest

from deepseek_latent import (
    DeepseekV2Config,
)
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.checkpoint import checkpoint_tensors
from deepseek_latent.conversion.size import cached_elements_per_token, idle_parameters, parameters_by_part, routed_size
from tests.commands.terminal import row
from tests.support import V2, tiny_model

# config.json of DeepSeek-V2 and V2-Lite as published, without fields for generation and training
PUBLISHED = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "rope_theta": 10000,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


PUBLISHED_V2 = PUBLISHED | {
    "hidden_size": 5120,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
}


PUBLISHED_LITE = PUBLISHED | {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}


def inspect(capsys, *arguments) -> tuple[int, str]:
    status = main(["inspect", *(str(argument) for argument in arguments)])
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    ("published", "total", "active", "num_tensors", "cached"),
    [
        pytest.param(PUBLISHED_V2, 235_741_434_880, 21_375_800_320, 29_102, 34_560, id="V2"),
        pytest.param(PUBLISHED_LITE, 15_706_484_224, 2_661_150_208, 5_291, 15_552, id="Lite"),
    ],
)
def test_inspect_gives_the_published_sizes(tmp_path, capsys, published, total, active, num_tensors, cached):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(published))
    for argument in (tmp_path, file):
        status, out = inspect(capsys, argument)
        assert status == 0
        assert f"{num_tensors:,} tensors" in out
        assert row(out, "total") == [f"{total:,}"]
        assert row(out, "active per token") == [f"{active:,}"]
        assert row(out, "compressed") == [f"{cached:,}", f"{2 * cached:,}", "1.00"]


def test_cache_sizes_are_those_of_the_papers_table():
    elements = cached_elements_per_token(DeepseekV2Config(**PUBLISHED_V2))
    # n_h = 128, d_h = 128, d_h^R = 64, d_c = 512, l = 60
    assert elements == {
        "MLA, compressed (this package)": (512 + 64) * 60,
        "MLA, expanded to keys and values": 128 * (128 + 64 + 128) * 60,
        "MHA": 2 * 128 * 128 * 60,
        "GQA, 8 groups": 2 * 8 * 128 * 60,
        "MQA": 2 * 128 * 60,
    }


def test_cache_sizes_of_a_converted_model_are_those_of_its_source():
    # 9 query and 3 key heads of 64, as in SmolLM2-135M; the conversion pads content to 8
    converted = {"num_attention_heads": 9, "qk_nope_head_dim": 8, "qk_rope_head_dim": 192, "v_head_dim": 64}
    config = DeepseekV2Config(**converted, kv_lora_rank=196, num_hidden_layers=30, source_cached_width=2 * 3 * 64)
    elements = cached_elements_per_token(config)
    assert elements["MHA"] == 2 * 9 * 64 * 30
    assert elements["source, before the conversion"] == 2 * 3 * 64 * 30
    assert elements["MQA"] == 2 * 64 * 30


def test_parameters_by_part_are_those_of_the_model():
    model = tiny_model(attention_bias=True)
    parts = parameters_by_part(checkpoint_tensors(model.config))
    assert sum(parts.values()) == model.num_parameters()
    layer, dense = model.model.layers[1], model.model.layers[0]
    experts = sum(parameter.numel() for parameter in layer.mlp.experts.parameters())
    assert parts["routed experts"] == 2 * experts
    assert parts["shared experts"] == 2 * sum(p.numel() for p in layer.mlp.shared_experts.parameters())
    assert parts["router"] == 2 * layer.mlp.gate.weight.numel()
    assert parts["dense MLP"] == sum(p.numel() for p in dense.mlp.parameters())
    assert parts["embeddings"] == parts["lm_head"] == V2["vocab_size"] * V2["hidden_size"]
    # 3 of 12 experts are active
    assert idle_parameters(model.config) == 2 * experts * 9 // 12


def test_a_dense_model_has_no_idle_parameters():
    assert idle_parameters(DeepseekV2Config(**(V2 | {"n_routed_experts": None}))) == 0


def test_the_scaling_law_is_that_of_the_paper():
    """A dense model is worth itself; 128 experts make 5 M parameters worth about 55 M (section 5.1 of the paper)."""
    config = DeepseekV2Config(**V2)
    size = routed_size(config, checkpoint_tensors(config))
    assert size.expansion == 12 / 3
    assert size.base < size.effective < size.base * 4
    dense = DeepseekV2Config(**(V2 | {"n_routed_experts": None}))
    size = routed_size(dense, checkpoint_tensors(dense))
    assert size.expansion == 1
    assert size.effective == pytest.approx(size.base)
    wide = DeepseekV2Config(**(V2 | {"n_routed_experts": 128, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}))
    size = routed_size(wide, {"model.norm.weight": (5_000_000 + _idle(wide),)})
    assert size.base == 5_000_000
    assert size.effective == pytest.approx(55e6, rel=0.1)


def _idle(config) -> int:
    return 2 * 127 * 3 * config.hidden_size * config.moe_intermediate_size
