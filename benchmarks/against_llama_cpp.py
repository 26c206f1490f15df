"""Compares decoding with llama.cpp: python -m benchmarks.against_llama_cpp --out benchmarks/results/llama_cpp.json

It needs `pip install llama-cpp-python gguf`, which builds the first for this machine's CPU (6 minutes). Lite-4 is
written as a GGUF file in bfloat16, in the layout that llama.cpp's own converter writes. Both sides read the same prompt
and their logits are compared. Then they decode one token in turn: this package after `optimize_for_inference`, and
llama.cpp in a process of its own, since two thread pools in one process would slow each other down.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from deepseek_latent import LatentCache, optimize_for_inference

from .decode import SHORTEST, decode, weight_bytes_per_token
from .lite4 import CONFIG, build
from .machine import alternated, described, report, seconds_of, yardsticks
from .plots import draw_beside
from .plots.speed import draw_llama_cpp

# names in the checkpoint, and in llama.cpp
TENSORS = {
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm",
    "self_attn.o_proj.weight": "attn_output",
    "mlp.gate_proj.weight": "ffn_gate",
    "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_down",
    "mlp.gate.weight": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp",
    "mlp.experts.down_proj": "ffn_down_exps",
}
OUTSIDE = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "deepseek2")
    rope, c, r = CONFIG["rope_scaling"], config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_vocab_size(config.vocab_size)
    # llama.cpp requires it unless there are 26, 27 or 48 layers
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(c)
    writer.add_key_length(c + r)
    writer.add_value_length(c)
    writer.add_key_length_mla(config.qk_nope_head_dim + r)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_rope_dimension_count(r)
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _tensors(model):
        # llama.cpp keeps vectors and the router in float32
        if tensor.dim() == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(f"{name}.weight", tensor.float().numpy())
        else:
            as_bytes = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(f"{name}.weight", as_bytes, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: PreTrainedModel):
    for name, tensor in model.state_dict().items():
        if name in OUTSIDE:
            yield OUTSIDE[name], tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        if rest == "self_attn.kv_b_proj.weight":
            # llama.cpp absorbs too, with transposed keys
            n, v = model.config.qk_nope_head_dim, model.config.v_head_dim
            keys, values = tensor.unflatten(0, (-1, n + v)).split((n, v), dim=1)
            yield f"blk.{layer}.attn_k_b", keys.mT
            yield f"blk.{layer}.attn_v_b", values
        elif rest == "mlp.experts.gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            yield f"blk.{layer}.ffn_gate_exps", gate
            yield f"blk.{layer}.ffn_up_exps", up
        else:
            yield f"blk.{layer}.{TENSORS[rest]}", tensor


def serve(path: str, room: int, threads: int) -> None:
    """Runs llama.cpp and answers lines on stdin.

    A line with ids and a file reads the ids and saves the last logits; an empty line decodes and times one token.
    """
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = room, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    memory, held = llama_cpp.llama_get_memory(context), 0

    def read(ids: list[int]) -> None:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama.cpp could not decode")
        llama_cpp.llama_synchronize(context)

    print("ready", flush=True)
    for line in sys.stdin:
        if request := line.strip():
            ids, file = json.loads(request)
            for first in range(0, len(ids), 512):
                read(ids[first : first + 512])
            held += len(ids)
            logits = llama_cpp.llama_get_logits_ith(context, -1)
            np.save(file, np.ctypeslib.as_array(logits, (CONFIG["vocab_size"],)))
            print("read", flush=True)
        else:
            print(seconds_of(lambda: read([17])), flush=True)
            llama_cpp.llama_memory_seq_rm(memory, 0, held, -1)


class LlamaCpp:
    def __init__(self, path: Path, room: int):
        command = [sys.executable, "-m", "benchmarks.against_llama_cpp", "--serve", str(path), str(room)]
        self.process = subprocess.Popen(
            [*command, str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._ask(None)

    def _ask(self, request: str | None) -> str:
        if request is not None:
            print(request, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"llama.cpp ended with {self.process.wait()}")
        return answer

    def read(self, ids: list[int], file: Path) -> Tensor:
        import numpy as np

        self._ask(json.dumps([ids, str(file)]))
        return torch.from_numpy(np.load(file))

    def seconds(self) -> float:
        return float(self._ask(""))


def measure(model: PreTrainedModel, peer: LlamaCpp, cache: LatentCache, context: int, repetitions: int) -> dict:
    new = torch.randint(0, CONFIG["vocab_size"], (context,), generator=torch.Generator().manual_seed(0))
    ids = new[cache.get_seq_length() :]
    own = model(ids[None], cache=cache, logits_to_keep=1).logits[0, -1].float()
    with tempfile.TemporaryDirectory() as folder:
        other = peer.read(ids.tolist(), Path(folder, "logits.npy"))
    error = ((own - other).norm() / own.norm()).item()
    # weights are bfloat16, llama.cpp's cache is float16, and a router near a tie may choose another expert
    assert error < 0.1, f"logits differ by {error} at {context}"
    token = torch.tensor([[17]])
    theirs: list[float] = []
    turns = {"ours": lambda: decode(model, cache, token), "peer": lambda: theirs.append(peer.seconds())} | yardsticks()
    seconds = {name: statistics.median(x) for name, x in alternated(turns, repetitions).items()}
    seconds["peer"] = statistics.median(theirs)
    floor = weight_bytes_per_token(model, 1) * seconds["read 800 MB"] / 8e8
    return {
        "context": context,
        "logits_relative_difference": round(error, 5),
        "kernels_milliseconds": round(1e3 * seconds["ours"], 2),
        "llama_cpp_milliseconds": round(1e3 * seconds["peer"], 2),
        "times_faster_than_llama_cpp": round(seconds["peer"] / seconds["ours"], 2),
        "reading_the_weights_milliseconds": round(1e3 * floor, 2),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[SHORTEST, 1024, 4096])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the result here as JSON, and a plot beside it")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], *map(int, options.serve[1:]))
        return
    model = build("ours")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lite4.gguf")
        write_gguf(model, path)
        optimize_for_inference(model)
        peer, cache = LlamaCpp(path, max(options.contexts) + 64), LatentCache(model.config)
        result = described("python -m benchmarks.against_llama_cpp") | {
            "model": "Lite-4, bfloat16, one token decoded",
            "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
            "rows": [
                measure(model, peer, cache, context, options.repetitions)
                for context in track(sorted(options.contexts), "contexts")
            ],
        }
        peer.process.kill()
    report(result, options.out)
    if options.out:
        draw_beside(options.out, draw_llama_cpp)


if __name__ == "__main__":
    main()
