"""Every field of the configuration has an effect: changing it changes something."""

import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from deepseek_latent import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    LatentCache,
)
from deepseek_latent.conversion.size import cached_elements_per_token
from tests.support import V2, random_ids, tiny_model


def logits(fields: dict[str, Any]) -> Tensor:
    return tiny_model(**fields)(random_ids(2, 24)).logits


def train_logits(fields: dict[str, Any]) -> Tensor:
    model = tiny_model(**fields).train()
    torch.manual_seed(3)
    return model(random_ids(2, 9)).logits


def balanced_loss(fields: dict[str, Any]) -> Tensor:
    ids = random_ids(2, 9)
    return tiny_model(**fields).train()(ids, labels=ids, output_router_logits=True).loss


def shapes(fields: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tiny_model(**fields).state_dict().items()}


def is_accepted(fields: dict[str, Any]) -> bool:
    try:
        DeepseekV2Config(**V2 | fields)
    except ValueError:
        return False
    return True


def initial_spread(fields: dict[str, Any]) -> dict[str, float]:
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**V2 | fields))
    return {name: round(tensor.std().item(), 1) for name, tensor in model.named_parameters() if tensor.dim() > 1}


def has_cache(fields: dict[str, Any]) -> bool:
    return tiny_model(**fields)(random_ids(1, 3)).cache is not None


def is_tied(fields: dict[str, Any]) -> bool:
    model = tiny_model(**fields)
    return model.lm_head.weight is model.model.embed_tokens.weight


def has_router_logits(fields: dict[str, Any]) -> bool:
    return tiny_model(**fields)(random_ids(1, 3)).router_logits is not None


def label_of_padded_sequence(fields: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    model = DeepseekV2ForSequenceClassification(DeepseekV2Config(**V2 | fields)).eval()
    return model(torch.tensor([[5, 6, 7, 3, 4, 4]])).logits


def train_labels(fields: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    model = DeepseekV2ForTokenClassification(DeepseekV2Config(**V2 | fields)).train()
    return model(random_ids(1, 5)).logits


def first_token_without_a_prompt(fields: dict[str, Any]) -> int:
    return tiny_model(**fields).generate(max_new_tokens=1, do_sample=False)[0, 0].item()


def generated_length(fields: dict[str, Any]) -> int:
    return tiny_model(**fields).generate(random_ids(1, 3), max_new_tokens=4, do_sample=False).shape[1]


def written(name: str) -> Callable[[dict[str, Any]], Any]:
    def read_back(fields: dict[str, Any]) -> Any:
        value = json.loads(DeepseekV2Config(**V2 | fields).to_json_string())[name]
        assert name not in fields or value == fields[name]
        return value

    return read_back


def bytes_of_int4_cache(fields: dict[str, Any]) -> int:
    model = tiny_model(**fields)
    cache = LatentCache(model.config, cache_dtype="int4")
    with torch.no_grad():
        model(random_ids(1, 3), cache=cache)
    return cache.nbytes


def cached_elements(fields: dict[str, Any]) -> dict[str, int]:
    return cached_elements_per_token(DeepseekV2Config(**V2 | fields))


class Effect(NamedTuple):
    value: Any
    observe: Callable[[dict[str, Any]], Any]
    base: dict[str, Any] = {}  # other fields that make this one matter
    also: dict[str, Any] = {}  # other fields that must change with it


EFFECTS = {
    "vocab_size": Effect(104, shapes),
    "hidden_size": Effect(80, shapes),
    "num_hidden_layers": Effect(2, shapes),
    "num_attention_heads": Effect(2, shapes),
    "num_key_value_heads": Effect(1, is_accepted),
    "initializer_range": Effect(0.3, initial_spread),
    "rms_norm_eps": Effect(0.1, logits),
    "max_position_embeddings": Effect(16, logits, base={"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "rope_parameters": Effect(
        {"rope_type": "default", "rope_theta": 100.0}, logits, also={"rope_theta": None, "rope_scaling": None}
    ),
    "tie_word_embeddings": Effect(True, is_tied),
    "use_cache": Effect(False, has_cache),
    "pad_token_id": Effect(4, label_of_padded_sequence, base={"pad_token_id": 3}),
    "bos_token_id": Effect(5, first_token_without_a_prompt),
    "eos_token_id": Effect(list(range(96)), generated_length, base={"eos_token_id": None}),
    "q_lora_rank": Effect(None, shapes),
    "kv_lora_rank": Effect(48, shapes),
    "qk_nope_head_dim": Effect(32, shapes),
    "qk_rope_head_dim": Effect(16, shapes),
    "v_head_dim": Effect(16, shapes),
    "attention_bias": Effect(True, shapes),
    "num_unquantized_channels": Effect(4, bytes_of_int4_cache),
    "source_cached_width": Effect(384, cached_elements),
    "attention_dropout": Effect(0.5, train_logits),
    "hidden_act": Effect("gelu", logits),
    "intermediate_size": Effect(96, shapes),
    "moe_intermediate_size": Effect(40, shapes),
    "n_routed_experts": Effect(16, shapes),
    "n_shared_experts": Effect(None, shapes),
    "num_experts_per_tok": Effect(2, logits),
    "first_k_dense_replace": Effect(2, shapes),
    "moe_layer_freq": Effect(2, shapes),
    "topk_method": Effect("greedy", logits),
    "scoring_func": Effect("sigmoid", is_accepted),
    "n_group": Effect(6, logits),
    "topk_group": Effect(1, logits),
    "norm_topk_prob": Effect(True, logits),
    "routed_scaling_factor": Effect(2.5, logits),
    "output_router_logits": Effect(True, has_router_logits),
    "classifier_dropout": Effect(0.5, train_labels),
    "aux_loss_alpha": Effect(0.25, balanced_loss),
    "device_aux_loss_alpha": Effect(0.25, balanced_loss),
    "communication_aux_loss_alpha": Effect(0.25, balanced_loss),
    "seq_aux": Effect(False, balanced_loss),
    "device_capacity_factor": Effect(0.5, train_logits, base={"no_drop_fraction": 0.0}),
    "no_drop_fraction": Effect(1.0, train_logits, base={"device_capacity_factor": 0.5, "no_drop_fraction": 0.0}),
    # kept for other programs, which read what was given
    "ep_size": Effect(8, written("ep_size")),
    "pretraining_tp": Effect(4, written("pretraining_tp")),
}


def is_same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("name", EFFECTS)
def test_changing_the_field_has_an_effect(name):
    effect = EFFECTS[name]
    before = effect.observe(effect.base)
    assert is_same(effect.observe(effect.base), before), "the observation is not reproducible"
    assert not is_same(effect.observe(effect.base | {name: effect.value} | effect.also), before)


def test_every_matrix_starts_with_the_initial_spread():
    assert set(initial_spread({"initializer_range": 0.3}).values()) == {0.3}


def test_the_table_of_effects_has_every_field():
    declared = inspect.get_annotations(DeepseekV2Config)
    assert EFFECTS.keys() == declared.keys()
