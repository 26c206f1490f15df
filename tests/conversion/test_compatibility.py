"""Incompatibilities with other programs name the program and the field."""

import json

import pytest
import torch

from deepseek_latent import DeepseekV2Config
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.compatibility import find_incompatibilities
from tests.support import LITE, V2, YARN, tiny_model


def test_the_published_checkpoint_is_compatible_with_all_programs():
    lite = DeepseekV2Config(
        num_hidden_layers=27, kv_lora_rank=512, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6
    )
    assert find_incompatibilities(lite, lite.to_dict(), {"lm_head.weight"}) == []


@pytest.mark.parametrize(
    ("options", "programs", "field"),
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
def test_every_incompatibility_names_programs_and_field(options, programs, field):
    config = DeepseekV2Config(**(V2 | options))
    found = find_incompatibilities(config, config.to_dict(), ())
    assert any(line.startswith(f"{programs}: {field}") for line in found), found


@pytest.mark.parametrize(
    ("field", "value", "programs"),
    [("n_group", None, "vLLM, SGLang"), ("scoring_func", ..., "SGLang"), ("auto_map", {}, "vLLM, SGLang")],
)
def test_fields_are_checked_as_config_json_writes_them(field, value, programs):
    config = DeepseekV2Config(**V2)
    written = config.to_dict() | {field: value}
    if value is ...:
        del written[field]
    before, after = (find_incompatibilities(config, x, ()) for x in (config.to_dict(), written))
    (new,) = set(after) - set(before)
    assert new.startswith(f"{programs}: {field}")


def test_verify_reports_incompatibilities_and_passes(tmp_path, capsys):
    tiny_model(torch.bfloat16).save_pretrained(tmp_path / "source")
    assert main(["verify", str(tmp_path / "source"), "--dtype", "float32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any("TRITON_MLA" in line for line in report["incompatible_with_other_programs"])
