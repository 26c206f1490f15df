"""Other architectures than Llama become latent attention exactly, or are refused with the reason."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.calibration import Calibration
from deepseek_latent.conversion.compress import CompressedMla
from deepseek_latent.conversion.compression_report import build_model
from deepseek_latent.conversion.gqa_to_mla import GqaToMla
from deepseek_latent.conversion.llama_source import LlamaSource
from deepseek_latent.conversion.refine import refine
from deepseek_latent.conversion.source import Source
from deepseek_latent.conversion.text import WINDOW_LENGTH
from tests.conversion.architectures import LONG, PUBLISHED, SHORT, save_published
from tests.conversion.sources import convert_to_mla, save_source
from tests.support import NATIVE, random_ids, relative_error, seeded
from tests.test_examples import FOLDER as TOKENIZER


def logits_while_generating(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of each of 20 greedy tokens [20 b vocab], all but the first computed from cached tokens."""
    greedy = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(ids, max_new_tokens=20, output_logits=True, return_dict_in_generate=True, **greedy)
    return torch.stack(output.logits)


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_a_published_architecture_gives_the_same_logits_with_and_without_a_cache(tmp_path, name):
    source, ids = save_published(tmp_path / "source", name), random_ids(2, 50)
    expected, expected_while_generating = source(ids).logits, logits_while_generating(source, ids)
    out = convert_to_mla(tmp_path / "source", tmp_path / "out")
    for model_class in (AutoModelForCausalLM, NATIVE.DeepseekV2ForCausalLM):
        model = model_class.from_pretrained(out, trust_remote_code=False)
        assert relative_error(model(ids).logits, expected) < 1e-5, model_class
        assert relative_error(logits_while_generating(model, ids), expected_while_generating) < 1e-5, model_class


@pytest.mark.parametrize("name", ["Phi-4", "Phi-4-mini, both lists equal", "Gemma", "SmolLM3", "OLMo 1B", "Helium"])
@torch.no_grad()
def test_without_biases_the_error_is_that_of_the_norms_eps(tmp_path, name):
    source, ids = save_published(tmp_path, name, rms_norm_eps=1e-6), random_ids(2, 50)
    # OLMo's eps is 1e-5
    model = build_model(GqaToMla(Source(tmp_path), bias_free=True))
    assert relative_error(model(ids).logits, source(ids).logits) < 1e-3
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


@pytest.mark.parametrize(
    "name",
    ["Phi-4-mini, both lists equal", "Granite 3, with biases", "Gemma", "SmolLM3 with YaRN", "OLMo 1B", "GLM-4"],
)
@torch.no_grad()
def test_compression_at_full_widths_loses_nothing(tmp_path, name):
    save_published(tmp_path, name, max_position_embeddings=WINDOW_LENGTH)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    files, ids = Source(tmp_path), random_ids(2, 50)
    statistics = Calibration(model, LlamaSource(files), torch.randint(2, 96, (6, WINDOW_LENGTH), generator=seeded(1)))
    whole, expected = build_model(CompressedMla(files, statistics, r=GqaToMla(files).r)), model(ids).logits
    assert relative_error(whole(ids).logits, expected) < 1e-5
    # neither does the refinement, which reads what the source's layers add to the residual stream
    model.set_attn_implementation("sdpa")
    refine(whole, model, random_ids(4, 40))
    assert relative_error(whole(ids).logits, expected) < 1e-5


def test_the_command_reports_that_full_widths_keep_the_perplexity(tmp_path, capsys):
    save_published(tmp_path / "source", "Phi-4-mini, both lists equal", vocab_size=2048, max_position_embeddings=256)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "source")
    widths = ("--kv-lora-rank", "42", "--qk-rope-head-dim", "24", "--calibrate", str(TOKENIZER / "held_out.txt"))
    command = ("convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out"), *widths, "--json")
    capsys.readouterr()
    assert main([*command]) == 0
    report = json.loads(capsys.readouterr().out)
    before = report["perplexity of the source"]
    assert report["perplexity with rotary keys of 24 and latents of 42"] == pytest.approx(before, rel=1e-5)
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "source"), "--dtype", "float32"]) == 0


