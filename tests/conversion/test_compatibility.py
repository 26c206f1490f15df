"""What is said of other programs names the program and the field, and is what they did when they were run."""

import json

import pytest
import torch

from benchmarks.clients.table import RESULTS, format_tables, verdict
from benchmarks.clients.variants import FIELDS, PLAIN, WRITTEN
from deepseek_latent import DeepseekV2Config
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.compatibility import PROGRAMS, Outcome, outcomes_in_other_programs
from tests.support import LITE, V2, YARN, tiny_model

ONE_GROUP = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
LINEAR = {"type": "linear", "factor": 2.0}
RUN = {"transformers": "transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp", "mlx-lm": "mlx-lm"}
RUNS = json.loads(RESULTS.read_text())


def test_the_published_checkpoint_is_compatible_with_all_programs():
    lite = DeepseekV2Config(
        num_hidden_layers=27,
        kv_lora_rank=512,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        rope_scaling=YARN,
    )
    found = outcomes_in_other_programs(lite, lite.to_dict(), {"lm_head.weight"})
    assert found == dict.fromkeys(PROGRAMS, Outcome())


@pytest.mark.parametrize(
    ("options", "programs", "field"),
    [
        ({"attention_bias": True}, "vLLM", "attention_bias true, but it leaves out"),
        ({"attention_bias": True}, "SGLang, llama.cpp", "attention_bias true"),
        ({"rope_scaling": LINEAR}, "llama.cpp", "rope_scaling, of type linear"),
        ({"rope_scaling": LINEAR}, "mlx-lm", "rope_scaling, of type linear"),
        ({"rope_scaling": YARN | {"attention_factor": 1.0}}, "vLLM", "rope_scaling, with an attention_factor"),
        (
            {"rope_scaling": YARN | {"attention_factor": 1.5}},
            "llama.cpp, mlx-lm",
            "rope_scaling, with an attention_fac",
        ),
        ({"rope_scaling": YARN | {"truncate": False}}, "vLLM, llama.cpp, mlx-lm", "rope_scaling, with truncate false"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "llama.cpp", "rope_scaling, with an mscale"),
        ({"rope_scaling": None}, "mlx-lm", "rope_scaling null, but it opens no file without one"),
        ({"norm_topk_prob": True}, "transformers, mlx-lm", "norm_topk_prob true"),
        ({"norm_topk_prob": True}, "vLLM, llama.cpp", "norm_topk_prob true, but it also applies routed_scaling_factor"),
        ({"n_shared_experts": None}, "transformers, vLLM, llama.cpp", "n_shared_experts null"),
        ({"n_routed_experts": None}, "transformers, vLLM, llama.cpp", "n_routed_experts null"),
        ({"moe_layer_freq": 2}, "transformers", "moe_layer_freq 2"),
        ({"rms_norm_eps": 1e-5}, "vLLM, SGLang, llama.cpp", "rms_norm_eps 1e-05"),
        ({"tie_word_embeddings": True}, "mlx-lm", "tie_word_embeddings true"),
        ({"tie_word_embeddings": True}, "vLLM", "tie_word_embeddings true, but without lm_head.weight"),
        ({"n_routed_experts": 1, "first_k_dense_replace": 3} | ONE_GROUP, "llama.cpp", "n_routed_experts 1"),
        ({"hidden_act": "gelu"}, "vLLM, SGLang", 'hidden_act "gelu"'),
        ({"hidden_act": "gelu"}, "llama.cpp, mlx-lm", 'hidden_act "gelu", which it ignores'),
        (LITE, "llama.cpp", "q_lora_rank null"),
        ({}, "llama.cpp", "topk_method"),
        ({"topk_method": "greedy"}, "vLLM, SGLang, llama.cpp", "n_group 4, but it routes by groups"),
        ({}, "vLLM", "kv_lora_rank 40"),
    ],
    ids=str,
)
def test_every_incompatibility_names_programs_and_field(options, programs, field):
    config = DeepseekV2Config(**(V2 | options))
    found = outcomes_in_other_programs(config, config.to_dict(), ())
    for program in programs.split(", "):
        assert any(line.partition(": ")[2].startswith(field) for line in found[program].lines()), found


@pytest.mark.parametrize("name", [*FIELDS, *WRITTEN])
def test_the_list_says_of_every_program_what_it_did_in_its_run(name):
    source, changed, removed = WRITTEN.get(name, (name, {}, []))
    config = DeepseekV2Config(**PLAIN | FIELDS[source])
    written = {field: value for field, value in (config.to_dict() | changed).items() if field not in removed}
    tensors = () if config.tie_word_embeddings else ("lm_head.weight",)
    found = outcomes_in_other_programs(config, written, tensors)
    # one refusal is enough, whatever else would differ
    said = {
        program: "refused" if outcome.refusals else "differs" if outcome.differences else "same"
        for program, outcome in found.items()
    }
    assert {title: said[title] for title in RUN.values()} == {
        title: verdict(RUNS[program]["results"][name]) for program, title in RUN.items()
    }


def test_the_page_about_other_programs_has_the_results_of_the_runs():
    page = RESULTS.parents[2] / "docs" / "interop.md"
    assert format_tables(RUNS) in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("field", "value", "programs"),
    [("n_group", None, "vLLM, SGLang"), ("scoring_func", ..., "SGLang"), ("auto_map", {}, "SGLang")],
)
def test_fields_are_checked_as_config_json_writes_them(field, value, programs):
    config = DeepseekV2Config(**V2)
    written = config.to_dict() | {field: value}
    if value is ...:
        del written[field]
    before, after = (outcomes_in_other_programs(config, x, ()) for x in (config.to_dict(), written))
    assert [program for program in PROGRAMS if after[program] != before[program]] == programs.split(", ")
    for program in programs.split(", "):
        (new,) = set(after[program].refusals) - set(before[program].refusals)
        assert new.startswith(field)


def test_vllm_is_not_said_to_differ_where_gates_are_normalized_and_not_scaled():
    config = DeepseekV2Config(**V2 | {"norm_topk_prob": True, "routed_scaling_factor": 1.0})
    found = outcomes_in_other_programs(config, config.to_dict(), ())
    assert not any("norm_topk_prob" in line for line in found["vLLM"].lines())


def test_verify_reports_incompatibilities_and_passes(tmp_path, capsys):
    tiny_model(torch.bfloat16).save_pretrained(tmp_path / "source")
    assert main(["verify", str(tmp_path / "source"), "--dtype", "float32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any("TRITON_MLA" in line for line in report["other_programs"]["vLLM"]["refusals"])


def test_verify_prints_a_row_for_each_program(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert [f"│ in {program} " in output for program in PROGRAMS] == [True] * len(PROGRAMS)
    assert output.count("works: no difference is known") == 3  # transformers, SGLang and mlx-lm
