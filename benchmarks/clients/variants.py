"""Tiny checkpoints that other programs are tried on: python -m benchmarks.clients.variants FOLDER

Each is a DeepSeek-V2 of 3 layers with random weights in float32. Those of `FIELDS` differ from "plain" in the fields
that their entry names; those of `WRITTEN` have a config.json that this package reads but does not write, and
`CONVERTED` are the results of conversions. Widths of a cached token are 512 and 64 as in the release, since vLLM's
kernels for a CPU take no others.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM
from deepseek_latent.commands.__main__ import main as deepseek_latent

from ..lite4 import CONFIG

NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 24, 8
EXAMPLE = Path(__file__).parents[2] / "examples" / "pydoc-tiny"
YARN = CONFIG["rope_scaling"] | {"factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "rope_scaling": YARN,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
# fewer groups than experts per token, since groups would not restrict the choice otherwise
GROUPS = {"n_group": 4, "topk_group": 1}
RELEASED_GROUPS = GROUPS | {"topk_method": "group_limited_greedy"}
LITE = {"q_lora_rank": None}
DIVISORS = [1 + i / 8 for i in range(32)]
LONGROPE = {
    "type": "longrope",
    "short_factor": DIVISORS,
    "long_factor": DIVISORS,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {"type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

FIELDS = {
    "plain": {},
    "q_lora_rank null": LITE,
    "q_lora_rank null, 27 layers": LITE | {"num_hidden_layers": 27},
    "RoPE default": {"rope_scaling": None},
    "RoPE default, q_lora_rank null": LITE | {"rope_scaling": None},
    "RoPE default, rope_theta 500": {"rope_scaling": None, "rope_theta": 500.0},
    "RoPE linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "RoPE linear, original_max_position_embeddings": {
        "rope_scaling": {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 64}
    },
    "RoPE dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    "RoPE llama3": {"rope_scaling": LLAMA3 | {"factor": 4.0}},
    "RoPE longrope": {"rope_scaling": LONGROPE | {"factor": 4.0}},
    "yarn, rope_theta 500": {"rope_theta": 500.0},
    "yarn, attention_factor 1": {"rope_scaling": YARN | {"attention_factor": 1.0}},
    "yarn, attention_factor 1.5": {"rope_scaling": YARN | {"attention_factor": 1.5}},
    "yarn, truncate false": {"rope_scaling": YARN | {"truncate": False}},
    "yarn, no mscale": {"rope_scaling": {k: v for k, v in YARN.items() if "mscale" not in k}},
    "yarn, mscale 1, mscale_all_dim 0.5": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "attention_bias": {"attention_bias": True},
    "groups as released": RELEASED_GROUPS | {"routed_scaling_factor": 16.0},
    "n_group 4, greedy": GROUPS | {"topk_method": "greedy"},
    "norm_topk_prob": {"norm_topk_prob": True},
    "norm_topk_prob, groups": RELEASED_GROUPS | {"norm_topk_prob": True},
    "norm_topk_prob, scaling 2.5": {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "norm_topk_prob, groups, scaling 2.5": RELEASED_GROUPS | {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "norm_topk_prob, num_experts_per_tok 1": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "routed_scaling_factor 2.5": {"routed_scaling_factor": 2.5},
    "num_experts_per_tok 1": {"num_experts_per_tok": 1},
    "n_shared_experts null": {"n_shared_experts": None},
    "n_routed_experts null": {"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None},
    "n_routed_experts 8, all layers dense": {"first_k_dense_replace": 3},
    "first_k_dense_replace 0": {"first_k_dense_replace": 0},
    "moe_layer_freq 2": {"moe_layer_freq": 2},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "hidden_act gelu": {"hidden_act": "gelu"},
    "rms_norm_eps 1e-5": {"rms_norm_eps": 1e-5},
    "kv_lora_rank 64": {"kv_lora_rank": 64},
    "qk_rope_head_dim 32": {"qk_rope_head_dim": 32},
    "v_head_dim 48": {"v_head_dim": 48},
    "num_unquantized_channels 64": {"num_unquantized_channels": 64},
}
# a name to the variant whose files it has, fields of config.json that are changed, and fields that are removed
WRITTEN = {
    "without rope_scaling (transformers 5)": ("plain", {}, ["rope_scaling"]),
    "without rope_parameters (transformers 4)": ("plain", {}, ["rope_parameters"]),
    "RoPE default, without rope_parameters": ("RoPE default", {}, ["rope_parameters"]),
    "n_group and topk_group null": ("plain", {"n_group": None, "topk_group": None}, []),
    "without scoring_func, moe_layer_freq": ("plain", {}, ["scoring_func", "moe_layer_freq"]),
}
LLAMA = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 64,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.05,
}
# sources of conversions; bias-free conversions are wrong by a small multiple of rms_norm_eps
SOURCES = {
    "one": {"num_key_value_heads": 1, "rms_norm_eps": 1e-6},
    "two": {"num_key_value_heads": 2, "rms_norm_eps": 1e-6},
}
UPCYCLED = ["--shared-experts", "2", "--routed-experts", "8", "--top-k", "4"]
COMPRESSED = ["--calibrate", str(EXAMPLE / "held_out.txt"), "--kv-lora-rank", "128", "--qk-rope-head-dim", "64"]
BIAS_FREE = "gqa-to-mla --bias-free, one key head"
# a name to the source or variant and the arguments of `deepseek-latent convert`
CONVERTED = {
    "gqa-to-mla, one key head": ("one", ["gqa-to-mla"]),
    "gqa-to-mla, two key heads": ("two", ["gqa-to-mla"]),
    BIAS_FREE: ("one", ["gqa-to-mla", "--bias-free"]),
    "gqa-to-mla --bias-free, two key heads": ("two", ["gqa-to-mla", "--bias-free"]),
    "gqa-to-mla, compressed": ("two", ["gqa-to-mla", *COMPRESSED]),
    "bias-free, then upcycle M0": (BIAS_FREE, ["upcycle", "--scheme", "M0", *UPCYCLED]),
    "bias-free, then upcycle M5": (BIAS_FREE, ["upcycle", "--scheme", "M5", "--groups", "2", *UPCYCLED]),
    "bias-free, then upcycle M2": (
        BIAS_FREE,
        ["upcycle", "--scheme", "M2", "--routed-experts", "4", "--top-k", "2"],
    ),
}


def folder_name(name: str) -> str:
    return name.replace(" ", "_")


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Gives norms and biases random values too, and makes latents so small that the eps of their norms matters."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith(".bias"):
            parameter.normal_(std=0.02)
        elif "q_a_proj" in name:
            parameter.mul_(0.01)
        elif "kv_a_proj" in name:
            parameter[: model.config.kv_lora_rank].mul_(0.01)


def save(model: PreTrainedModel, folder: Path) -> None:
    randomize(model)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / file, folder)


def write_changed_config(source: Path, folder: Path, changed: dict, removed: list[str]) -> None:
    shutil.copytree(source, folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in fields.items() if name not in removed}, indent=2))


@torch.no_grad()
def write_expected(folder: Path) -> None:
    """Writes the fixed prompt with a greedy continuation, and this package's log-probabilities after each token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, PLAIN["vocab_size"], (1, NUM_PROMPT_TOKENS), generator=torch.Generator().manual_seed(5))
    cache, new, logits = None, ids, []
    # read as the programs read it, since dynamic RoPE depends on the number of tokens at a time
    for _ in range(NUM_NEW_TOKENS):
        output = model(input_ids=new, cache=cache, use_cache=True)
        cache, new = output.cache, output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
        logits.append(output.logits[0])
    # the last token of the continuation is read by nobody
    np.savez(folder / "expected.npz", ids=ids[0].numpy(), logprobs=torch.cat(logits).log_softmax(-1).numpy())


