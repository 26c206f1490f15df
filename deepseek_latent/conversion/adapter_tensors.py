"""The tensors of LoRA on routed experts, separate or stacked, and how one form becomes the other without losing a bit.

Letters: e experts of a layer, k rank, d model width, f width of an expert.

Separate, each projection of an expert has A [k in] and B [out k]. Stacked, all experts of a layer have one A and one B
per stacked weight: A [e k, in] is ordered by expert, B [out, k e] by rank. Here both are [e k in] and [e out k].
"""

import re
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ..experts.names import PROJECTIONS, STACKED, stacked_name
from .adapter_targets import Settings

PREFIX = "base_model.model."
GATE_UP, DOWN = STACKED
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBER = "(?:0|[1-9][0-9]{0,5})"
_EXPERTS = rf"{re.escape(PREFIX)}((?:.+\.)?layers\.{_NUMBER}\.mlp\.experts)"
_SEPARATE = re.compile(rf"{_EXPERTS}\.({_NUMBER})\.(gate_proj|up_proj|down_proj)\.lora_([AB])\.weight")
# peft nests two wrappers: the inner one, `base_layer`, is that of gate_up_proj
_STACKED = re.compile(rf"{_EXPERTS}\.(base_layer\.)?lora_([AB])\.weight")


class Factors(NamedTuple):
    """LoRA on one projection, or on one stacked weight, of all experts of a layer.

    a  [e k in]
    b  [e out k]
    """

    a: Tensor
    b: Tensor


# by the module of a layer's experts, such as model.layers.1.mlp.experts, then by projection or by stacked weight
Layers = dict[str, dict[str, Factors]]


def find_experts(names: list[str]) -> tuple[dict[str, tuple], bool]:
    """The tensors of routed experts among `names`, each with the parts of its name, and whether they are separate.

    Raises:
        ValueError: for none, for both forms at once, and for a tensor of experts that is neither.
    """
    inside = [name for name in names if ".mlp.experts." in name]
    separate = {name: found.groups() for name in inside if (found := _SEPARATE.fullmatch(name))}
    stacked = {name: found.groups() for name in inside if (found := _STACKED.fullmatch(name))}
    if unknown := [name for name in inside if name not in separate and name not in stacked]:
        raise ValueError(f"expected A and B of plain LoRA on routed experts, got the tensor {unknown[0]:.200}.")
    if not inside or (separate and stacked):
        raise ValueError(f"expected routed experts, separate or stacked, got {'both' if inside else 'none'}.")
    return (separate, True) if separate else (stacked, False)


def read_separate(tensors: dict[str, Tensor], found: dict[str, tuple], settings: Settings) -> Layers:
    """Raises ValueError unless these are A and B of what `settings` names, for the same number of experts."""
    e = 1 + max(int(expert) for _, expert, *_ in found.values())
    names = {parts: name for name, parts in found.items()}
    layers: Layers = {}
    for experts, by_name in settings.items():
        layers[experts] = {}
        for projection, setting in ((x, setting) for name, setting in by_name.items() for x in PROJECTIONS[name]):
            a, b = ([names.pop((experts, str(i), projection, side), None) for i in range(e)] for side in "AB")
            if None in a or None in b:
                raise ValueError(
                    f"expected A and B of {projection} for all experts in every layer, 0 to {e - 1}, and {experts} "
                    "lacks some."
                )
            a, b = ([tensors[name] for name in side] for side in (a, b))
            kinds = {(*x.shape, x.dtype, *y.shape, y.dtype) for x, y in zip(a, b)}
            is_pair = a[0].dim() == b[0].dim() == 2 and a[0].shape[0] == b[0].shape[1] == setting.rank
            if len(kinds) > 1 or not is_pair:
                raise ValueError(
                    f"expected A [k in] and B [out k] of one shape and dtype for all experts of {experts}, where the "
                    f"rank k is {setting.rank} by the config, got {[*a[0].shape]} and {[*b[0].shape]} of {projection}"
                    + (", and others." if len(kinds) > 1 else ".")
                )
            layers[experts][projection] = Factors(torch.stack(a), torch.stack(b))
    _check_all_named(names.values())
    _check_layers(layers)
    return layers


def read_stacked(tensors: dict[str, Tensor], found: dict[str, tuple], settings: Settings) -> Layers:
    """Raises ValueError unless these are A and B of what `settings` names, for the same number of experts."""
    names = {parts: name for name, parts in found.items()}
    layers: Layers = {}
    for experts, by_name in settings.items():
        layers[experts] = {}
        for name, (k, _) in by_name.items():
            inner = _inner(name, by_name) or None
            a, b = (names.pop((experts, inner, side), None) for side in "AB")
            if a is None or b is None:
                raise ValueError(f"expected A and B of {experts}.{name}, since the config names it.")
            a, b = tensors[a], tensors[b]
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] % k:
                raise ValueError(
                    f"expected A [e k, in] and B [out, k e] of {experts}.{name}, where the rank k is {k} by the "
                    f"config, got {[*a.shape]} and {[*b.shape]}."
                )
            layers[experts][name] = Factors(a.unflatten(0, (-1, k)), b.unflatten(1, (k, -1)).permute(2, 0, 1))
    _check_all_named(names.values())
    _check_layers(layers)
    return layers


def _check_all_named(others: Collection[str]) -> None:
    if others:
        raise ValueError(f"expected no tensors of experts that the config does not name, got {min(others)}.")


