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
        num_hidden_layers=27,
        kv_lora_rank=512,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        rope_scaling=YARN,
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
        ({"rope_scaling": YARN | {"attention_factor": 1.0}}, "mlx-lm", "rope_scaling, with an attention_factor"),
        ({"rope_scaling": YARN | {"truncate": False}}, "mlx-lm", "rope_scaling, with truncate false"),
        ({"rope_scaling": None}, "mlx-lm", "rope_scaling null, but it opens no file without one"),
        ({"norm_topk_prob": True}, "transformers", "norm_topk_prob true"),
        ({"norm_topk_prob": True}, "mlx-lm", "norm_topk_prob true"),
        ({"norm_topk_prob": True}, "vLLM", "norm_topk_prob true, but with groups of experts"),
        ({"n_shared_experts": None}, "transformers, vLLM, llama.cpp", "n_shared_experts null"),
        ({"n_routed_experts": None}, "vLLM", "n_routed_experts null"),
        ({"rms_norm_eps": 1e-5}, "vLLM, SGLang, llama.cpp", "rms_norm_eps 1e-05"),
        ({"tie_word_embeddings": True}, "vLLM, mlx-lm", "tie_word_embeddings true"),
        ({"hidden_act": "gelu"}, "vLLM, SGLang, llama.cpp", 'hidden_act "gelu"'),
        ({"hidden_act": "gelu"}, "mlx-lm", 'hidden_act "gelu", which it ignores'),
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
    [("n_group", None, "vLLM, SGLang"), ("scoring_func", ..., "SGLang"), ("auto_map", {}, "SGLang")],
)
def test_fields_are_checked_as_config_json_writes_them(field, value, programs):
    config = DeepseekV2Config(**V2)
    written = config.to_dict() | {field: value}
    if value is ...:
        del written[field]
    before, after = (find_incompatibilities(config, x, ()) for x in (config.to_dict(), written))
    (new,) = set(after) - set(before)
    assert new.startswith(f"{programs}: {field}")


@pytest.mark.parametrize(("rope_type", "program"), [("linear", "vLLM"), ("longrope", "mlx-lm")])
def test_a_program_that_takes_one_rope_for_another_is_named(rope_type, program):
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "original_max_position_embeddings": 64}
    scaling = {"type": rope_type, "factor": 2.0} | (factors if rope_type == "longrope" else {})
    config = DeepseekV2Config(**V2 | {"rope_scaling": scaling})
    (line,) = [x for x in find_incompatibilities(config, config.to_dict(), ()) if f"of type {rope_type}" in x]
    assert line.endswith(f"({program} does not refuse it)")


def test_vllm_is_not_said_to_differ_where_gates_are_normalized_without_groups():
    config = DeepseekV2Config(**V2 | {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "topk_method": "greedy"})
    found = find_incompatibilities(config, config.to_dict(), ())
    assert not any(line.startswith("vLLM: norm_topk_prob") for line in found)


def test_verify_reports_incompatibilities_and_passes(tmp_path, capsys):
    tiny_model(torch.bfloat16).save_pretrained(tmp_path / "source")
    assert main(["verify", str(tmp_path / "source"), "--dtype", "float32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any("TRITON_MLA" in line for line in report["incompatible_with_other_programs"])
