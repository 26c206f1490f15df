"""A dense DeepSeek-V2 as DeepSeekMoE: its SwiGLUs cut into experts, exactly.

Letters: d model width, e routed experts, f width of one expert, k experts per token.

A SwiGLU is a sum over its neurons, so any way of cutting it into parts is exact, and neurons of zeros may be added.
Routed experts count with their share of a softmax: 1/e each where the router is zero, which `routed_scaling_factor`
makes up for. Which k of equal shares are taken is anybody's guess, unless whole groups are, each of them complete.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .target import Piece

SCHEMES = ("M0", "M1", "M2", "M3", "M4", "M5")
MULTIPLE = 8
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Layout(NamedTuple):
    """How the neurons of a dense MLP lie in experts, and what the config says so that their sum is that MLP."""

    f: int
    shards: list[int | None]  # per routed expert, the part of the dense MLP behind the shared ones; None: all parts
    down_scale: float
    config: dict


def layout(scheme: str, dense_width: int, *, e: int, shared: int, k: int, groups: int) -> Layout:
    """The scheme for an MLP of `dense_width` neurons, with e routed and some shared experts, k per token, in groups.

    M0  the shared experts are the MLP; routed ones add nothing yet
    M1  every expert a part, all of them taken
    M2  every expert the whole MLP
    M3  every group the whole MLP in parts, whole groups taken
    M4  M3 with shares that are normalised to one, under a router that knows groups only
    M5  M3 for the neurons that the shared experts leave over

    Raises ValueError for numbers that the scheme cannot be made of.
    """
    if e < 1:
        raise ValueError(f"expected at least one routed expert, got {e}.")
    shares = {"norm_topk_prob": scheme == "M4"}
    grouped = scheme in ("M3", "M4", "M5")
    if (shared > 0) != (scheme in ("M0", "M5")):
        raise ValueError(f"scheme {scheme} has {'at least one' if shared == 0 else 'no'} shared expert, got {shared}.")
    if grouped and (groups < 1 or e % groups or k % (e // groups) or k > e):
        raise ValueError(
            f"scheme {scheme} takes whole groups: expected {e} routed experts in equal groups and a top-k of some of "
            f"these, got {groups} groups and a top-k of {k}."
        )
    if not grouped and groups != 1:
        raise ValueError(f"scheme {scheme} has no groups, got {groups}.")
    if not 1 <= k <= e or (scheme == "M1" and k != e):
        raise ValueError(f"expected a top-k of {e if scheme == 'M1' else f'1 to {e}'}, got {k}.")
    if scheme == "M0":
        return Layout(
            _width(dense_width / shared), [i % shared for i in range(e)], 0.0, shares | {"routed_scaling_factor": 1.0}
        )
    if scheme == "M1":
        return Layout(_width(dense_width / e), list(range(e)), 1.0, shares | {"routed_scaling_factor": float(e)})
    if scheme == "M2":
        return Layout(_width(dense_width), [None] * e, 1.0, shares | {"routed_scaling_factor": e / k})
    parts = e // groups
    shards = [i % parts for i in range(e)]
    routed = shares | {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": k // parts}
    # normalised shares are not scaled: a group's come to 1 / parts of its weight
    if scheme == "M4":
        return Layout(_width(dense_width / parts), shards, float(parts), routed | {"routed_scaling_factor": 1.0})
    return Layout(
        _width(dense_width / (shared + parts)), shards, 1.0, routed | {"routed_scaling_factor": e / (k // parts)}
    )


def _width(neurons: float) -> int:
    """At least so many, in a multiple that torch's grouped products ask of a row in any dtype."""
    return math.ceil(neurons / MULTIPLE) * MULTIPLE


