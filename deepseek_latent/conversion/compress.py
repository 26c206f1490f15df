"""GQA as latent attention with a smaller cache: some keys keep their rotation, the rest goes into a latent with values.

Letters: d model width, h query heads, g key heads, w width of a source head, p = w/2 its frequencies, r rotary width,
c KV latent width, y = 2 g w what keys and values are together, x the input of a layer and a one behind it.

A pair of key elements is one complex number z, turned by e^{i t f} at position t. The g heads of one frequency f turn
alike, so any invertible mixture of them may turn in their place, if queries are mixed by its inverse: exact. What is
not:

1. Only r/2 mixtures keep their rotation. In all others e^{-i D f}, for a distance D, becomes its mean over the
   distances at which a head looks: nearly itself for a slow frequency, nearly zero for a fast one.
2. These, with the values, become a latent of c - 1 principal components; one channel is the constant of `gqa_to_mla`.

Both steps minimise one number, what attention's output moves by, to first order: an error in a score counts by the
spread of the values it chooses among, an error in a value by `o_proj`. Source of the idea: TransMLA (arXiv:2502.07864),
whose real rotations, even choice of frequencies and balance of norms are replaced.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .calibration import LayerStatistics
from .gqa_to_mla import (
    LATENT_EPS,
    GqaToMla,
    carried,
    carrying_weight,
    frequencies_of,
    interleaved,
    rope_table,
    undoing_norm,
)
from .llama_source import LlamaSource
from .source import Source

# of the largest: directions that carry less are noise
NEGLIGIBLE = 1e-12
# of a mean variance, added to all inputs: what the text does not show is little, and not nothing
UNSEEN = 1e-8


class Parts(NamedTuple):
    """One layer in float64: what its keys and values are as functions of x, and what an error in them costs."""

    keys: Tensor  # [p g d+1] complex
    second: Tensor  # [p g g] complex: second moments of the heads of a frequency
    values: Tensor  # [g w d+1]
    means: Tensor  # [h p] complex: of the rotation over the distances of a head, length factor included
    score_costs: Tensor  # [h p] of a squared error of a key element, by way of a score
    value_costs: Tensor  # [g w w] of an error of a value, a quadratic form
    moments: Tensor  # [d+1 d+1]


class Layer(NamedTuple):
    """What becomes of a layer: functions of x, and back from the latent; its last channel is to be the constant 1."""

    rotary_keys: Tensor  # [r/2 d+1] complex
    query_mix: Tensor  # [g p r/2] complex, by which a query of a head is multiplied
    latent: Tensor  # [c-1 d+1]
    keys: Tensor  # [p g c] complex
    values: Tensor  # [g w c]
    means: Tensor  # [h p] complex


class CompressedMla(GqaToMla):
    """A Llama, Mistral or Qwen2 checkpoint as DeepSeek-V2 with latents of width c and rotary keys of width r.

    Without `c`, the latent is as wide as it takes to lose nothing: only the first step. `kept` is what `chosen` gives.

    Raises:
        ValueError: as `GqaToMla`, and for widths that are none or no less than what is exact.
    """

    def __init__(
        self,
        files: Source,
        statistics: list[LayerStatistics],
        *,
        r: int,
        c: int | None = None,
        kept: Tensor | None = None,
    ):
        super().__init__(files)
        self.n, self.r, self.c = self.w, r, widths(self.source, r, c)
        self.query_scale = math.sqrt((self.n + self.r) / self.w)
        self.statistics = statistics
        self.frequencies, self.length_factor = frequencies_of(self.source.config, self.w)
        self.kept = self.chosen() if kept is None else kept
        self._made: tuple[int, Layer] | None = None

    def rope(self) -> dict:
        table = self.frequencies.repeat_interleave(self.kept)
        return rope_table(self.source.config, table, self.length_factor)

    def chosen(self) -> Tensor:
        """[p]: of how many mixtures each frequency keeps its rotation, r/2 in all and the same in every layer."""
        losses = torch.stack([self.losses(self.parts(layer)) for layer in range(len(self.statistics))]).sum(dim=0)
        # mixtures of a frequency come with the dearest first, so the dearest of all are the first of each
        dearest = losses.flatten().topk(self.r // 2).indices
        return torch.bincount(dearest // self.g, minlength=self.w // 2)

    def losses(self, parts: Parts) -> Tensor:
        """[p g]: what is lost where a mixture's rotation is replaced by its mean, the dearest first."""
        mixtures = [self.mixture(parts, frequency)[1] for frequency in range(self.w // 2)]
        return torch.stack(mixtures)

    # one layer

    def parts(self, layer: int) -> Parts:
        source, statistics = self.source, self.statistics[layer]
        variance = statistics.moments[:-1, :-1].diagonal().mean()
        moments = statistics.moments.clone()
        moments[:-1, :-1].diagonal().add_(UNSEEN * variance)

        def affine(name: str) -> Tensor:
            return torch.cat((source.weight(layer, name), source.bias(layer, name)[:, None]), dim=1).double()

        queries, keys, values = (affine(name) for name in ("q_proj", "k_proj", "v_proj"))
        queries, keys = (_as_complex(x.unflatten(0, (-1, self.w))) for x in (queries, keys))  # [p heads d+1]
        values = values.unflatten(0, (self.g, self.w))
        distance = torch.arange(statistics.distances.shape[1], dtype=torch.float64)
        turns = torch.exp(-1j * distance[:, None] * self.frequencies)
        means = statistics.distances.to(turns.dtype) @ turns / statistics.distances.sum(dim=1, keepdim=True)
        # what a head writes into the residual stream moves by the spread of its values
        out = source.weight(layer, "o_proj").double().unflatten(1, (self.h, self.w)).permute(1, 0, 2)  # [h d w]
        of_head = torch.arange(self.h) // (self.h // self.g)
        forms = out.transpose(1, 2) @ out
        spread = (forms * _covariance(values, moments)[of_head]).sum(dim=(1, 2))
        sizes = _second_moments(queries[:, :, None], moments)[..., 0, 0].real.T
        # half of it: a score is the real part of a product
        score_costs = 0.5 / self.w * self.length_factor**4 * spread[:, None] * sizes
        value_costs = forms.unflatten(0, (self.g, -1)).sum(dim=1)
        second = _second_moments(keys, moments)
        return Parts(keys, second, values, means * self.length_factor**2, score_costs, value_costs, moments)

    def mixture(self, parts: Parts, frequency: int) -> tuple[Tensor, Tensor]:
        """T [g g] complex, whose rows mix the heads of a frequency, and what each row's rotation is worth [g].

        Principal components of the heads, each weighed by what it costs when its rotation is replaced.
        """
        replaced = 1 - (parts.means[:, frequency].abs() / self.length_factor**2) ** 2
        weights = (parts.score_costs[:, frequency] * replaced).unflatten(0, (self.g, -1)).sum(dim=1).sqrt()
        weights = weights.clamp(min=weights.max() * 1e-6 + torch.finfo(torch.float64).tiny)
        values, vectors = torch.linalg.eigh(weights[:, None] * parts.second[frequency] * weights)
        # the scale of a row is free
        return vectors.flip(1).mH * (weights / weights.mean()), values.flip(0).clamp(min=0)

    def compressed(self, layer: int) -> Layer:
        """The last one is kept, since several tensors are made of it."""
        if self._made is None or self._made[0] != layer:
            self._made = (layer, self._compressed(self.parts(layer)))
        return self._made[1]

    def _compressed(self, parts: Parts) -> Layer:
        rotary, mixes, left = [], [], []
        for frequency, kept in enumerate(self.kept.tolist()):
            mix, _ = self.mixture(parts, frequency)
            back = torch.linalg.inv(mix)
            rotary.append(mix[:kept] @ parts.keys[frequency])
            mixes.append(back[:, :kept].conj())
            left.append(parts.keys[frequency] - back[:, :kept] @ rotary[-1])
        query_mix = torch.zeros(self.g, self.w // 2, self.r // 2, dtype=torch.complex128)
        for frequency, (mix, end) in enumerate(zip(mixes, self.kept.cumsum(0).tolist())):
            query_mix[:, frequency, end - mix.shape[1] : end] = mix
        latent, keys, values = self.latent(parts, torch.stack(left))
        return Layer(torch.cat(rotary), query_mix, latent, keys, values, parts.means)

    def latent(self, parts: Parts, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [p g d+1] without rotation and values, as c - 1 functions of x and what leads back from these.

        Principal components of what is weighed by its cost, around the mean; back goes the best linear guess.
        """
        key_weights, value_weights = self.weights(parts)
        y = torch.cat((keys.real.flatten(0, 1), keys.imag.flatten(0, 1), parts.values.flatten(0, 1)))
        weighed = torch.cat(
            (key_weights[:, None] * y[: len(key_weights)], (value_weights @ parts.values).flatten(0, 1))
        )
        mean = parts.moments[:, -1]
        centred = parts.moments - mean[:, None] * mean
        sizes, directions = torch.linalg.eigh(weighed @ centred @ weighed.T)
        sizes, directions = sizes.flip(0)[: self.c - 1], directions.flip(1)[:, : self.c - 1]
        is_kept = sizes > NEGLIGIBLE * sizes[0].clamp(min=torch.finfo(sizes.dtype).tiny)
        directions, sizes = directions[:, is_kept], sizes[is_kept]
        # an average square of one, so that no dtype is short of range
        scale = (sizes.sum() / (self.c - 1)).rsqrt() if len(sizes) else 1.0
        latent = scale * directions.T @ weighed
        back = y @ centred @ latent.T / (scale**2 * sizes)
        latent[:, -1] -= latent @ mean
        # the rest of the channels is empty
        num_empty = self.c - 1 - len(sizes)
        latent = torch.nn.functional.pad(latent, (0, 0, 0, num_empty))
        back = torch.nn.functional.pad(back, (0, num_empty))
        back = torch.cat((back, (y @ mean)[:, None]), dim=1)
        real, imaginary, values = back.split((keys[..., 0].numel(), keys[..., 0].numel(), self.g * self.w))
        return latent, torch.complex(real, imaginary).unflatten(0, (-1, self.g)), values.unflatten(0, (self.g, -1))

    def weights(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Roots of what errors cost: of key elements [2 p g], real parts first, and of values [g w w]."""
        costs = parts.score_costs * (parts.means.abs() / self.length_factor**2) ** 2
        key_weights = costs.unflatten(0, (self.g, -1)).sum(dim=1).T.flatten().sqrt()
        sizes, directions = torch.linalg.eigh(parts.value_costs)
        return key_weights.repeat(2), directions * sizes.clamp(min=0).sqrt()[:, None, :] @ directions.mT

    # tensors of one layer, in float32, as `GqaToMla` asks for them

    def _placed(self, layer: int, queries: Tensor) -> Tensor:
        """[h w k] to [h(n+r) k]: content as it is, then the mixtures that keep their rotation."""
        pairs = _as_complex(queries.double())  # [p h k]
        of_head = torch.arange(self.h) // (self.h // self.g)
        mixes = self.compressed(layer).query_mix[of_head]
        rotary = interleaved(_as_real(torch.einsum("phk,hpm->mhk", pairs, mixes)))
        return torch.cat((queries, rotary.transpose(0, 1).float()), dim=1).flatten(0, 1)

    def _compress(self, layer: int) -> Tensor:
        return self._functions(layer)[:, :-1]

    def _compress_bias(self, layer: int) -> Tensor:
        bias = self._functions(layer)[:, -1]
        bias[self.c - 1] = self._value_constant(layer)
        return bias

    def _functions(self, layer: int) -> Tensor:
        """[c+r d+1]: the latent, a row for its constant, and the keys that rotate."""
        made = self.compressed(layer)
        constant = made.latent.new_zeros(1, self.d + 1)
        return torch.cat((made.latent, constant, interleaved(_as_real(made.rotary_keys)))).float()

    def _expand(self, layer: int) -> Tensor:
        made, constant = self.compressed(layer), self._value_constant(layer)
        of_head = torch.arange(self.h) // (self.h // self.g)
        keys = _as_real(made.keys[:, of_head] * made.means.T[..., None])
        expand = torch.cat((keys.transpose(0, 1), made.values[of_head]), dim=1)  # [h n+v c]
        expand[..., -1] /= carried(self.c)
        # the constant is any number here, so the norm around it is the identity but for what the dtype rounds
        rounded = self._latent_norm(layer).to(self.source.dtype())[0].double()
        expand[..., :-1] *= math.sqrt(constant**2 / self.c + LATENT_EPS) / rounded
        return expand.flatten(0, 1).float()

    def _latent_norm(self, layer: int) -> Tensor:
        norm = undoing_norm(self.c, self._value_constant(layer))
        norm[-1] = carrying_weight(self.c)
        return norm

    def _value_constant(self, layer: int) -> float:
        weight, bias = self.compressed(layer).latent.split((self.d, 1), dim=1)
        largest = (weight * self.source.input_norm(layer)).norm().item() * math.sqrt(self.d) + bias.norm().item()
        return torch.tensor(self._constant(self.c, largest)).to(self.source.dtype()).item()


def widths(source: LlamaSource, r: int, c: int | None) -> int:
    """The width of the latent, checked with that of the rotary key; without `c`, the one that loses nothing."""
    keys = source.g * source.w
    if r % 2 or not 2 <= r <= keys:
        raise ValueError(f"--qk-rope-head-dim must be even and 2 to {keys}, got {r}.")
    widest = 2 * keys - r + 2
    if c is not None and (c % 2 or not 2 <= c <= widest):
        raise ValueError(f"--kv-lora-rank must be even and 2 to {widest}, which loses nothing, got {c}.")
    return c or widest


def _second_moments(functions: Tensor, moments: Tensor) -> Tensor:
    """[.. g g] of complex functions [.. g d+1] of x; products in real numbers, which takes half as long."""
    products = torch.complex(functions.real @ moments, functions.imag @ moments)
    return products @ functions.mH


def _as_complex(x: Tensor) -> Tensor:
    """[heads w k], halves as Llama turns them, to [w/2 heads k]."""
    return torch.complex(*x.unflatten(1, (2, -1)).unbind(1)).transpose(0, 1)


def _as_real(x: Tensor) -> Tensor:
    """[m ..] to [2m ..]: real parts, then imaginary ones."""
    return torch.cat((x.real, x.imag))


def _covariance(functions: Tensor, moments: Tensor) -> Tensor:
    """[g w w] of functions [g w d+1] of x."""
    centred = moments - moments[:, -1:] * moments[:, -1]
    return functions @ centred @ functions.mT
