"""The model of the benchmarks: DeepSeek-V2-Lite's exact widths, 4 layers (1 dense, 3 MoE), 2.25 B parameters, bf16."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as NATIVE

import deepseek_latent
from deepseek_latent import LatentCache

CONFIG = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
CLASSES = {
    "ours": (deepseek_latent.DeepseekV2Config, deepseek_latent.DeepseekV2ForCausalLM),
    "native": (NATIVE.DeepseekV2Config, NATIVE.DeepseekV2ForCausalLM),
}


def build(
    which: str,
    dtype: torch.dtype = torch.bfloat16,
    weights: nn.Module | None = None,
    device: str = "cpu",
    **overrides,
) -> nn.Module:
    """Builds Lite-4 of class `which` ("ours" or "native") in eval mode, with random weights or sharing given ones."""
    config_class, model_class = CLASSES[which]
    with torch.device("meta"):
        model = model_class._from_config(config_class(**(CONFIG | overrides)), dtype=dtype)
    if weights is None:
        model.to_empty(device=device)
        fill(model, dtype)
    else:
        model.load_state_dict(weights.state_dict(), assign=True)
        # buffers are still on the meta device
        for module in model.modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                module.to_empty(device=device, recurse=False)
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            model._init_weights(module)
    return model.eval()


def twin(model: nn.Module) -> nn.Module:
    """Returns a copy of a model that shares its weights."""
    return copy.deepcopy(model, {id(x): x for x in model.parameters()})


def fill(model: nn.Module, dtype: torch.dtype) -> None:
    # repeats a tile of noise, to avoid 2 billion draws; not zeros, which can be multiplied faster
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype).to(model.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), noise.numel()):
                part = flat[start : start + noise.numel()]
                part.copy_(noise[: part.numel()])
            if "norm" in name:
                parameter.fill_(1.0)


def filled(model: PreTrainedModel, tokens: int, cache_dtype: str | None) -> LatentCache:
    """A cache of random latents of unit variance, as after their norm."""
    config, cache = model.config, LatentCache(model.config, cache_dtype=cache_dtype)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, tokens, 4096):
        shape = (1, 1, min(4096, tokens - first))
        for layer in range(config.num_hidden_layers):
            new = (torch.randn(*shape, width, generator=generator) for width in (config.kv_lora_rank, 64))
            cache.append(*(x.to(model.dtype) for x in new), layer)
    return cache
