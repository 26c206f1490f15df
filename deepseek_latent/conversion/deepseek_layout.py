"""Converts to and from the layout of DeepSeek's inference code: other names, one file per rank, another config.

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
from ..json_files import read_json
from .cast import Cast
from .checkpoint import checkpoint_tensors, common_dtype, read_generation_config
from .deepseek_config import CONFIG_FIELDS, config_from_deepseek
from .source import TORCH_DTYPES, Source, companion_files, fingerprint
from .source_card import read_card
from .target import Piece

# module name here: module name in DeepSeek's code, and the axis that is split over ranks
MODULE_NAMES = {
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
_EXPERT = re.compile(r".*\.experts\.(\d+)\..*")
_RANK = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


def deepseek_name(name: str) -> str:
    """The name in DeepSeek's code: `layers.0.attn.wq.weight` for `model.layers.0.self_attn.q_proj.weight`."""
    *path, module, kind = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn").split(".")
    return ".".join((*path, MODULE_NAMES[module][0], kind))


def sharded_axis(name: str) -> int | None:
    return MODULE_NAMES[name.split(".")[-2]][1]


class ExportDeepseek:
    """An official checkpoint as one file per rank: `shards`, and the `texts` of other files.

    Raises ValueError for a model that DeepSeek's code would compute differently, naming the field, and for a number of
    ranks that the model cannot be divided by.
    """

    def __init__(self, source: Source, num_ranks: int):
        self.num_ranks, self.base = num_ranks, Cast(source, None)
        self.config = config = self.base.config
        _check_exportable(config)
        names = ["num_attention_heads", "vocab_size", "intermediate_size"]
        if config.moe_layers:
            names += ["n_routed_experts", "moe_intermediate_size"]
        for name, number in ((name, getattr(config, name)) for name in names):
            if num_ranks < 1 or number % num_ranks:
                raise ValueError(f"--model-parallel must be a divisor of {name} ({number}), got {num_ranks}.")

    def shards(self) -> dict[str, list[Piece]]:
        pieces = {piece.name: piece for piece in self.base.pieces()}
        if "lm_head.weight" not in pieces:
            # DeepSeek's code does not tie weights
            embeddings = pieces["model.embed_tokens.weight"]
            # a copy, because a file cannot hold a tensor under two names
            head = embeddings._replace(name="lm_head.weight", make=lambda: embeddings.make().clone())
            pieces["lm_head.weight"] = head
        return {
            f"model{rank}-mp{self.num_ranks}.safetensors": [
                part for piece in pieces.values() if (part := self._part(piece, rank)) is not None
            ]
            for rank in range(self.num_ranks)
        }

    def _part(self, piece: Piece, rank: int) -> Piece | None:
        """The part of a tensor on one rank, or None if it is on another rank only."""
        name, axis = deepseek_name(piece.name), sharded_axis(piece.name)
        if expert := _EXPERT.fullmatch(piece.name):
            is_here = int(expert[1]) // (self.config.n_routed_experts // self.num_ranks) == rank
            return piece._replace(name=name) if is_here else None
        if axis is None or self.num_ranks == 1:
            return piece._replace(name=name)
        shape, size = list(piece.shape), piece.shape[axis] // self.num_ranks
        shape[axis] = size
        return Piece(name, tuple(shape), piece.dtype, lambda: piece.make().narrow(axis, rank * size, size))

    def texts(self) -> dict[str, str]:
        config, rope = self.config, self.config.rope_parameters
        fields = {stored_name: getattr(config, name) for stored_name, name in CONFIG_FIELDS.items()}
        fields |= {"q_lora_rank": config.q_lora_rank or 0, "rope_theta": rope["rope_theta"], "dtype": "bf16"}
        if config.topk_method == "greedy":
            fields |= {"n_expert_groups": 1, "n_limited_groups": 1}
        if rope["rope_type"] == "yarn":
            fields |= {"rope_factor": rope["factor"], "original_seq_len": rope["original_max_position_embeddings"]}
            fields |= {"beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
            # DeepSeek's code applies YaRN only if max_seq_len is longer than original_seq_len
            fields |= {"mscale": rope.get("mscale_all_dim") or 0.0, "max_seq_len": config.max_position_embeddings}
        else:
            length = config.max_position_embeddings
            fields |= {"original_seq_len": length, "max_seq_len": length}
        return {"config.json": json.dumps(fields, indent=2) + "\n"}


def _check_exportable(config: DeepseekV2Config) -> None:
    rope = config.rope_parameters
    is_yarn = rope["rope_type"] == "yarn"
    mscales = rope.get("mscale", 1.0), rope.get("mscale_all_dim") or 0.0
    is_unused_yarn = is_yarn and config.max_position_embeddings <= rope["original_max_position_embeddings"]
    refused = {
        "attention_bias": config.attention_bias,
        "rms_norm_eps": config.rms_norm_eps if config.rms_norm_eps != 1e-6 else None,
        "hidden_act": config.hidden_act if config.hidden_act != "silu" else None,
        "norm_topk_prob": config.norm_topk_prob,
        "moe_layer_freq": config.moe_layer_freq if config.moe_layer_freq != 1 else None,
        "n_shared_experts": "null" if config.n_shared_experts is None else None,
        "rope_type": None if rope["rope_type"] in ("default", "yarn") else rope["rope_type"],
        "mscale": f"{mscales[0]} with mscale_all_dim {mscales[1]}" if is_yarn and len(set(mscales)) > 1 else None,
        "attention_factor": rope.get("attention_factor") if is_yarn else None,
        "max_position_embeddings": config.max_position_embeddings if is_unused_yarn else None,
        # DeepSeek's code rounds the bounds of YaRN's ramp, and adds a bias to the router at this width
        "truncate": "false" if is_yarn and not rope.get("truncate", True) else None,
        "hidden_size": config.hidden_size if config.hidden_size == 7168 else None,
    }
    for name, value in refused.items():
        if value:
            raise ValueError(f"DeepSeek's inference code does not support {name} {value!r}; it cannot be exported.")


class ImportDeepseek:
    """Files of DeepSeek's inference code as an official checkpoint: `config` and `pieces`.

    Raises ValueError if the config is not that of DeepSeek's code, ranks are missing, tensors do not fit, or weights
    are in fp8.
    """

    def __init__(self, folder: Path, config: Path):
        self.folder = folder
        if not config.is_file():
            raise ValueError(f"expected the config of DeepSeek's inference code in {config}; name it with --config.")
        self.card = read_card(folder)
        self.config = config_from_deepseek(read_json(config), config, read_generation_config(folder))
        found = {path: match for path in folder.glob("*.safetensors") if (match := _RANK.fullmatch(path.name))}
        counts = {int(match[2]) for match in found.values()}
        ranks = sorted(int(match[1]) for match in found.values())
        if counts != {len(found)} or ranks != [*range(len(found))]:
            names = ", ".join(sorted(path.name for path in found)) or "none"
            raise ValueError(
                f"expected one file model<rank>-mp<ranks>.safetensors for each rank in {folder}, got {names}."
            )
        self.files = sorted(found, key=lambda path: int(found[path][1]))
        try:
            self.ranks = [safe_open(path, framework="pt") for path in self.files]
        except SafetensorError as error:
            raise ValueError(
                f"a file in {folder} is cut off or not a safetensors file ({error}); copy it again."
            ) from error
        self.names = [set(rank.keys()) for rank in self.ranks]
        # DeepSeek's config says bf16 whatever the files hold; tensors with scales are refused by `pieces`
        stored = {
            name: rank.get_slice(name).get_dtype()
            for rank, names in zip(self.ranks, self.names)
            for name in names
            if not name.endswith(".scale")
        }
        if {*stored.values()} <= TORCH_DTYPES.keys():
            self.config.dtype = common_dtype(stored, folder)

    def pieces(self) -> list[Piece]:
        expected = checkpoint_tensors(self.config)
        known = {deepseek_name(name) for name in expected}
        for file, names in zip(self.files, self.names):
            if unknown := sorted(names - known):
                kind = "fp8 weights have scales; cast them first" if unknown[0].endswith("scale") else "it is unknown"
                raise ValueError(f"{unknown[0]} in {file.name} is not a tensor of DeepSeek-V2: {kind}.")
        return [self._piece(name, shape) for name, shape in expected.items()]

    def _piece(self, name: str, shape: tuple[int, ...]) -> Piece:
        stored_name, axis = deepseek_name(name), sharded_axis(name)
        holders = [rank for rank, names in zip(self.ranks, self.names) if stored_name in names]
        is_sharded = axis is not None and _EXPERT.fullmatch(name) is None
        if len(holders) < (len(self.ranks) if is_sharded else 1):
            raise ValueError(
                f"expected {stored_name} in the files of {self.folder}, found it in {len(holders)}; complete them."
            )
        slices = [rank.get_slice(stored_name) for rank in (holders if is_sharded else holders[:1])]
        dtypes, shapes = {x.get_dtype() for x in slices}, [tuple(x.get_shape()) for x in slices]
        joined = list(shapes[0])
        if is_sharded:
            joined[axis] = sum(x[axis] for x in shapes)
        if tuple(joined) != shape or len(dtypes) > 1 or not dtypes <= TORCH_DTYPES.keys():
            raise ValueError(
                f"{stored_name} has shape {joined} and dtype {', '.join(sorted(dtypes))}, expected {list(shape)}."
            )
        return Piece(name, shape, TORCH_DTYPES[dtypes.pop()], functools.partial(_join, slices, axis, stored_name))

    def companion_files(self) -> list[Path]:
        return companion_files(self.folder)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def weight_files(self) -> list[Path]:
        return self.files

    def fingerprint(self) -> str:
        return fingerprint(self.config.to_dict(), self.files)


def _join(slices: list, axis: int | None, name: str) -> Tensor:
    tensor = slices[0][:] if len(slices) == 1 else torch.cat([part[:] for part in slices], dim=axis)
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity; take another copy.")
    return tensor