def write_variants(folder: Path) -> None:
    for name, fields in FIELDS.items():
        torch.manual_seed(0)
        save(DeepseekV2ForCausalLM(DeepseekV2Config(**PLAIN | fields)), folder / folder_name(name))
    for name, (source, changed, removed) in WRITTEN.items():
        write_changed_config(folder / folder_name(source), folder / folder_name(name), changed, removed)
    exported = folder / folder_name("with code (export-code)")
    shutil.copytree(folder / "plain", exported)
    assert deepseek_latent(["export-code", str(exported)]) == 0
    places = {name: folder / "sources" / name for name in SOURCES} | {BIAS_FREE: folder / folder_name(BIAS_FREE)}
    for name, fields in SOURCES.items():
        torch.manual_seed(0)
        save(LlamaForCausalLM(LlamaConfig(**LLAMA | fields)), places[name])
    for name, (source, (kind, *options)) in CONVERTED.items():
        out = folder / folder_name(name)
        assert deepseek_latent(["convert", kind, str(places[source]), str(out), *options]) == 0
    names = [*FIELDS, *WRITTEN, "with code (export-code)", *CONVERTED]
    for name in track(names, "computing expected log-probabilities"):
        write_expected(folder / folder_name(name))
    (folder / "variants.json").write_text(json.dumps(names, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder for the checkpoints, 0.5 GB")
    write_variants(parser.parse_args().folder)


if __name__ == "__main__":
    main()
