"""Checkpoints in the layout of DeepSeek's inference code are exported and imported without a change."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_latent import DeepseekV2Config
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.deepseek_layout import ImportDeepseek
from tests.support import official_state_dict, tiny_model

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


DIVISIBLE = {
    "vocab_size": 96,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "rope_scaling": YARN,
    "max_position_embeddings": 128,
}


def save_model(folder: Path, dtype=torch.bfloat16, **options):
    model = tiny_model(dtype, **(DIVISIBLE | options))
    model.save_pretrained(folder)
    return model


def export(source: Path, out: Path, *options: str) -> Path:
    assert main(["convert", "export-deepseek", str(source), str(out), *options]) == 0
    return out


# all names of modules, as DeepSeek-V3's inference/convert.py maps them
DEEPSEEK_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
    "layers.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    "layers.1.attn.wq_a.weight": "model.layers.1.self_attn.q_a_proj.weight",
    "layers.1.attn.q_norm.weight": "model.layers.1.self_attn.q_a_layernorm.weight",
    "layers.1.attn.wq_b.weight": "model.layers.1.self_attn.q_b_proj.weight",
    "layers.1.attn.wkv_a.weight": "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    "layers.1.attn.kv_norm.weight": "model.layers.1.self_attn.kv_a_layernorm.weight",
    "layers.1.attn.wkv_b.weight": "model.layers.1.self_attn.kv_b_proj.weight",
    "layers.1.attn.wo.weight": "model.layers.1.self_attn.o_proj.weight",
    "layers.0.ffn.w1.weight": "model.layers.0.mlp.gate_proj.weight",
    "layers.0.ffn.w2.weight": "model.layers.0.mlp.down_proj.weight",
    "layers.0.ffn.w3.weight": "model.layers.0.mlp.up_proj.weight",
    "layers.1.ffn.gate.weight": "model.layers.1.mlp.gate.weight",
    "layers.1.ffn.experts.3.w1.weight": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "layers.1.ffn.shared_experts.w2.weight": "model.layers.1.mlp.shared_experts.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def test_names_are_those_of_deepseeks_inference_code(tmp_path):
    ours = official_state_dict(save_model(tmp_path / "source"))
    theirs = load_file(export(tmp_path / "source", tmp_path / "out") / "model0-mp1.safetensors")
    assert len(theirs) == len(ours)
    for name, own in DEEPSEEK_NAMES.items():
        assert torch.equal(theirs[name], ours[own]), name


def test_two_ranks_split_the_tensors_that_deepseeks_code_splits(tmp_path):
    ours = official_state_dict(save_model(tmp_path / "source"))
    out = export(tmp_path / "source", tmp_path / "out", "--model-parallel", "2")
    ranks = [load_file(out / f"model{i}-mp2.safetensors") for i in range(2)]
    rows, columns = ("wq_b", "q_b_proj"), ("wo", "o_proj")
    for (name, own), axis in ((rows, 0), (columns, 1)):
        parts = [rank[f"layers.2.attn.{name}.weight"] for rank in ranks]
        assert torch.equal(torch.cat(parts, dim=axis), ours[f"model.layers.2.self_attn.{own}.weight"])
    for i in range(12):
        held = [f"layers.1.ffn.experts.{i}.w1.weight" in rank for rank in ranks]
        assert held == [i < 6, i >= 6]
    assert torch.equal(ranks[0]["layers.1.attn.wkv_a.weight"], ranks[1]["layers.1.attn.wkv_a.weight"])


@pytest.mark.parametrize(
    "variant",
    [{}, {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}, {"rope_scaling": None}],
    ids=["V2", "Lite", "plain"],
)
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_exporting_and_importing_gives_the_same_checkpoint(tmp_path, variant, ranks):
    model = save_model(tmp_path / "source", **variant)
    out = export(tmp_path / "source", tmp_path / "theirs", "--model-parallel", ranks)
    back = tmp_path / "back"
    assert main(["convert", "import-deepseek", str(out), str(back), "--max-shard-size", "100KB"]) == 0
    assert main(["verify", str(back), "--against", str(tmp_path / "source"), "--dtype", "float32"]) == 0
    made = {name: x for file in back.glob("*.safetensors") for name, x in load_file(file).items()}
    ours = official_state_dict(model)
    assert made.keys() == ours.keys()
    assert all(torch.equal(made[name], ours[name]) for name in ours)


def test_of_more_than_ten_ranks_each_has_its_own_part(tmp_path):
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 96, "moe_intermediate_size": 48}
    ours = official_state_dict(save_model(tmp_path / "source", **sizes))
    out = export(tmp_path / "source", tmp_path / "theirs", "--model-parallel", "12")
    back = ImportDeepseek(out, out / "config.json")
    made = {piece.name: piece.make() for piece in back.pieces()}
    assert made.keys() == ours.keys()
    assert all(torch.equal(made[name], ours[name]) for name in ours)


def test_token_ids_come_from_the_generation_config_or_are_none(tmp_path):
    model = save_model(tmp_path / "source")
    out = export(tmp_path / "source", tmp_path / "theirs")
    assert not (out / "README.md").exists()
    assert main(["convert", "import-deepseek", str(out), str(tmp_path / "back")]) == 0
    config = DeepseekV2Config.from_pretrained(tmp_path / "back")
    assert (config.bos_token_id, config.eos_token_id) == (model.config.bos_token_id, model.config.eos_token_id)
    (out / "generation_config.json").unlink()
    assert main(["convert", "import-deepseek", str(out), str(tmp_path / "bare")]) == 0
    config = DeepseekV2Config.from_pretrained(tmp_path / "bare")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_the_published_config_of_lite_is_read_as_lite(tmp_path):
    """The fields of DeepSeek-V3's inference/configs/config_16B.json. Absent fields have the defaults of its code."""
    from deepseek_latent.conversion.deepseek_config import config_from_deepseek

    theirs = {"vocab_size": 102400, "dim": 2048, "inter_dim": 10944, "moe_inter_dim": 1408, "n_layers": 27}
    theirs |= {"n_dense_layers": 1, "n_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2}
    theirs |= {"n_activated_experts": 6, "route_scale": 1.0, "q_lora_rank": 0, "kv_lora_rank": 512}
    theirs |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "mscale": 0.707}
    config = config_from_deepseek(theirs, tmp_path / "config_16B.json")
    assert config.q_lora_rank is None
    assert config.max_position_embeddings == 163840
    assert (config.topk_method, config.n_group, config.topk_group) == ("greedy", 1, 1)
    published = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
    published |= {"original_max_position_embeddings": 4096, "rope_type": "yarn", "rope_theta": 10000.0}
    assert {name: config.rope_parameters[name] for name in published} == published


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_bias": True}, "attention_bias True"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
        ({"norm_topk_prob": True}, "norm_topk_prob True"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "mscale '1.0 with mscale_all_dim 0.707'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate 'false'"),
        # their code applies YaRN only to a greater length than the original one
        ({"max_position_embeddings": 32}, "max_position_embeddings 32"),
    ],
    ids=str,
)
def test_a_model_that_deepseeks_code_would_compute_differently_is_not_exported(tmp_path, capsys, options, words):
    save_model(tmp_path / "source", **options)
    assert main(["convert", "export-deepseek", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_tied_embeddings_are_written_twice(tmp_path, ranks):
    model = save_model(tmp_path / "source", tie_word_embeddings=True)
    out = export(tmp_path / "source", tmp_path / "out", "--model-parallel", ranks)
    heads = [load_file(file)["head.weight"] for file in sorted(out.glob("*.safetensors"))]
    assert torch.equal(torch.cat(heads), model.model.embed_tokens.weight)


def test_a_dense_model_is_split_whatever_its_config_says_of_experts(tmp_path):
    save_model(tmp_path / "source", n_routed_experts=None, moe_intermediate_size=33)
    assert len(list(export(tmp_path / "source", tmp_path / "out", "--model-parallel", "2").glob("*.safetensors"))) == 2


def test_a_number_of_ranks_that_does_not_divide_the_model_is_refused(tmp_path, capsys):
    save_model(tmp_path / "source")
    for ranks in ("0", "5"):
        out = str(tmp_path / "out")
        assert main(["convert", "export-deepseek", str(tmp_path / "source"), out, "--model-parallel", ranks]) == 2
        assert "--model-parallel must be a divisor of" in capsys.readouterr().err


def _without_a_rank(out: Path) -> None:
    (out / "model0-mp2.safetensors").unlink()


def _without_a_tensor(out: Path) -> None:
    tensors = load_file(out / "model1-mp2.safetensors")
    save_file({name: x for name, x in tensors.items() if "wq_b" not in name}, out / "model1-mp2.safetensors")


def _with_scales(out: Path) -> None:
    tensors = load_file(out / "model1-mp2.safetensors")
    save_file(tensors | {"layers.0.attn.wo.scale": torch.ones(2)}, out / "model1-mp2.safetensors")


def _with_another_width(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dim": 40}))


def _with_a_transformers_config(out: Path) -> None:
    tiny_model().config.save_pretrained(out)


def _cut_off(out: Path) -> None:
    (out / "model1-mp2.safetensors").write_bytes((out / "model1-mp2.safetensors").read_bytes()[:-100])


def _with_nan(out: Path) -> None:
    tensors = load_file(out / "model1-mp2.safetensors")
    tensors["layers.0.attn.wo.weight"][0, 0] = torch.nan
    save_file(tensors, out / "model1-mp2.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without_a_rank, "expected one file model<rank>-mp<ranks>.safetensors for each rank"),
        (_without_a_tensor, "layers.0.attn.wq_b.weight"),
        (_with_scales, "fp8 weights have scales"),
        (_with_another_width, "expected [96, 40]"),
        (_with_a_transformers_config, "expected dim"),
        (_cut_off, "cut off"),
        (_with_nan, "NaN or infinity"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, capsys, spoil, words):
    save_model(tmp_path / "source")
    out = export(tmp_path / "source", tmp_path / "theirs", "--model-parallel", "2")
    spoil(out)
    assert main(["convert", "import-deepseek", str(out), str(tmp_path / "back")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("router", [None, torch.float32], ids=["router too", "router in float32"])
def test_imported_files_keep_their_dtype_and_pass_inspect(tmp_path, dtype, router, capsys):
    """DeepSeek's config says bf16, whatever the files hold."""
    model = tiny_model(dtype, **DIVISIBLE)
    for name, weight in model.named_parameters():
        if router is not None and name.endswith("mlp.gate.weight"):
            weight.data = weight.data.to(router)
    model.save_pretrained(tmp_path / "source")
    out = export(tmp_path / "source", tmp_path / "theirs")
    assert main(["convert", "import-deepseek", str(out), str(tmp_path / "back")]) == 0
    assert main(["inspect", str(tmp_path / "back")]) == 0, capsys.readouterr().out
    assert DeepseekV2Config.from_pretrained(tmp_path / "back").dtype == dtype


def test_imported_files_in_two_dtypes_are_refused(tmp_path, capsys):
    save_model(tmp_path / "source")
    out = export(tmp_path / "source", tmp_path / "theirs")
    tensors = load_file(out / "model0-mp1.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"].float()
    save_file(tensors, out / "model0-mp1.safetensors")
    assert main(["convert", "import-deepseek", str(out), str(tmp_path / "back")]) == 2
    assert "F32 (norm.weight)" in capsys.readouterr().err
