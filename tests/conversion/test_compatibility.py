"""Incompatibilities with other programs name the program and the field."""

import json
from pathlib import Path

import pytest
import torch

from deepseek_latent import DeepseekV2Config
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.compatibility import find_incompatibilities
from tests.support import LITE, V2, tiny_model

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


EVEN = {
    "vocab_size": 96,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "rope_scaling": YARN,
    "max_position_embeddings": 128,
}


def saved(folder: Path, dtype=torch.bfloat16, **options):
    model = tiny_model(dtype, **(EVEN | options))
    model.save_pretrained(folder)
    return model


def test_the_published_checkpoint_suits_everybody():
    lite = DeepseekV2Config(
        num_hidden_layers=27, kv_lora_rank=512, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6
    )
    assert find_incompatibilities(lite, lite.to_dict(), {"lm_head.weight"}) == []


@pytest.mark.parametrize(
    ("options", "clients", "field"),
    [
        ({"attention_bias": True}, "llama.cpp", "attention_bias true"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "vLLM, SGLang, llama.cpp, mlx-lm",
            "rope_scaling, of type",
        ),
        ({"rope_scaling": YARN | {"attention_factor": 1.0}}, "vLLM", "rope_scaling, with an attention_factor"),
        ({"norm_topk_prob": True}, "transformers", "norm_topk_prob true"),
        ({"n_shared_experts": None}, "transformers, llama.cpp", "n_shared_experts null"),
        ({"rms_norm_eps": 1e-5}, "vLLM, SGLang, llama.cpp", "rms_norm_eps 1e-05"),
        ({"tie_word_embeddings": True}, "vLLM", "tie_word_embeddings true"),
        ({"hidden_act": "gelu"}, "vLLM, SGLang, llama.cpp", 'hidden_act "gelu"'),
        (LITE, "llama.cpp", "q_lora_rank null"),
        ({}, "llama.cpp", "topk_method"),
        ({"topk_method": "greedy"}, "vLLM, SGLang, llama.cpp", "n_group 4, but they route by groups"),
        ({}, "vLLM", "kv_lora_rank 40"),
    ],
    ids=str,
)
def test_every_objection_names_client_and_field(options, clients, field):
    config = DeepseekV2Config(**(V2 | options))
    found = find_incompatibilities(config, config.to_dict(), ())
    assert any(line.startswith(f"{clients}: {field}") for line in found), found


@pytest.mark.parametrize(
    ("field", "value", "clients"),
    [("n_group", None, "vLLM, SGLang"), ("scoring_func", ..., "SGLang"), ("auto_map", {}, "vLLM, SGLang")],
)
def test_what_config_json_does_not_say_counts(field, value, clients):
    config = DeepseekV2Config(**V2)
    written = config.to_dict() | {field: value}
    if value is ...:
        del written[field]
    before, after = (find_incompatibilities(config, x, ()) for x in (config.to_dict(), written))
    (new,) = set(after) - set(before)
    assert new.startswith(f"{clients}: {field}")


def test_verify_says_them_and_does_not_fail_for_them(tmp_path, capsys):
    saved(tmp_path / "source")
    assert main(["verify", str(tmp_path / "source"), "--dtype", "float32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any("TRITON_MLA" in line for line in report["incompatible_with_other_programs"])
