"""A dense DeepSeek-V2 as DeepSeekMoE: its SwiGLUs are cut into experts, exactly.

Letters: d model width, e routed experts, f width of one expert, k experts per token.

A SwiGLU is a sum over its neurons, so any partition into experts is exact, and neurons of zeros can be added. Routed
experts are weighted by a softmax, which gives 1/e to each if the router is zero; `routed_scaling_factor` compensates
for that. Top-k among equal weights is arbitrary, so the result is exact only if all choices give the same sum: all
experts are chosen, or all are equal, or whole groups are chosen and each group is the complete MLP.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .target import Piece

WIDTH_MULTIPLE = 8
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class ExpertLayout(NamedTuple):
    """Which neurons of a dense MLP each expert holds, and the config fields that make the sum equal to that MLP."""

    f: int
    part_of_expert: list[int | None]  # per routed expert, which of the equal parts of the neurons it holds; None: all
    down_scale: float  # factor on down_proj of routed experts
    config: dict


def expert_layout(scheme: str, dense_width: int, *, e: int, shared: int, k: int, groups: int) -> ExpertLayout:
    """The layout of a scheme for an MLP of `dense_width` neurons.

    M0  The shared experts are the MLP. Routed experts add nothing before training.
    M1  Each expert is a part of the MLP, and all experts are chosen.
    M2  Each expert is the whole MLP.
    M3  Each group is the whole MLP, cut into its experts, and whole groups are chosen.
    M4  M3 with gate weights normalized to 1 and a random router that is equal within a group.
    M5  M3 for the neurons that are not in the shared experts.

    Raises ValueError for numbers that do not fit the scheme.
    """
    if e < 1:
        raise ValueError(f"expected --routed-experts of at least 1, got {e}.")
    gating = {"norm_topk_prob": scheme == "M4"}
    is_grouped = scheme in ("M3", "M4", "M5")
    if (shared > 0) != (scheme in ("M0", "M5")):
        wanted, what_to_do = ("at least one", "add") if shared == 0 else ("no", "leave out")
        raise ValueError(f"scheme {scheme} has {wanted} shared expert, got {shared}; {what_to_do} --shared-experts.")
    if is_grouped and (groups < 1 or e % groups or k % (e // groups) or k > e):
        raise ValueError(
            f"scheme {scheme} chooses whole groups: expected {e} routed experts in equal groups and a top-k that is a "
            f"multiple of their size, got {groups} groups and a top-k of {k}; change --groups or --top-k."
        )
    if not is_grouped and groups != 1:
        raise ValueError(f"scheme {scheme} has no groups, got {groups}; leave out --groups.")
    if not 1 <= k <= e or (scheme == "M1" and k != e):
        raise ValueError(f"expected a top-k of {e if scheme == 'M1' else f'1 to {e}'}, got {k}; change --top-k.")
    parts = e // groups
    part_of_expert = [i % parts for i in range(e)]
    if scheme == "M0":
        part_of_expert = [i % shared for i in range(e)]
        width, down_scale, scaling = dense_width / shared, 0.0, 1.0
    elif scheme == "M1":
        width, down_scale, scaling = dense_width / e, 1.0, float(e)
    elif scheme == "M2":
        part_of_expert = [None] * e
        width, down_scale, scaling = dense_width, 1.0, e / k
    else:
        gating |= {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": k // parts}
        width, down_scale, scaling = dense_width / (shared + parts), 1.0, e / (k // parts)
        # normalized gate weights are not scaled: each expert of a group gets 1 / parts of the group's weight
        if scheme == "M4":
            down_scale, scaling = float(parts), 1.0
    return ExpertLayout(_padded_width(width), part_of_expert, down_scale, gating | {"routed_scaling_factor": scaling})


def _padded_width(neurons: float) -> int:
    """The next multiple of WIDTH_MULTIPLE, which torch's grouped matrix products require of rows in any dtype."""
    return math.ceil(neurons / WIDTH_MULTIPLE) * WIDTH_MULTIPLE