def test_elements_that_do_not_rotate_are_never_among_the_rotary_keys_of_a_compressed_model(tmp_path):
    save_published(tmp_path, "GLM-4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
    model.save_pretrained(tmp_path)
    # no query reads any key, so nothing loses anything without its rotation
    statistics = Calibration(model, LlamaSource(Source(tmp_path)), random_ids(2, WINDOW_LENGTH))
    conversion = CompressedMla(Source(tmp_path), statistics, r=16)
    assert conversion.num_kept.tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="--qk-rope-head-dim must be even and 2 to 16, got 18"):
        CompressedMla(Source(tmp_path), statistics, r=18)


UPCYCLED = ("--scheme", "M5", "--shared-experts", "2", "--routed-experts", "9", "--groups", "3", "--top-k", "3")


@pytest.mark.parametrize("name", ["Phi-4-mini, both lists equal", "Granite 3, tied", "Gemma", "SmolLM3", "OLMo 7B"])
@torch.no_grad()
def test_an_architecture_becomes_experts_in_one_step_and_is_verified_against_its_source(tmp_path, name):
    source, ids = save_published(tmp_path / "source", name), random_ids(2, 50)
    out = tmp_path / "out"
    assert main(["convert", "upcycle", str(tmp_path / "source"), str(out), *UPCYCLED]) == 0
    assert main(["verify", str(out), "--against", str(tmp_path / "source"), "--dtype", "float32"]) == 0
    for model_class in (AutoModelForCausalLM, NATIVE.DeepseekV2ForCausalLM):
        model = model_class.from_pretrained(out, trust_remote_code=False)
        assert relative_error(model(ids).logits, source(ids).logits) < 1e-5, model_class


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_multiplier", 0.5),
        ("embedding_multiplier", 3.0),
        ("residual_multiplier", 0.7),
        ("logits_scaling", 5.0),
        ("tie_word_embeddings", False),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 0.3),
        ("rope_theta", 5.0),
    ],
)
@torch.no_grad()
def test_each_number_of_granite_changes_the_converted_model_as_it_changes_the_source(tmp_path, field, value):
    ids, before = random_ids(2, 50), save_published(tmp_path / "before", "Granite 3, tied")
    source = save_published(tmp_path / "source", "Granite 3, tied", **{field: value})
    logits = build_model(GqaToMla(Source(tmp_path / "source")))(ids).logits
    assert relative_error(logits, source(ids).logits) < 1e-5
    assert relative_error(logits, before(ids).logits) > 1e-4


