"""A Llama, Mistral or Qwen2 checkpoint to convert, checked for features that DeepSeek-V2 does not have.

Letters: d model width, h query heads, g key heads, w width of a head.
"""

import reprlib

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ..configuration.checks import MAX_WIDTH, SIZES, check_general_fields, check_size
from ..configuration.rope_parameters import validate_rope
from .checkpoint import common_dtype
from .source import Source

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")
_COMPUTED = "rotary_emb.inv_freq"  # old files hold these frequencies, which every loader computes


class LlamaSource:
    """The tensors of the checkpoint by layer and projection, in float32.

    Raises ValueError for another architecture, for a feature that DeepSeek-V2 does not have, and for a tensor that is
    missing, unexpected or of the wrong shape.
    """

    def __init__(self, files: Source):
        self.files = files
        self.config = config = _supported_config(files)
        self.d = config.hidden_size
        self.h, self.g = config.num_attention_heads, config.num_key_value_heads
        self.w = _head_width(config)
        # the projections to which transformers gives a bias
        attention_bias = tuple(self._shapes()) if getattr(config, "attention_bias", False) else ()
        self.projections_with_bias = ("q_proj", "k_proj", "v_proj") if config.model_type == "qwen2" else attention_bias
        self._check_tensors()
        stored = {name: tensor.dtype for name, tensor in files.tensors.items() if not name.endswith(_COMPUTED)}
        # config.json may say another
        self.dtype = common_dtype(stored, files.folder)

    @property
    def cached_elements(self) -> int:
        """Cache elements per token over all layers, keys and values."""
        return 2 * self.g * self.w * self.config.num_hidden_layers

    def weight(self, layer: int, projection: str) -> Tensor:
        return self.files[f"model.layers.{layer}.self_attn.{projection}.weight"].float()

    def bias(self, layer: int, projection: str) -> Tensor:
        """The bias, or zeros if there is none."""
        if projection not in self.projections_with_bias:
            return torch.zeros(self._shapes()[projection][0])
        return self.files[f"model.layers.{layer}.self_attn.{projection}.bias"].float()

    def affine(self, layer: int, projection: str) -> Tensor:
        """[out d+1] in float64: the weight, and the bias as its last column."""
        return torch.cat((self.weight(layer, projection), self.bias(layer, projection)[:, None]), dim=1).double()

    def input_norm(self, layer: int) -> Tensor:
        return self.files[f"model.layers.{layer}.input_layernorm.weight"].float()

    def _shapes(self) -> dict[str, tuple[int, int]]:
        heads, keys = self.h * self.w, self.g * self.w
        return {
            "q_proj": (heads, self.d),
            "k_proj": (keys, self.d),
            "v_proj": (keys, self.d),
            "o_proj": (self.d, heads),
        }

    def _check_tensors(self) -> None:
        d, vocab, inner = self.d, self.config.vocab_size, self.config.intermediate_size
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        layer |= {"mlp.gate_proj": (inner, d), "mlp.up_proj": (inner, d), "mlp.down_proj": (d, inner)}
        shapes = self._shapes()
        layer |= {f"self_attn.{name}": shape for name, shape in shapes.items()}
        expected = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
        optional = {}
        (optional if self.config.tie_word_embeddings else expected)["lm_head.weight"] = (vocab, d)
        for i in range(self.config.num_hidden_layers):
            expected |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
            expected |= {
                f"model.layers.{i}.self_attn.{name}.bias": (shapes[name][0],) for name in self.projections_with_bias
            }
        for name, shape in expected.items():
            if name not in self.files:
                raise ValueError(f"expected {name} {list(shape)} in {self.files.folder}, found none; complete it.")
        for name, stored in self.files.tensors.items():
            if name.endswith(_COMPUTED):
                continue
            shape = expected.get(name, optional.get(name))
            if shape != stored.shape:
                expectation = f"expected {list(shape)}" if shape else "which DeepSeek-V2 does not have"
                raise ValueError(f"{name} has shape {list(stored.shape)}, {expectation}; it cannot be converted.")


def _supported_config(files: Source) -> PreTrainedConfig:
    given, model_type = files.config, files.config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        reason = ""
        if "qwen3" in str(model_type):
            reason = " (its queries and keys are normalized, which latent attention cannot express)"
        raise ValueError(
            f"expected one of {', '.join(SUPPORTED_MODEL_TYPES)}, got model_type {reprlib.repr(model_type)}{reason}."
        )
    try:
        check_general_fields(given)
        # before transformers computes with them
        for name, most in SIZES.items():
            if given.get(name) is not None:
                check_size(name, given[name], most)
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        _check_numbers(config)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"expected a config.json that transformers reads in {files.folder}, got: {error}") from error
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type")
    has_sliding_window = config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    layer_types = getattr(config, "layer_types", None)
    refused = {
        "sliding_window": getattr(config, "sliding_window", None) if has_sliding_window else None,
        "layer_types": None if layer_types == ["full_attention"] * config.num_hidden_layers else layer_types,
        "mlp_bias": getattr(config, "mlp_bias", None),
        "hidden_act": None if config.hidden_act == "silu" else config.hidden_act,
        "partial_rotary_factor": None if rope.get("partial_rotary_factor", 1) == 1 else rope["partial_rotary_factor"],
        "rope_type": None if rope_type in ("default", "linear", "llama3", "yarn") else rope_type or "none",
    }
    for name, value in refused.items():
        if value:
            raise ValueError(
                f"DeepSeek-V2 does not support {name} {reprlib.repr(value)} of {files.folder}; it cannot be converted."
            )
    validate_rope(rope)
    return config


def _check_numbers(config: PreTrainedConfig) -> None:
    """Raises ValueError for numbers that transformers accepts, but no model has."""
    for name, value in (("num_key_value_heads", config.num_key_value_heads), ("head_dim", _head_width(config))):
        check_size(name, value, MAX_WIDTH)
    h, g = config.num_attention_heads, config.num_key_value_heads
    if h % g:
        raise ValueError(f"num_key_value_heads must divide num_attention_heads ({h}), got {g}.")
    if _head_width(config) % 2:
        raise ValueError(f"the width of a head must be even, since RoPE rotates pairs, got {_head_width(config)}.")


def _head_width(config: PreTrainedConfig) -> int:
    # Qwen2's class has no such field, but reads it
    given = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if given is None else given
