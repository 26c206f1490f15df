"""Llama, Mistral and Qwen2 become latent attention: the same logits here and in transformers' own class."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
)

from deepseek_latent import LatentCache
from deepseek_latent.conversion.gqa_to_mla import CONSTANT_OVER_LATENT, GqaToMla
from deepseek_latent.conversion.source import Source
from tests.conversion.sources import SOURCES, convert_to_mla, save_source
from tests.support import NATIVE, random_ids, relative_error


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_exact_conversion_gives_the_same_logits_here_and_in_transformers(tmp_path, name):
    config_class, options = SOURCES[name]
    expected, ids = (
        save_source(tmp_path / "source", config_class, **options)(random_ids(2, 50)).logits,
        random_ids(2, 50),
    )
    out = convert_to_mla(tmp_path / "source", tmp_path / "out")
    for model_class in (AutoModelForCausalLM, NATIVE.DeepseekV2ForCausalLM):
        model = model_class.from_pretrained(out, trust_remote_code=False)
        assert relative_error(model(ids).logits, expected) < 1e-5, model_class


@torch.no_grad()
def test_a_converted_model_decodes_from_a_cache_as_large_as_that_of_its_source(tmp_path):
    source, ids = save_source(tmp_path / "source", LlamaConfig), random_ids(2, 9)
    model = AutoModelForCausalLM.from_pretrained(convert_to_mla(tmp_path / "source", tmp_path / "out"))
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = LatentCache(model.config)
    assert torch.equal(model.generate(ids, cache=cache, **options), source.generate(ids, **options))
    width = 2 * source.config.num_key_value_heads * source.config.head_dim
    # the latent is wider by its constant channel and padding
    assert width < model.config.cached_width <= width + 4 * width**0.5


@pytest.mark.parametrize("name", ["GQA", "Qwen2"])
def test_the_constant_channel_exceeds_any_latent_by_the_stated_ratio(tmp_path, name):
    config_class, options = SOURCES[name]
    source = save_source(tmp_path, config_class, **options)
    conversion = GqaToMla(Source(tmp_path))
    made = {piece.name: piece.make() for piece in conversion.pieces()}
    for i, layer in enumerate(source.model.layers):
        values = layer.self_attn.v_proj
        # a normalized input has at most the norm sqrt(d) before its weight
        largest = (values.weight * layer.input_layernorm.weight).norm() * conversion.d**0.5
        largest = largest + (0 if values.bias is None else values.bias.norm())
        constant = made[f"model.layers.{i}.self_attn.kv_a_proj_with_mqa.bias"][conversion.g * conversion.w]
        ratio = constant / conversion.c**0.5 / largest
        # a power of two times the root of the width, so less than twice what is needed
        assert CONSTANT_OVER_LATENT <= ratio < 2 * CONSTANT_OVER_LATENT


@torch.no_grad()
@pytest.mark.parametrize(("config_class", "options"), [(Qwen2Config, ()), (LlamaConfig, ("--bias-free",))])
def test_in_bfloat16_the_conversion_adds_little_to_the_rounding_error(tmp_path, config_class, options):
    source = save_source(tmp_path / "source", config_class, dtype=torch.bfloat16)
    ids, exact = random_ids(4, 60), AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(convert_to_mla(tmp_path / "source", tmp_path / "out", *options))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    errors = [(x(ids).logits.float() - exact(ids).logits).abs().mean() for x in (model, source)]
    assert errors[0] < 1.5 * errors[1]


@torch.no_grad()
def test_without_biases_the_error_grows_with_the_norms_eps(tmp_path):
    errors, ids = [], random_ids(2, 50)
    for eps in (1e-6, 1e-5):
        expected = save_source(tmp_path / f"source{eps}", LlamaConfig, rms_norm_eps=eps)(ids).logits
        out = convert_to_mla(tmp_path / f"source{eps}", tmp_path / f"out{eps}", "--bias-free")
        assert not [name for name in load_file(out / "model.safetensors") if "bias" in name]
        errors.append(relative_error(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected))
    assert errors[0] < 1e-3
    # the norm before attention has this eps, the norm of the latent has 1e-6
    assert 3 < errors[1] / errors[0] < 12


@torch.no_grad()
def test_without_biases_the_latent_spreads_the_huge_channels_of_the_input(tmp_path):
    source = save_source(tmp_path / "source", LlamaConfig)
    source.model.embed_tokens.weight[:, 5] *= 100
    source.save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(
        convert_to_mla(tmp_path / "source", tmp_path / "out", "--bias-free")
    ).eval()
    ids, cache = random_ids(2, 40), LatentCache(model.config)
    model(ids, cache=cache)
    channels = cache.layers[0].keys.square().mean(dim=(0, 1, 2))
    assert channels.max() < 5 * channels.mean()
    inputs = source.model.layers[0].input_layernorm(source.model.embed_tokens(ids)).square().mean(dim=(0, 1))
    assert inputs.max() > 0.9 * inputs.sum()


def losses_while_learning(model, steps: int = 6) -> list[float]:
    optimizer, ids, losses = torch.optim.AdamW(model.train().parameters(), lr=1e-3), random_ids(4, 40), []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("name", ["GQA", "Qwen2"])
def test_a_converted_model_learns_as_its_source_does(tmp_path, name):
    """The constant channel is large before the norm, and must not dominate the training of what reads the latent."""
    config_class, options = SOURCES[name]
    source = save_source(tmp_path / "source", config_class, **options)
    model = AutoModelForCausalLM.from_pretrained(convert_to_mla(tmp_path / "source", tmp_path / "out"))
    ours, theirs = losses_while_learning(model), losses_while_learning(source)
    assert theirs[-1] < theirs[0] - 0.5
    assert ours[-1] < ours[0] - 0.8 * (theirs[0] - theirs[-1])
