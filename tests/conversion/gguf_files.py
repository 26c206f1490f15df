"""Small GGUF files of Llama and Qwen2, written as llama.cpp's converter lays them out."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor
from transformers import PreTrainedModel

from tests.commands.terminal import byte_tokenizer

IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def gguf_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights by their names in GGUF. llama.cpp rotates neighboring channels, so a Llama's heads are permuted."""
    config, state = model.config, model.state_dict()
    names = dict(OUTSIDE)
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{name}": f"model.layers.{i}.{module}" for name, module in IN_LAYER.items()}
    if config.tie_word_embeddings:
        names.pop("output")
    tensors = {}
    for name, module in names.items():
        for end in ("weight", "bias"):
            if (tensor := state.get(f"{module}.{end}")) is not None:
                heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
                if (h := heads.get(name.split(".")[-1])) and config.model_type == "llama":
                    tensor = tensor.unflatten(0, (h, 2, -1)).transpose(1, 2).flatten(0, 2)
                tensors[f"{name}.{end}"] = tensor
    return tensors


def gguf_metadata(model: PreTrainedModel) -> dict:
    config = model.config
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    return {f"{config.model_type}.{name}": value for name, value in fields.items()}


def write_gguf(file: Path, tensors: dict[str, Tensor], metadata: dict, architecture: str = "llama") -> Path:
    """A GGUF file with a tokenizer of bytes. Matrices keep their dtype, other tensors are in float32, as usual."""
    writer = GGUFWriter(file, architecture)
    writer.add_name("A title / with a slash")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    for name, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(name, value)
    vocabulary = byte_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    # gguf writes no empty list, and transformers needs one
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16 and tensor.dim() > 1:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