def _check_layers(layers: Layers) -> None:
    """Refuses tensors that are not floats, and layers that differ in the number, the widths or the dtype of experts."""
    kinds = set()
    for by_name in layers.values():
        for name, (a, b) in by_name.items():
            into, out = a.shape[2], b.shape[1] / 2 if name == GATE_UP else b.shape[1]
            d, f = (out, into) if name == DOWN else (into, out)
            kinds.add((len(a), d, f, a.dtype, b.dtype))
    first = next(iter(kinds))
    if len(kinds) > 1 or 0 in first or first[2] % 1 or not {*first[3:]} <= {*_FLOATS}:
        shown = "; ".join(f"{e} experts, {d} by {f:g}, {a} and {b}" for e, d, f, a, b in sorted(kinds, key=str)[:2])
        raise ValueError(f"expected as many experts, of the same widths and float dtype, in all layers, got {shown}.")


def ranks_of(layers: Layers) -> dict[str, dict[str, int]]:
    """The ranks of separate or stacked layers, by layer and stacked weight."""
    return {
        experts: {stacked_name(name) if name not in STACKED else name: a.shape[1] for name, (a, _) in by_name.items()}
        for experts, by_name in layers.items()
    }


def _inner(name: str, names: dict) -> str:
    return "base_layer." if name == GATE_UP and DOWN in names else ""


def write_separate(layers: Layers) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{experts}.{i}.{projection}.lora_{side}.weight": matrix.clone()
        for experts, by_name in layers.items()
        for projection, factors in by_name.items()
        for side, matrices in zip("AB", factors)
        for i, matrix in enumerate(matrices)
    }


def write_stacked(layers: Layers) -> dict[str, Tensor]:
    made = {}
    for experts, by_name in layers.items():
        for name, (a, b) in by_name.items():
            place = f"{PREFIX}{experts}.{_inner(name, by_name)}"
            made[f"{place}lora_A.weight"] = a.flatten(0, 1)
            made[f"{place}lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
    return made


def stack_layers(layers: Layers) -> Layers:
    """Stacked layers from separate ones; in each, gate and up have one rank."""
    with_both = [layer for layer in layers.values() if "gate_proj" in layer]
    both = iter(_stack(*([layer[projection] for layer in with_both] for projection in PROJECTIONS[GATE_UP])))
    return {
        experts: ({GATE_UP: next(both)} if "gate_proj" in layer else {})
        | ({DOWN: layer[DOWN]} if DOWN in layer else {})
        for experts, layer in layers.items()
    }


def separate_layers(layers: Layers) -> Layers:
    """The inverse of `stack_layers`."""
    halves = zip(*_separate([layer[GATE_UP] for layer in layers.values() if GATE_UP in layer]))
    made: Layers = {}
    for experts, layer in layers.items():
        made[experts] = dict(zip(PROJECTIONS[GATE_UP], next(halves))) if GATE_UP in layer else {}
        made[experts] |= {DOWN: layer[DOWN]} if DOWN in layer else {}
    return made


# ---- Gate and up -----------------------------------------------------------------------------------------------------
# A stacked pair whose B is block-diagonal in all layers is cut: gate and up get half of the rank. Any other is shared:
# gate and up get all of A and their rows of B. `_stack` does the opposite of what `_separate` would do with its
# result, so each inverts the other bit for bit.


def _separate(stacked: list[Factors]) -> tuple[list[Factors], list[Factors]]:
    """Gate and up of each layer from their stacked weight."""
    return _cut(stacked) or _share(stacked)


def _stack(gates: list[Factors], ups: list[Factors]) -> list[Factors]:
    """The inverse of `_separate`. In each layer, gate and up have one rank."""
    if _is_shared(gates, ups):
        return [Factors(gate.a, torch.cat([gate.b, up.b], dim=1)) for gate, up in zip(gates, ups)]
    return [
        Factors(
            torch.cat([gate.a, up.a], dim=1),
            torch.stack([torch.block_diag(*blocks) for blocks in zip(gate.b, up.b)]),
        )
        for gate, up in zip(gates, ups)
    ]


def _share(stacked: list[Factors]) -> tuple[list[Factors], list[Factors]]:
    halves = [b.chunk(2, dim=1) for _, b in stacked]
    return tuple([Factors(a, half[i]) for (a, _), half in zip(stacked, halves)] for i in (0, 1))


def _cut(stacked: list[Factors]) -> tuple[list[Factors], list[Factors]] | None:
    """Gate and up with half of the rank, or None unless they have A and B of their own in every layer."""
    if not stacked or any(a.shape[1] % 2 for a, _ in stacked):
        return None
    blocks = [[half.chunk(2, dim=2) for half in b.chunk(2, dim=1)] for _, b in stacked]
    if any(_has_bits(of_gate[1]) or _has_bits(of_up[0]) for of_gate, of_up in blocks):
        return None
    halves = [a.chunk(2, dim=1) for a, _ in stacked]
    gates, ups = ([Factors(a[i], b[i][i]) for a, b in zip(halves, blocks)] for i in (0, 1))
    return None if _is_shared(gates, ups) else (gates, ups)


def _is_shared(gates: list[Factors], ups: list[Factors]) -> bool:
    """Whether `_separate` makes such a gate and up of a stacked pair without cutting it."""
    if not all(_equal_bits(gate.a, up.a) for gate, up in zip(gates, ups)):
        return False
    return _cut([Factors(gate.a, torch.cat([gate.b, up.b], dim=1)) for gate, up in zip(gates, ups)]) is None


def _equal_bits(x: Tensor, y: Tensor) -> bool:
    # NaN equals itself here, and 0 differs from -0
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def _has_bits(x: Tensor) -> bool:
    return bool(x.contiguous().view(torch.uint8).any())