class Upcycle:
    """The dense result of another conversion, `base`, with experts from layer `dense_layers` on: `config` and `pieces`.

    The router is zero, or random under M0 and M4, where its values do not matter. Two options make equal experts
    differ, which changes the logits except under M0. `router_noise` is the standard deviation of noise on the router.
    `reinitialized` is the fraction of each routed expert's neurons that are drawn again, with the mean and standard
    deviation of that expert (Drop-Upcycling, arXiv:2502.19261).

    Raises ValueError if the result of `base` has experts, or as `expert_layout` does.
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
                f"expected router noise of 0 or more and a fraction of neurons from 0 to 1, got {router_noise} and "
                f"{reinitialized}."
            )
        self.base, self.scheme, self.e, self.shared, self.groups = base, scheme, e, shared, groups
        self.router_noise, self.reinitialized = router_noise, reinitialized
        self._cached_weight: tuple[Piece, Tensor] | None = None
        config = base.config
        layers = config.num_hidden_layers
        if config.moe_layers:
            raise ValueError("expected a dense source, got one with experts; upcycle the model it was made from.")
        if not 0 <= dense_layers < layers:
            raise ValueError(f"expected 0 to {layers - 1} layers that stay dense, got {dense_layers}.")
        self.dense_layers = dense_layers
        self.layout = expert_layout(scheme, config.intermediate_size, e=e, shared=shared, k=k, groups=groups)
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
    def zero_fraction(self) -> float:
        """The fraction of neurons that are zeros, because parts have the same width, a multiple of WIDTH_MULTIPLE."""
        routed = 0 if self.scheme == "M0" else len(set(self.layout.part_of_expert))
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
            dense = functools.partial(self._dense_weight, piece)
            if self.shared:
                name = f"{prefix}shared_experts.{projection}.weight"
                made.append(_expert_piece(name, dense, 0, self.shared * f, d, dtype))
            for i, part in enumerate(self.layout.part_of_expert):
                name = f"{prefix}experts.{i}.{projection}.weight"
                # M0 cuts the neurons of the shared experts, M5 the neurons after them
                first = 0 if part is None else (part + (self.shared if self.scheme == "M5" else 0)) * f
                scale = self.layout.down_scale if projection == "down_proj" else 1.0
                redraw = functools.partial(self._redraw, layer, i, projection) if self.reinitialized else None
                made.append(_expert_piece(name, dense, first, f, d, dtype, scale, redraw))
        return made

    def _dense_weight(self, piece: Piece) -> Tensor:
        """The matrix from which experts are cut, cached for the next expert."""
        if self._cached_weight is None or self._cached_weight[0] is not piece:
            self._cached_weight = (piece, piece.make())
        return self._cached_weight[1]

    def _router(self, layer: int, d: int) -> Tensor:
        generator = torch.Generator().manual_seed(layer)
        router = torch.zeros(self.e, d)
        if self.scheme in ("M0", "M4"):
            rows = self.groups if self.scheme == "M4" else self.e
            router = torch.randn(rows, d, generator=generator) * self.config.initializer_range
            router = router.repeat_interleave(self.e // rows, dim=0)
        return router + torch.randn(self.e, d, generator=generator) * self.router_noise

    def _redraw(self, layer: int, expert: int, projection: str, part: Tensor) -> None:
        """Draws a fraction of an expert's neurons [f d] again in place, the same ones in all three projections."""
        generator = torch.Generator().manual_seed(layer * self.e + expert)
        chosen = torch.randperm(len(part), generator=generator)[: round(self.reinitialized * len(part))]
        generator.manual_seed((layer * self.e + expert) * len(_PROJECTIONS) + _PROJECTIONS.index(projection))
        noise = torch.randn(len(chosen), part.shape[1], generator=generator)
        part[chosen] = (noise * part.float().std() + part.float().mean()).to(part.dtype)


def _expert_piece(
    name: str, dense, first: int, width: int, d: int, dtype: torch.dtype, scale: float = 1.0, redraw=None
) -> Piece:
    """Neurons from `first` to `first + width` of a dense projection, padded with zeros."""
    is_down = name.endswith("down_proj.weight")

    def make() -> Tensor:
        neurons = dense().T if is_down else dense()
        part = torch.zeros(width, d, dtype=dtype)
        selected = neurons[first : first + width]
        part[: len(selected)] = selected
        if redraw is not None and len(selected):
            redraw(part[: len(selected)])
        part *= scale
        return part.T.contiguous() if is_down else part

    return Piece(name, (d, width) if is_down else (width, d), dtype, make)
