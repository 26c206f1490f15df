"""Checkpoints with the names and shapes of the release, made without any model class."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from deepseek_latent import DeepseekV2Config
from tests.support import LITE, V2, random_ids, seeded

VARIANTS = {
    "V2": V2,
    "Lite": LITE,
    "dense": V2 | {"n_routed_experts": None},
    "no shared experts": V2 | {"n_shared_experts": None},
    "every other layer": V2 | {"moe_layer_freq": 2, "first_k_dense_replace": 0},
    "biases": V2 | {"attention_bias": True},
}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# what each class adds to the backbone, and what it does not read from an official file
CLASSES = {
    AutoModelForCausalLM: (set(), set()),
    AutoModel: (set(), {"lm_head.weight"}),
    AutoModelForSequenceClassification: ({"score.weight"}, {"lm_head.weight"}),
    AutoModelForTokenClassification: ({"score.weight", "score.bias"}, {"lm_head.weight"}),
}
every_class = pytest.mark.parametrize("auto_class", CLASSES, ids=lambda auto_class: auto_class.__name__)


def official_tensors(config: DeepseekV2Config, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Makes a checkpoint with the release's names and shapes, without any model class; norms are near 1."""
    d, h, c, a = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
    n, r, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        shapes = {"gate": (width, d), "up": (width, d), "down": (d, width)}
        return {f"{prefix}.{name}_proj.weight": shape for name, shape in shapes.items()}

    shapes = {"model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    shapes["lm_head.weight"] = (config.vocab_size, d)
    for layer in range(config.num_hidden_layers):
        at, ff = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (d,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (d,)
        if a is None:
            shapes[f"{at}.q_proj.weight"] = (h * (n + r), d)
        else:
            shapes[f"{at}.q_a_proj.weight"], shapes[f"{at}.q_a_layernorm.weight"] = (a, d), (a,)
            shapes[f"{at}.q_b_proj.weight"] = (h * (n + r), a)
        shapes[f"{at}.kv_a_proj_with_mqa.weight"], shapes[f"{at}.kv_a_layernorm.weight"] = (c + r, d), (c,)
        shapes[f"{at}.kv_b_proj.weight"], shapes[f"{at}.o_proj.weight"] = (h * (n + v), c), (d, h * v)
        if config.attention_bias:
            biased = {"kv_a_proj_with_mqa": c + r, "o_proj": d} | ({} if a is None else {"q_a_proj": a})
            shapes |= {f"{at}.{name}.bias": (width,) for name, width in biased.items()}
        if not config.is_moe_layer(layer):
            shapes |= mlp(ff, config.intermediate_size)
            continue
        shapes[f"{ff}.gate.weight"] = (config.n_routed_experts, d)
        for expert in range(config.n_routed_experts):
            shapes |= mlp(f"{ff}.experts.{expert}", config.moe_intermediate_size)
        if config.n_shared_experts is not None:
            shapes |= mlp(f"{ff}.shared_experts", config.n_shared_experts * config.moe_intermediate_size)

    generator = seeded(seed)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (t + 1 if "norm" in name else t).to(dtype) for name, t in tensors.items()}


def write_checkpoint(folder: Path, config: DeepseekV2Config, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["DeepseekV2ForCausalLM"]
    config.dtype = next(iter(tensors.values())).dtype
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def files_of(folder: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors files of a folder, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert {name: t.dtype for name, t in one.items()} == {name: t.dtype for name, t in other.items()}
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(random_ids(2, 11)).logits