@pytest.mark.parametrize("name", ["Granite 3, tied", "Gemma", "OLMo 1B", "GLM-4"])
@torch.no_grad()
def test_in_bfloat16_absorbed_factors_add_little_to_the_rounding_error(tmp_path, name):
    save_published(tmp_path / "source", name, torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    source, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "source"), random_ids(4, 60)
    model = AutoModelForCausalLM.from_pretrained(convert_to_mla(tmp_path / "source", tmp_path / "out"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    errors = [(x(ids).logits.float() - exact(ids).logits).abs().mean() for x in (model, source)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("name", ["Qwen2.5", "Mistral v0.3", "Phi-4"])
def test_what_nothing_changes_has_the_bits_of_the_source(tmp_path, name):
    source = save_published(tmp_path, name, torch.bfloat16).state_dict()
    made = {piece.name: piece.make() for piece in GqaToMla(Source(tmp_path)).pieces()}
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.2.mlp.down_proj.weight"):
        assert torch.equal(made[name], source[name])
    up, *_ = (x for key, x in source.items() if key.endswith(("0.mlp.up_proj.weight", "0.mlp.gate_up_proj.weight")))
    assert torch.equal(made["model.layers.0.mlp.up_proj.weight"], up[-88:])


def test_a_float16_source_whose_absorbed_factor_exceeds_the_dtype_is_refused(tmp_path):
    save_published(tmp_path, "Granite 3, tied", torch.float16, embedding_multiplier=1e6)
    (embedding, *_) = GqaToMla(Source(tmp_path)).pieces()
    with pytest.raises(ValueError, match=r"float16 does not hold model.embed_tokens.weight .* bfloat16"):
        embedding.make()


def assert_refused(capsys, folder: Path, *words: str) -> None:
    assert main(["convert", "gqa-to-mla", str(folder / "source"), str(folder / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in words), error
    assert [path.name for path in folder.iterdir()] == ["source"]


LONGROPE = {"rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Mistral v0.3", {"sliding_window": 100}, ("sliding_window 100", "set sliding_window to null", "up to 100")),
        ("Qwen2.5", {"use_sliding_window": True}, ("sliding_window 32", "up to 32 tokens")),
        ("Phi-3, 4k tokens", {"sliding_window": 127}, ("sliding_window 127", "up to 127 tokens")),
        ("SmolLM3", {"layer_types": ["sliding_attention"] * 3}, ("layer_types ['sliding_attention',", "whole text")),
        ("Phi-4-mini, short texts", {"original_max_position_embeddings": 64}, ("more than 64 tokens", "equal")),
        ("GLM-4", {"partial_rotary_factor": 0.7}, ("partial_rotary_factor", "16 elements", "even number", "0.7")),
        ("GLM-4", {"partial_rotary_factor": 0.0}, ("partial_rotary_factor", "0.0")),
        ("Granite 3, tied", {"logits_scaling": 0.0}, ("logits_scaling must be a number from 1e-06", "got 0.0")),
        ("Granite 3, tied", {"mlp_bias": True}, ("mlp_bias True", "MLPs have no biases")),
        ("ERNIE 4.5", {"use_bias": True}, ("use_bias True", "MLPs have no biases")),
        ("Gemma", {"use_bidirectional_attention": True}, ("use_bidirectional_attention True", "later ones")),
        ("OLMo 7B", {"clip_qkv": 8.0}, ("clip_qkv 8.0", "does not clip")),
        ("OLMo 7B", {"clip_qkv": 0.0}, ("clip_qkv 0.0", "does not clip")),
        ("SmolLM3", {"no_rope_layers": [1]}, ("no_rope_layers", "3 layers, got 1")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_feature_that_no_weight_can_absorb_is_refused_with_the_reason(tmp_path, capsys, name, changes, words):
    save_published(tmp_path / "source", name)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | changes))
    assert_refused(capsys, tmp_path, *words)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("qwen3", "queries and keys are normalized"),
        ("olmo2", "queries and keys are normalized"),
        ("gemma3_text", "queries and keys are normalized"),
        ("gemma2", "by a tanh"),
        ("glm4", "normalizes the outputs of attention and MLPs"),
        ("stablelm", "LayerNorms have biases"),
        ("phi", "its MLP reads the input of attention"),
        ("cohere", "its MLP reads the input of attention"),
        ("ministral3", "scales queries"),
        ("mixtral", "it has experts"),
        ("deepseek_v3", "latent attention already"),
        ("mamba", "expected one of llama, mistral"),
        (["llama"], "got model_type ['llama']"),
    ],
)
def test_an_architecture_without_an_equal_llama_is_refused_with_the_reason(tmp_path, capsys, model_type, words):
    save_source(tmp_path / "source", LlamaConfig)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    assert_refused(capsys, tmp_path, words, "choose another source")


def test_an_architecture_with_other_names_of_layers_is_refused_by_its_name(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    file, config = tmp_path / "source" / "model.safetensors", tmp_path / "source" / "config.json"
    tensors = {name.replace("model.layers", "transformer.h"): x for name, x in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "falcon"}))
    assert_refused(capsys, tmp_path, "got model_type 'falcon': its MLP reads the input of attention")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    assert_refused(capsys, tmp_path, "expected model.layers.0.input_layernorm.weight [64]", "found none")


@pytest.mark.parametrize(
    ("inner", "words"),
    [("llama", "it wraps a language model, which must be saved alone"), ("gemma3_text", "are normalized")],
)
def test_a_model_of_images_and_text_is_refused_with_what_holds_for_its_language_model(tmp_path, capsys, inner, words):
    save_source(tmp_path / "source", LlamaConfig)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config |= {"model_type": "llava", "text_config": {"model_type": inner}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert_refused(capsys, tmp_path, "'llava'", words)
