"""Converts LoRA adapters between separate layers per routed expert (transformers 4, vLLM, SGLang) and stacked experts.

Letters: e experts, k rank of one layer, d model width, f width of an expert.

For a stacked parameter peft has A [e k', in], ordered by expert, and B [out, k' e], ordered by rank. Gate and up of an
expert become one parameter: their As are concatenated, their Bs are on a diagonal, so k' is 2 k. In the other
direction, both get all of A and their half of B.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..experts.names import PROJECTIONS, ROUTED_EXPERTS
from .checkpoint import read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_SINGLE = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.lora_([AB])\.weight")
# peft nests two wrappers: the inner one, `base_layer`, is that of gate_up_proj
_STACK = re.compile(r"(.*\.mlp\.experts)\.(base_layer\.)?lora_([AB])\.weight")
GATE_UP, DOWN = ROUTED_EXPERTS
# by the name that peft gives a stacked weight
_PROJECTIONS = dict(zip(ROUTED_EXPERTS, PROJECTIONS.values()))


def convert_adapter(source: Path, out: Path) -> dict:
    """Writes an adapter with separate experts as one with stacked experts, or the other way. Returns a report.

    Raises ValueError unless the source is a LoRA adapter without DoRA whose routed experts are all separate or all
    stacked, and if `out` exists.
    """
    config = read_json(source / CONFIG_FILE)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        found = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise ValueError(f"expected a LoRA adapter without DoRA in {source}, got {found}.")
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder.")
    try:
        tensors = load_file(source / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"expected {WEIGHTS_FILE} in {source}, got: {error}") from error
    experts = {name for name in tensors if _SINGLE.fullmatch(name) or _STACK.fullmatch(name)}
    num_singles = sum(_SINGLE.fullmatch(name) is not None for name in experts)
    if num_singles not in (0, len(experts)) or not experts:
        raise ValueError(
            f"expected routed experts in {source}, separate or stacked, got {'both' if experts else 'none'}."
        )
    convert = _stack if num_singles else _unstack
    made, changes = convert({name: tensors.pop(name) for name in experts}, config)
    out.mkdir(parents=True)
    save_file(
        {name: x.contiguous() for name, x in (tensors | made).items()}, out / WEIGHTS_FILE, metadata={"format": "pt"}
    )
    (out / CONFIG_FILE).write_text(json.dumps(config | changes, indent=2) + "\n", encoding="utf-8")
    return {"out": str(out), "experts": "stacked" if num_singles else "separate", "tensors": len(tensors | made)}


def _stack(tensors: dict[str, Tensor], config: dict) -> tuple[dict[str, Tensor], dict]:
    """The tensors of stacked experts, and the changes to the config."""
    layers: dict[str, dict[tuple[str, int, str], Tensor]] = {}
    for name, tensor in tensors.items():
        experts, expert, projection, side = _SINGLE.fullmatch(name).groups()
        layers.setdefault(experts, {})[projection, int(expert), side] = tensor
    found = {frozenset(parts) for parts in layers.values()}
    first = next(iter(found))
    present, e = {projection for projection, _, _ in first}, 1 + max(expert for _, expert, _ in first)
    if len(found) > 1 or len(first) != 2 * e * len(present) or len(present & set(_PROJECTIONS[GATE_UP])) == 1:
        raise ValueError("expected the same projections of all experts in every layer, gate and up together.")
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    if ranks != {config["r"]}:
        raise ValueError(f"expected experts of rank {config['r']}, as r says, got {sorted(ranks)}.")
    parameters = [parameter for parameter, names in _PROJECTIONS.items() if present & set(names)]
    made = {}
    for experts, parts in layers.items():
        for parameter in parameters:
            names = _PROJECTIONS[parameter]
            a = torch.stack([torch.cat([parts[name, i, "A"] for name in names]) for i in range(e)])
            b = torch.stack([torch.block_diag(*(parts[name, i, "B"] for name in names)) for i in range(e)])
            inner = "base_layer." if parameter == GATE_UP and DOWN in parameters else ""
            made[f"{experts}.{inner}lora_A.weight"] = a.flatten(0, 1)
            made[f"{experts}.{inner}lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
    changes = {"target_parameters": parameters}
    if GATE_UP in parameters:
        # keeps the scaling, which is alpha over the rank, or over its square root
        factor = 2**0.5 if config.get("use_rslora") else 2
        changes["rank_pattern"] = (config.get("rank_pattern") or {}) | {GATE_UP: 2 * config["r"]}
        changes["alpha_pattern"] = (config.get("alpha_pattern") or {}) | {GATE_UP: factor * config["lora_alpha"]}
    return made, changes


def _unstack(tensors: dict[str, Tensor], config: dict) -> tuple[dict[str, Tensor], dict]:
    """The tensors of separate experts, and the changes to the config."""
    parameters = [name for name in ROUTED_EXPERTS if any(name.endswith(x) for x in config["target_parameters"])]
    ranks, alphas = (dict(config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
    rank_of = {name: ranks.pop(name, config["r"]) for name in parameters}
    alpha_of = {name: alphas.pop(name, config["lora_alpha"]) for name in parameters}
    made = {}
    for name, tensor in tensors.items():
        experts, inner, side = _STACK.fullmatch(name).groups()
        parameter = GATE_UP if inner or parameters == [GATE_UP] else DOWN
        k = rank_of[parameter]
        # [e k in], or [e out k]
        single = tensor.unflatten(0, (-1, k)) if side == "A" else tensor.unflatten(1, (k, -1)).permute(2, 0, 1)
        names = _PROJECTIONS[parameter]
        parts = single.chunk(len(names), dim=1) if side == "B" else [single] * len(names)
        for projection, part in zip(names, parts):
            made |= {f"{experts}.{i}.{projection}.lora_{side}.weight": x.clone() for i, x in enumerate(part)}
    for parameter in parameters:
        pattern = rf"mlp\.experts\.\d+\.({'|'.join(_PROJECTIONS[parameter])})"
        ranks[pattern], alphas[pattern] = rank_of[parameter], alpha_of[parameter]
    modules = {name for parameter in parameters for name in _PROJECTIONS[parameter]}
    changes = {"target_modules": sorted({*config["target_modules"], *modules}), "target_parameters": None}
    return made, changes | {"rank_pattern": ranks, "alpha_pattern": alphas}
