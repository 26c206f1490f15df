"""The cache is taken and returned under both names, `cache` and `past_key_values`, without a deprecation warning."""

import inspect
import logging
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import pipeline

import deepseek_latent
from deepseek_latent import DeepseekV2ForSequenceClassification, DeepseekV2ForTokenClassification, lora_config
from deepseek_latent.cache.latent_cache import LatentCache
from deepseek_latent.compat.cache_name import CACHE_NAMES
from tests.support import random_ids, tiny_model

PYDOC = Path(__file__).parents[2] / "examples" / "pydoc-tiny"
IDS = random_ids(2, 9)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
BY_EITHER_NAME = pytest.mark.parametrize("name", CACHE_NAMES)


@pytest.fixture(autouse=True)
def warnings_once(monkeypatch):
    """Collects transformers' warnings; fails if one says that a name used here is deprecated."""
    messages = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message, *args: messages.append(message))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(past_key_values|cache_params).*")
        yield messages
    assert not [message for message in messages if "past_key_values" in message]


def heads():
    config = tiny_model(pad_token_id=0).config
    yield tiny_model().model
    yield tiny_model()
    yield DeepseekV2ForSequenceClassification(config).eval()
    yield DeepseekV2ForTokenClassification(config).eval()


HEADS = pytest.mark.parametrize("model", [*heads()], ids=lambda model: type(model).__name__)


@torch.no_grad()
@BY_EITHER_NAME
@HEADS
def test_every_head_takes_its_cache_by_either_name_and_by_position(model, name):
    by_name, by_position = LatentCache(model.config), LatentCache(model.config)
    model(IDS, **{name: by_name})
    model(IDS, None, None, by_position)
    assert by_name.get_seq_length() == by_position.get_seq_length() == IDS.shape[1]
    assert torch.equal(by_name.layers[-1].keys, by_position.layers[-1].keys)


@HEADS
def test_two_caches_are_refused(model):
    one, other = LatentCache(model.config), LatentCache(model.config)
    for arguments in (((), {"cache": one, "past_key_values": other}), ((None, None, one), {"past_key_values": other})):
        with pytest.raises(ValueError, match="expected one cache and got two"):
            model(IDS, *arguments[0], **arguments[1])
    # a caller may pass both names with one cache
    model(IDS, cache=one, past_key_values=None)
    model(IDS, None, None, None, past_key_values=one)
    model(IDS, cache=one, past_key_values=one)
    assert one.get_seq_length() == 3 * IDS.shape[1]
    assert other.get_seq_length() == 0


def test_two_caches_are_refused_by_generate():
    model = tiny_model()
    caches = {name: LatentCache(model.config) for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="expected one cache and got two"):
        model.generate(IDS, **caches, **GREEDY)


@torch.no_grad()
@HEADS
def test_outputs_have_their_cache_under_both_names(model, warnings_once):
    output = model(IDS, use_cache=True)
    if not hasattr(output, "cache"):
        pytest.skip("transformers' output for labels of tokens has no cache")
    assert type(output.cache) is LatentCache
    assert output["cache"] is output.cache
    assert output.past_key_values is output["past_key_values"] is output.cache
    assert model(IDS, use_cache=True, return_dict=False)[1].get_seq_length() == IDS.shape[1]
    # reading the old name is deprecated, and transformers warns once
    warnings_once.clear()


@pytest.mark.parametrize("beams", [1, 2])
def test_what_generate_returns_has_its_cache_under_both_names(beams, warnings_once):
    model = tiny_model()
    output = model.generate(IDS, **GREEDY, num_beams=beams, return_dict_in_generate=True)
    assert type(output.cache) is type(output["cache"]) is LatentCache
    assert output.past_key_values is output["past_key_values"] is output.cache
    assert pickle.loads(pickle.dumps(output)).cache.get_seq_length() == output.cache.get_seq_length()
    warnings_once.clear()


@BY_EITHER_NAME
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_generate_takes_its_cache_by_either_name(mode, name):
    model, ids = tiny_model(), random_ids(1, 9)
    given = LatentCache(model.config)
    output = model.generate(ids, **{name: given}, **GREEDY, **mode, return_dict_in_generate=True)
    assert output.cache is given
    assert torch.equal(output.sequences, model.generate(ids, **GREEDY, **mode))


@BY_EITHER_NAME
def test_a_model_under_adapters_takes_its_cache_by_either_name(name):
    model = tiny_model()
    adapted = get_peft_model(model, lora_config(model, r=4, init_lora_weights=False)).eval()
    given = LatentCache(model.config)
    expected = adapted.generate(input_ids=IDS, **GREEDY)
    assert torch.equal(adapted.generate(input_ids=IDS, **{name: given}, **GREEDY), expected)
    assert given.get_seq_length() == IDS.shape[1] + GREEDY["max_new_tokens"] - 1


@pytest.mark.parametrize("method", [PromptTuningConfig, PromptEncoderConfig], ids=lambda method: method.__name__)
def test_a_learned_prompt_is_inserted_once(method):
    """peft looks up the cache by its old name to see whether the prompt is already in it."""
    model = get_peft_model(tiny_model(), method(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    torch.nn.init.normal_(model.prompt_encoder.default.embedding.weight)
    tokens = IDS
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        tokens = torch.cat((tokens, logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(model.generate(input_ids=IDS, **GREEDY), tokens)


@BY_EITHER_NAME
def test_inputs_for_generation_are_prepared_by_either_name(name):
    model, cache = tiny_model(), LatentCache(tiny_model().config)
    inputs = model.prepare_inputs_for_generation(IDS, **{name: cache})
    assert all(inputs[either] is cache for either in CACHE_NAMES)
    with torch.no_grad():
        model(**inputs)
    assert cache.get_seq_length() == IDS.shape[1]


@torch.no_grad()
@BY_EITHER_NAME
def test_layers_and_attention_take_their_cache_by_either_name(name):
    backbone, caches = tiny_model().model, []
    hidden = backbone.embed_tokens(IDS)
    rotation = backbone.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
    for module in (backbone.layers[0], backbone.layers[0].self_attn):
        caches.append(LatentCache(backbone.config))
        module(hidden, position_embeddings=rotation, **{name: caches[-1]})
        assert caches[-1].get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("method", ["forward", "prepare_inputs_for_generation"])
def test_signatures_have_both_names(method):
    names = inspect.signature(getattr(deepseek_latent.DeepseekV2ForCausalLM, method)).parameters
    assert set(CACHE_NAMES) <= set(names)


def test_pipelines_generate_without_a_warning():
    output = pipeline("text-generation", model=str(PYDOC))("The import statement", **GREEDY)
    assert output[0]["generated_text"].startswith("The import statement")


def test_training_with_checkpointing_fills_no_cache():
    """Otherwise, recomputed layers would write their tokens twice."""
    model = tiny_model().train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=True).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    torch.testing.assert_close(*gradients)
