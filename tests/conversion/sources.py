"""Small Llama, Mistral and Qwen2 checkpoints to convert."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from deepseek_latent.commands.__main__ import main

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


SOURCES = {
    "MHA": (LlamaConfig, {"num_key_value_heads": 4}),
    "GQA": (LlamaConfig, {}),
    "MQA": (LlamaConfig, {"num_key_value_heads": 1}),
    "MQA, llama3": (LlamaConfig, {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "wide heads, tied": (LlamaConfig, {"head_dim": 24, "tie_word_embeddings": True}),
    "all biases": (LlamaConfig, {"attention_bias": True}),
    "GELU": (LlamaConfig, {"hidden_act": "gelu"}),
    "Mistral": (MistralConfig, {"sliding_window": None}),
    "Qwen2": (Qwen2Config, {}),
    "Qwen2, tied": (Qwen2Config, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}


def save_source(folder: Path, config_class, dtype=torch.float32, **options) -> PreTrainedModel:
    """Saves a model with random norms and biases to a folder, and returns the model."""
    torch.manual_seed(0)
    model = randomize(AutoModelForCausalLM.from_config(config_class(**(SMALL | options)))).to(dtype).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Makes norms and biases random, and the other weights larger, so that every tensor matters."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        elif name.endswith("bias"):
            parameter.normal_()
        else:
            parameter.mul_(4)
    return model


def convert_to_mla(source: Path, out: Path, *options: str) -> Path:
    assert main(["convert", "gqa-to-mla", str(source), str(out), *options]) == 0
    return out