class Upcycle:
    """The conversion `base`, whose result is dense, with experts from layer `dense_layers` on: `config` and `pieces`.

    The router is zero, or under M0 and M4, where it may be anything, random. `router_noise`, a standard deviation, and
    `reinitialized`, the share of a routed expert's neurons that are drawn anew with the mean and spread of its
    own (Drop-Upcycling, arXiv:2502.19261), part experts that would be alike; but for M0 they change what is said.

    Raises:
        ValueError: where the result of `base` has experts already, or as `layout`.
    """

    def __init__(
        self,
        base,
        scheme: str,
        *,
        e: int,
        shared: int,
        k: int,
        groups: int,
        dense_layers: int = 1,
        router_noise: float = 0.0,
        reinitialized: float = 0.0,
    ):
        if not (0 <= router_noise < math.inf and 0 <= reinitialized <= 1):
            raise ValueError(
                f"expected router noise of 0 or more and a share of neurons from 0 to 1, got {router_noise} and "
                f"{reinitialized}."
            )
        self.base, self.scheme, self.e, self.shared, self.groups = base, scheme, e, shared, groups
        self.router_noise, self.reinitialized = router_noise, reinitialized
        self._last: tuple[Piece, Tensor] | None = None
        config = base.config
        layers = config.num_hidden_layers
        if any(config.is_moe_layer(i) for i in range(layers)):
            raise ValueError("expected a dense source, got one with experts; upcycle what it was made of.")
        if not 0 <= dense_layers < layers:
            raise ValueError(f"expected 0 to {layers - 1} layers that stay dense, got {dense_layers}.")
        self.dense_layers = dense_layers
        self.layout = layout(scheme, config.intermediate_size, e=e, shared=shared, k=k, groups=groups)
        self.config = type(config).from_dict(
            config.to_dict()
            | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
            | self.layout.config
            | {
                "n_routed_experts": e,
                "n_shared_experts": shared or None,
                "num_experts_per_tok": k,
                "moe_intermediate_size": self.layout.f,
                "first_k_dense_replace": dense_layers,
                "moe_layer_freq": 1,
            }
        )

    @property
    def filled(self) -> float:
        """Share of an MLP's neurons that are zeros, because parts have to be alike and a multiple of MULTIPLE wide."""
        routed = 0 if self.scheme == "M0" else len(set(self.layout.shards))
        parts = routed + (self.shared if self.scheme in ("M0", "M5") else 0)
        return 1 - self.base.config.intermediate_size / (parts * self.layout.f)

    @property
    def is_exact(self) -> bool:
        return self.scheme == "M0" or not (self.router_noise or self.reinitialized)

    def pieces(self) -> list[Piece]:
        dense = {piece.name: piece for piece in self.base.pieces()}
        pieces = []
        for name, piece in dense.items():
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
            if layer < self.dense_layers or ".mlp." not in name:
                pieces.append(piece)
            elif name.endswith("mlp.gate_proj.weight"):
                mlp = {projection: dense[name.replace("gate_proj", projection)] for projection in _PROJECTIONS}
                pieces += self._experts(layer, mlp)
        return pieces

    def _experts(self, layer: int, mlp: dict[str, Piece]) -> list[Piece]:
        prefix, f, (_, d) = f"model.layers.{layer}.mlp.", self.layout.f, mlp["gate_proj"].shape
        dtype = mlp["gate_proj"].dtype
        made = [Piece(f"{prefix}gate.weight", (self.e, d), dtype, lambda: self._router(layer, d).to(dtype))]
        for projection, piece in mlp.items():
            dense = functools.partial(self._whole, piece)
            if self.shared:
                made.append(_part(f"{prefix}shared_experts.{projection}.weight", dense, 0, self.shared * f, d, dtype))
            for i, shard in enumerate(self.layout.shards):
                name = f"{prefix}experts.{i}.{projection}.weight"
                # M0 cuts the shared experts themselves, M5 what lies behind them
                first = 0 if shard is None else (shard + (self.shared if self.scheme == "M5" else 0)) * f
                scale = self.layout.down_scale if projection == "down_proj" else 1.0
                redraw = functools.partial(self._redraw, layer, i, projection) if self.reinitialized else None
                made.append(_part(name, dense, first, f, d, dtype, scale, redraw))
        return made

    def _whole(self, piece: Piece) -> Tensor:
        """The dense matrix from which experts are cut one after the other; the last one is kept."""
        if self._last is None or self._last[0] is not piece:
            self._last = (piece, piece.make())
        return self._last[1]

    def _router(self, layer: int, d: int) -> Tensor:
        generator = torch.Generator().manual_seed(layer)
        router = torch.zeros(self.e, d)
        if self.scheme in ("M0", "M4"):
            rows = self.groups if self.scheme == "M4" else self.e
            router = torch.randn(rows, d, generator=generator) * self.config.initializer_range
            router = router.repeat_interleave(self.e // rows, dim=0)
        return router + torch.randn(self.e, d, generator=generator) * self.router_noise

    def _redraw(self, layer: int, expert: int, projection: str, part: Tensor) -> None:
        """Draws a share of an expert's neurons [f d] anew, the same ones in all three projections."""
        generator = torch.Generator().manual_seed(layer * self.e + expert)
        chosen = torch.randperm(len(part), generator=generator)[: round(self.reinitialized * len(part))]
        generator.manual_seed((layer * self.e + expert) * len(_PROJECTIONS) + _PROJECTIONS.index(projection))
        fresh = torch.randn(len(chosen), part.shape[1], generator=generator)
        part[chosen] = (fresh * part.float().std() + part.float().mean()).to(part.dtype)


def _part(
    name: str, dense, first: int, width: int, d: int, dtype: torch.dtype, scale: float = 1.0, redraw=None
) -> Piece:
    """Neurons first to first + width of a dense projection, zeros where there are none, some of them drawn anew."""
    is_down = name.endswith("down_proj.weight")

    def make() -> Tensor:
        neurons = dense().T if is_down else dense()
        part = torch.zeros(width, d, dtype=dtype)
        some = neurons[first : first + width]
        part[: len(some)] = some
        if redraw is not None and len(some):
            redraw(part[: len(some)])
        part *= scale
        return part.T.contiguous() if is_down else part

    return Piece(name, (d, width) if is_down else (width, d), dtype, make)
