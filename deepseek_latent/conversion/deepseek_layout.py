"""The layout of DeepSeek's own inference code, there and back: other names, one file per rank, a config of its own.

Source: github.com/deepseek-ai/DeepSeek-V3, inference/convert.py and model.py, which run DeepSeek-V2 too.
"""

import functools
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configuration_deepseek_v2 import DeepseekV2Config
from .cast import Cast
from .checkpoint import checkpoint_tensors, read_json
from .source import DTYPES, Source, companion_files, fingerprint
from .target import Piece

# our part of a name, theirs, and the axis that ranks share, where they do
NAMES = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}
# their fields that mean ours
FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
# what their code takes where a config is silent
DEFAULTS = {"n_expert_groups": 1, "n_limited_groups": 1, "q_lora_rank": 0, "rope_theta": 10000.0, "rope_factor": 40}
DEFAULTS |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "original_seq_len": 4096, "max_seq_len": 16384}
_EXPERT = re.compile(r".*\.experts\.(\d+)\..*")
_RANK = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


def deepseek_name(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` as `layers.0.attn.wq.weight`."""
    *path, module, kind = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn").split(".")
    return ".".join((*path, NAMES[module][0], kind))


def sharded_axis(name: str) -> int | None:
    return NAMES[name.split(".")[-2]][1]


class ExportDeepseek:
    """An official checkpoint as files for `ranks` processes: `shards`, each a rank's, and the texts beside them.

    Raises:
        ValueError: for a model that their code would compute otherwise, naming the field, or that so many ranks cannot
            share.
    """

    def __init__(self, source: Source, ranks: int):
        self.ranks, self.base = ranks, Cast(source, None)
        self.config = config = self.base.config
        _check_theirs(config)
        names = ["num_attention_heads", "vocab_size", "intermediate_size"]
        if any(config.is_moe_layer(i) for i in range(config.num_hidden_layers)):
            names += ["n_routed_experts", "moe_intermediate_size"]
        for name, number in ((name, getattr(config, name)) for name in names):
            if ranks < 1 or number % ranks:
                raise ValueError(f"--model-parallel must be a divisor of {name} ({number}), got {ranks}.")

    def shards(self) -> dict[str, list[Piece]]:
        pieces = {piece.name: piece for piece in self.base.pieces()}
        if "lm_head.weight" not in pieces:
            # they tie nothing
            embeddings = pieces["model.embed_tokens.weight"]
            # a copy, since one file holds no tensor under two names
            head = embeddings._replace(name="lm_head.weight", make=lambda: embeddings.make().clone())
            pieces["lm_head.weight"] = head
        return {
            f"model{rank}-mp{self.ranks}.safetensors": [
                part for piece in pieces.values() if (part := self._part(piece, rank)) is not None
            ]
            for rank in range(self.ranks)
        }

    def _part(self, piece: Piece, rank: int) -> Piece | None:
        """A tensor's part of one rank, or None where another rank has it."""
        name, axis = deepseek_name(piece.name), sharded_axis(piece.name)
        if expert := _EXPERT.fullmatch(piece.name):
            is_here = int(expert[1]) // (self.config.n_routed_experts // self.ranks) == rank
            return piece._replace(name=name) if is_here else None
        if axis is None or self.ranks == 1:
            return piece._replace(name=name)
        shape, size = list(piece.shape), piece.shape[axis] // self.ranks
        shape[axis] = size
        return Piece(name, tuple(shape), piece.dtype, lambda: piece.make().narrow(axis, rank * size, size))

    def texts(self) -> dict[str, str]:
        config, rope = self.config, self.config.rope_parameters
        theirs = {name: getattr(config, ours) for name, ours in FIELDS.items()}
        theirs |= {"q_lora_rank": config.q_lora_rank or 0, "rope_theta": rope["rope_theta"], "dtype": "bf16"}
        if config.topk_method == "greedy":
            theirs |= {"n_expert_groups": 1, "n_limited_groups": 1}
        if rope["rope_type"] == "yarn":
            theirs |= {"rope_factor": rope["factor"], "original_seq_len": rope["original_max_position_embeddings"]}
            theirs |= {"beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
            # they stretch only what is longer than it was
            theirs |= {"mscale": rope.get("mscale_all_dim") or 0.0, "max_seq_len": config.max_position_embeddings}
        else:
            length = config.max_position_embeddings
            theirs |= {"original_seq_len": length, "max_seq_len": length}
        return {"config.json": json.dumps(theirs, indent=2) + "\n"}


def _check_theirs(config: DeepseekV2Config) -> None:
    rope = config.rope_parameters
    is_yarn = rope["rope_type"] == "yarn"
    mscales = rope.get("mscale", 1.0), rope.get("mscale_all_dim") or 0.0
    unstretched = is_yarn and config.max_position_embeddings <= rope["original_max_position_embeddings"]
    refused = {
        "attention_bias": config.attention_bias,
        "rms_norm_eps": config.rms_norm_eps if config.rms_norm_eps != 1e-6 else None,
        "hidden_act": config.hidden_act if config.hidden_act != "silu" else None,
        "norm_topk_prob": config.norm_topk_prob,
        "moe_layer_freq": config.moe_layer_freq if config.moe_layer_freq != 1 else None,
        "n_shared_experts": "null" if config.n_shared_experts is None else None,
        "rope_type": None if rope["rope_type"] in ("default", "yarn") else rope["rope_type"],
        "mscale": f"{mscales[0]} beside mscale_all_dim {mscales[1]}" if is_yarn and len(set(mscales)) > 1 else None,
        "attention_factor": rope.get("attention_factor") if is_yarn else None,
        "max_position_embeddings": config.max_position_embeddings if unstretched else None,
        # they round the bounds of YaRN's ramp, and give the router of this width a bias
        "truncate": "false" if is_yarn and not rope.get("truncate", True) else None,
        "hidden_size": config.hidden_size if config.hidden_size == 7168 else None,
    }
    for name, value in refused.items():
        if value:
            raise ValueError(f"DeepSeek's inference code has no place for {name} {value!r}; it cannot be exported.")


class ImportDeepseek:
    """Files of DeepSeek's inference code as an official checkpoint: `config` and `pieces`.

    Raises:
        ValueError: where the config is not theirs, ranks are missing, tensors do not fit, or weights are in fp8.
    """

    def __init__(self, folder: Path, config: Path):
        self.folder = folder
        if not config.is_file():
            raise ValueError(f"expected the config of DeepSeek's inference code in {config}; name it with --config.")
        self.config = _config_from_deepseek(read_json(config), config)
        beside = folder / "generation_config.json"
        # theirs says nothing of them, and our defaults are those of the published models
        ids = read_json(beside) if beside.is_file() else {}
        is_published = self.config.vocab_size == DeepseekV2Config.vocab_size
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self.config, name, ids.get(name, getattr(self.config, name) if is_published else None))
        found = {path: match for path in folder.glob("*.safetensors") if (match := _RANK.fullmatch(path.name))}
        counts = {int(match[2]) for match in found.values()}
        if len(counts) != 1 or {int(match[1]) for match in found.values()} != set(range(max(counts))):
            names = ", ".join(sorted(path.name for path in found)) or "none"
            raise ValueError(f"expected model0-mpN.safetensors to the last of N ranks in {folder}, got {names}.")
        self.files = sorted(found, key=lambda path: int(found[path][1]))
        try:
            self.ranks = [safe_open(path, framework="pt") for path in self.files]
        except SafetensorError as error:
            raise ValueError(
                f"a file in {folder} is cut off or no safetensors file ({error}); copy it again."
            ) from error
        self.held = [set(rank.keys()) for rank in self.ranks]

    def pieces(self) -> list[Piece]:
        expected = checkpoint_tensors(self.config)
        known = {deepseek_name(name) for name in expected}
        for file, held in zip(self.files, self.held):
            if unknown := sorted(held - known):
                kind = "fp8 weights have scales; cast them first" if unknown[0].endswith("scale") else "it is unknown"
                raise ValueError(f"{unknown[0]} in {file.name} has no place in DeepSeek-V2: {kind}.")
        return [self._piece(name, shape) for name, shape in expected.items()]

    def _piece(self, name: str, shape: tuple[int, ...]) -> Piece:
        theirs, axis = deepseek_name(name), sharded_axis(name)
        holders = [rank for rank, held in zip(self.ranks, self.held) if theirs in held]
        is_shared = axis is not None and _EXPERT.fullmatch(name) is None
        if len(holders) < (len(self.ranks) if is_shared else 1):
            raise ValueError(
                f"expected {theirs} in the files of {self.folder}, found it in {len(holders)}; complete them."
            )
        slices = [rank.get_slice(theirs) for rank in (holders if is_shared else holders[:1])]
        kinds, shapes = {x.get_dtype() for x in slices}, [tuple(x.get_shape()) for x in slices]
        came = list(shapes[0])
        if is_shared:
            came[axis] = sum(x[axis] for x in shapes)
        if tuple(came) != shape or len(kinds) > 1 or not kinds <= DTYPES.keys():
            raise ValueError(f"{theirs} has shape {came} and dtype {', '.join(sorted(kinds))}, expected {list(shape)}.")
        return Piece(name, shape, DTYPES[kinds.pop()], functools.partial(_joined, slices, axis, theirs))

    def companion_files(self) -> list[Path]:
        return companion_files(self.folder)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def fingerprint(self) -> str:
        return fingerprint(self.config.to_dict(), self.files)


def _joined(slices: list, axis: int | None, name: str) -> Tensor:
    tensor = slices[0][:] if len(slices) == 1 else torch.cat([part[:] for part in slices], dim=axis)
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity; take another copy.")
    return tensor


def _config_from_deepseek(theirs: dict, file: Path) -> DeepseekV2Config:
    missing = [name for name in FIELDS if name not in theirs and name not in DEFAULTS]
    if missing:
        raise ValueError(f"expected {missing[0]} in {file}, as DeepSeek's inference code has it; name its config.")
    if theirs.get("dtype", "bf16") != "bf16" or theirs.get("score_func", "softmax") != "softmax":
        raise ValueError(f"expected dtype bf16 and score_func softmax in {file}, got another; it cannot be imported.")
    given = DEFAULTS | theirs
    ours = {name: given[their] for their, name in FIELDS.items()}
    rope, length = {"rope_type": "default", "rope_theta": given["rope_theta"]}, given["max_seq_len"]
    if length > given["original_seq_len"]:
        rope |= {"rope_type": "yarn", "factor": given["rope_factor"]}
        rope |= {name: given[name] for name in ("beta_fast", "beta_slow")}
        rope |= {"original_max_position_embeddings": given["original_seq_len"]}
        rope |= {"mscale": given["mscale"], "mscale_all_dim": given["mscale"]}
        # their code reads no further than it is told to; the stretched model does
        length = max(length, int(given["rope_factor"] * given["original_seq_len"]))
    return DeepseekV2Config(
        **ours,
        num_key_value_heads=ours["num_attention_heads"],
        q_lora_rank=given["q_lora_rank"] or None,
        topk_method="group_limited_greedy" if ours["n_group"] > 1 else "greedy",
        rope_parameters=rope,
        max_position_embeddings=length,
        architectures=["DeepseekV2ForCausalLM"],
        dtype=torch.bfloat16,
        tie_word_embeddings=False,
    )
