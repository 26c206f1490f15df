"""Small checkpoints of other architectures, each with the config.json of a published model, but for its sizes."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.conversion.sources import SMALL, randomize

LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32}
PHI = {"model_type": "phi3", "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_bias": False, "rope_theta": 1e4}
SHORT, LONG = [1.0, 1.05, 1.2, 1.7, 2.1, 4.0], [1.0, 1.1, 1.9, 3.4, 8.0, 32.0]
PHI4_MINI = PHI | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True, "sliding_window": 262144}
PHI4_MINI |= {"original_max_position_embeddings": 32, "interpolate_factor": 1, "full_attn_mod": 1}
GRANITE = {
    "model_type": "granite",
    "attention_multiplier": 0.125,
    "embedding_multiplier": 12.0,
    "attention_bias": False,
}
GRANITE |= {"logits_scaling": 8.0, "residual_multiplier": 0.22, "mlp_bias": False, "attention_dropout": 0.1}
SMOLLM3 = {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2, "max_window_layers": 2}
SMOLLM3 |= {"layer_types": ["full_attention"] * 3, "use_sliding_window": False, "sliding_window": None}
OLMO = {"model_type": "olmo", "clip_qkv": None, "tie_word_embeddings": True, "attention_bias": False}
YARN = {"factor": 2.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}

PUBLISHED = {
    "Qwen2.5": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2}
    | {"use_mrope": False, "tie_word_embeddings": True, "rope_theta": 1e6},
    "Qwen2.5 with YaRN": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32, "rope_theta": 1e6}
    | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"}},
    "Llama 3.2": {"model_type": "llama", "head_dim": 16, "attention_bias": False, "mlp_bias": False}
    | {"pretraining_tp": 1, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e5}
    | {"tie_word_embeddings": True},
    "Mistral v0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "Ministral 8B": {"model_type": "mistral", "head_dim": 24, "sliding_window": 128, "rope_theta": 1e8},
    "Ministral": {"model_type": "ministral", "head_dim": 16, "sliding_window": 128}
    | {"layer_types": ["sliding_attention"] * 3},
    "Phi-4": PHI | {"original_max_position_embeddings": 128, "rope_scaling": None, "sliding_window": None},
    "Phi-3, 4k tokens": PHI | {"original_max_position_embeddings": 128, "rope_scaling": None, "sliding_window": 128},
    "Phi-4-mini, both lists equal": PHI4_MINI
    | {"rope_scaling": {"long_factor": LONG, "short_factor": LONG, "type": "longrope"}},
    "Phi-4-mini, short texts": PHI4_MINI
    | {"original_max_position_embeddings": 128}
    | {"rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}},
    "Granite 3, tied": GRANITE | {"tie_word_embeddings": True, "rope_scaling": None, "rope_theta": 1e7},
    "Granite 3, with biases": GRANITE | {"attention_bias": True, "rope_theta": 1e7},
    "Gemma": {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "head_dim": 24}
    | {"num_key_value_heads": 1, "pad_token_id": 0, "rope_scaling": None, "rope_theta": 1e4},
    "SmolLM3": SMOLLM3 | {"rope_scaling": None, "rope_theta": 5e6, "tie_word_embeddings": True, "mlp_bias": False},
    "SmolLM3 with YaRN": SMOLLM3 | {"rope_scaling": YARN, "rope_theta": 5e6, "attention_bias": True},
    "OLMo 1B": OLMO | {"rope_scaling": None, "rope_theta": 1e4},
    "OLMo 7B": OLMO | {"tie_word_embeddings": False, "attention_bias": True},
    "GLM-4": {"model_type": "glm", "attention_bias": True, "head_dim": 16, "partial_rotary_factor": 0.5}
    | {"rope_theta": 1e4, "rms_norm_eps": 1.5625e-07},
    "Helium": {"model_type": "helium", "head_dim": 16, "attention_bias": False, "rms_norm_eps": 1e-8},
    "ERNIE 4.5": {"model_type": "ernie4_5", "head_dim": 24, "use_bias": False, "rope_theta": 5e5}
    | {"tie_word_embeddings": True},
    "Seed-OSS": {"model_type": "seed_oss", "attention_bias": True, "attention_out_bias": False, "head_dim": 24}
    | {"residual_dropout": 0.1, "rope_scaling": {"rope_type": "default"}, "rope_theta": 1e7},
}


def save_published(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """Saves a random model of transformers' own class, with the config.json as it is published, and returns it."""
    config = SMALL | {"pad_token_id": 0, "torch_dtype": str(dtype).removeprefix("torch.")} | PUBLISHED[name] | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    randomize(model).to(dtype).eval().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return model
