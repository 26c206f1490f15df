"""The fingerprint of a model: two models with the same one compute the same cache."""

import re
from dataclasses import fields
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from ..compat.peft import adapted_layers, adapter_state
from .checksum import hash_json, hash_tensors

# fields of config.json that no cached number depends on, besides the fields that every model of transformers has
_NEUTRAL_FIELD = re.compile(
    r"_.*|.*_dropout|.*_token_id|output_.*|aux_loss_alpha|auto_map|ep_size|initializer_range|pretraining_tp"
    r"|rope_scaling|rope_theta|seq_aux|tie_word_embeddings|torch_dtype|use_cache"
)


def fingerprint(model: torch.nn.Module) -> str:
    """Hashes what the cache of `model` depends on, in hexadecimal: configuration, every weight, peft's adapters.

    Where it would be expensive to know that two models compute the same cache, their fingerprints differ. So a model
    with adapters has another one than the model without, even if they are disabled, or merged: merging rounds.
    Every weight is read. A weight that is sharded over processes is gathered, and then all of them have to call this.

    Raises:
        ValueError: for weights on the meta device, which have no values.
    """
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"expected every weight to have values, {name} is on the meta device; load it, without offloading."
            )
    return hash_json([settings_of(model), hash_tensors(tensors)])


def settings_of(model: torch.nn.Module) -> list[Any]:
    """The part of the fingerprint that is not weights: configuration, and which adapters act with which scaling."""
    generic = {field.name for field in fields(PreTrainedConfig)}
    config = model.config.to_dict().items()
    config = {name: value for name, value in config if name not in generic and not _NEUTRAL_FIELD.fullmatch(name)}
    return [config, [[name, *adapter_state(layer)] for name, layer in adapted_layers(model)]]
