"""GQA as latent attention with a smaller cache: a few keys keep their rotation, a latent holds all else.

Letters: d model width, h query heads, g key heads, w width of a source head, p = w/2 its frequencies, r rotary width,
c KV latent width, x [d+1] the input of a layer with a 1 appended.

A pair of key elements is one complex number z, which RoPE multiplies by e^{i t f} at position t. The g heads of one
frequency f rotate alike, so any invertible mixture of them can rotate in their place if the queries are mixed by its
inverse. That is exact. Two steps are not:

1. Only r/2 mixtures keep their rotation. In all others e^{-i D f}, for a distance D, is replaced by its mean over the
   distances at which an error of a score costs most. It is near 1 for a slow frequency and near 0 for a fast one.
2. These keys and the values are predicted from a latent of c - 1 channels (`latent_fit`), in a basis that quantized
   caches hold well (`latent_basis`). The last channel is the constant of `gqa_to_mla`.

Both steps minimize the change of attention's output to first order, with statistics of the tokens that are attended to
(`calibration`). After them, `refine` trains each layer to return what its source returns. Source of the idea: TransMLA
(arXiv:2502.07864), whose real rotations, evenly spaced frequencies and balanced norms are replaced.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .calibration import Calibration, output_forms
from .gqa_to_mla import (
    LATENT_EPS,
    GqaToMla,
    constant_after_norm,
    constant_norm_weight,
    inverse_norm_weight,
)
from .latent_basis import num_unquantized_channels, quantizable_basis
from .latent_fit import equal_costs, fit_latent, make_target, predict
from .llama_source import LlamaSource
from .progress import track
from .rope_table import interleave, rope_frequencies, rope_parameters
from .source import Source

TINY = torch.finfo(torch.float64).tiny


class LayerParts(NamedTuple):
    """A layer of the source in float64: its keys and values as functions of x, and the cost of an error in them."""

    keys: Tensor  # [p g d+1] complex
    key_moments: Tensor  # [p g g] complex: second moments of the heads of a frequency
    values: Tensor  # [g w d+1]
    scales: Tensor  # [p] of scores: the length factor squared, or 1 for what does not rotate
    means: Tensor  # [h p] complex: mean rotation over the distances of a head, times the scale
    score_costs: Tensor  # [h p] cost of a squared error of a key element, through the score
    key_forms: Tensor  # [g w w] cost of an error of a key without rotation, real parts first, a quadratic form
    value_forms: Tensor  # [g w w] cost of an error of a value, a quadratic form


class CompressedLayer(NamedTuple):
    """A compressed layer: rotary keys and latent as functions of x, keys and values as functions of the latent.

    The last of the c channels of the latent is the constant 1.
    """

    rotary_keys: Tensor  # [r/2 d+1] complex
    query_mix: Tensor  # [g p r/2] complex, maps the query of a head to the rotary query
    latent: Tensor  # [c-1 d+1]
    keys: Tensor  # [p g c] complex
    values: Tensor  # [g w c]
    means: Tensor  # [h p] complex


class CompressedMla(GqaToMla):
    """A `LlamaSource` as DeepSeek-V2 with latents of width c and rotary keys of width r.

    Without `c`, the latent is wide enough to be exact, so that only the first step loses something.

    Raises ValueError as `GqaToMla` does, and for widths that `check_widths` refuses.
    """

    def __init__(
        self,
        files: Source,
        statistics: Calibration,
        *,
        r: int,
        c: int | None = None,
    ):
        super().__init__(files)
        self.n, self.r, self.c = self.w, r, check_widths(self.source, r, c)
        self.num_unquantized = num_unquantized_channels(self.c)
        self.query_scale = math.sqrt((self.n + self.r) / self.w)
        self.statistics = statistics
        self.frequencies, self.length_factor = rope_frequencies(self.source.config, self.w)
        self.num_kept = self.choose_num_kept()  # [p]
        self._cached_layer: tuple[int, CompressedLayer] | None = None

    def rope_parameters(self) -> dict:
        frequencies = self.frequencies.repeat_interleave(self.num_kept)
        return rope_parameters(self.source.config, frequencies, self.length_factor)

    def choose_num_kept(self) -> Tensor:
        """[p]: how many mixtures of each frequency keep their rotation: r/2 in all, the same in every layer."""
        layers = track(range(len(self.statistics)), "choosing rotations")
        losses = torch.stack([self.rotation_losses(self.read_parts(layer)) for layer in layers]).sum(dim=0)
        # what does not rotate in the source must not be chosen, even if nothing else loses anything
        losses[self.frequencies == 0] = -1
        # losses of a frequency are sorted, so the largest losses of all are the first ones of each frequency
        largest = losses.flatten().topk(self.r // 2).indices
        return torch.bincount(largest // self.g, minlength=self.w // 2)

    def rotation_losses(self, parts: LayerParts) -> Tensor:
        """[p g]: the loss from replacing a mixture's rotation by its mean, the largest of a frequency first."""
        return torch.stack([self.mix_heads(parts, frequency)[1] for frequency in range(self.w // 2)])

    # one layer

    def read_parts(self, layer: int) -> LayerParts:
        source, statistics = self.source, self.statistics[layer]
        keys, values = (source.affine(layer, name) for name in ("k_proj", "v_proj"))
        keys = _as_complex(keys.unflatten(0, (-1, self.w)))  # [p g d+1]
        frequencies = self.frequencies if source.has_rope(layer) else torch.zeros_like(self.frequencies)
        scales = torch.where(frequencies == 0, 1.0, self.length_factor**2)
        distances = statistics.distances
        rotations = torch.exp(-1j * torch.arange(distances.shape[1])[:, None] * frequencies)
        means = distances.to(rotations.dtype) @ rotations / distances.sum(dim=1, keepdim=True).clamp(min=TINY)
        means = means * scales
        # the factor 0.5: a score is the real part of a complex product
        query_forms = statistics.query_moments / self.w
        query_sizes = query_forms.diagonal(dim1=1, dim2=2).unflatten(1, (2, -1)).sum(dim=1)
        rotated = _as_matrix(means)
        key_forms = (rotated.mT @ query_forms @ rotated).unflatten(0, (self.g, -1)).sum(dim=1)
        value_forms = output_forms(source, layer).unflatten(0, (self.g, -1)).sum(dim=1)
        moments = statistics.key_moments.sum(dim=0)
        return LayerParts(
            keys,
            _second_moments(keys, moments / moments[-1, -1].clamp(min=TINY)),
            values.unflatten(0, (self.g, self.w)),
            scales,
            means,
            0.5 * scales**2 * query_sizes,
            key_forms,
            value_forms,
        )

    def mix_heads(self, parts: LayerParts, frequency: int) -> tuple[Tensor, Tensor]:
        """T [g g] complex, whose rows mix the heads of a frequency, and the loss of each row without its rotation [g].

        The rows are principal components of the heads, each head weighted by the cost of replacing its rotation.
        """
        replaced = 1 - (parts.means[:, frequency].abs() / parts.scales[frequency]) ** 2
        weights = (parts.score_costs[:, frequency] * replaced).unflatten(0, (self.g, -1)).sum(dim=1).sqrt()
        weights = weights.clamp(min=weights.max() * 1e-6 + torch.finfo(torch.float64).tiny)
        values, vectors = torch.linalg.eigh(weights[:, None] * parts.key_moments[frequency] * weights)
        # the scale of a row is arbitrary
        return vectors.flip(1).mH * (weights / weights.mean()), values.flip(0).clamp(min=0)

    def compress_layer(self, layer: int) -> CompressedLayer:
        """The compressed layer, cached for the next call because several tensors are made from it."""
        if self._cached_layer is None or self._cached_layer[0] != layer:
            # all elements of a layer without RoPE are in the latent
            num_kept = self.num_kept if self.source.has_rope(layer) else torch.zeros_like(self.num_kept)
            self._cached_layer = (layer, self._compress_layer(layer, self.read_parts(layer), num_kept.tolist()))
        return self._cached_layer[1]

    def _compress_layer(self, layer: int, parts: LayerParts, num_kept: list[int]) -> CompressedLayer:
        rotary, mixes, remaining = [], [], []
        for frequency, kept in enumerate(num_kept):
            mix, _ = self.mix_heads(parts, frequency)
            inverse = torch.linalg.inv(mix)
            rotary.append(mix[:kept] @ parts.keys[frequency])
            mixes.append(inverse[:, :kept].conj())
            remaining.append(parts.keys[frequency] - inverse[:, :kept] @ rotary[-1])
        query_mix = torch.zeros(self.g, self.w // 2, self.r // 2, dtype=torch.complex128)
        for frequency, (mix, end) in enumerate(zip(mixes, self.num_kept.cumsum(0).tolist())):
            query_mix[:, frequency, end - mix.shape[1] : end] = mix
        latent, keys, values = self.fit_latent(layer, parts, torch.stack(remaining))
        rotary_keys = torch.cat(rotary)
        rotary_keys = pad(rotary_keys, (0, 0, 0, self.r // 2 - len(rotary_keys)))
        return CompressedLayer(rotary_keys, query_mix, latent, keys, values, parts.means)

    def fit_latent(self, layer: int, parts: LayerParts, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compresses keys [p g d+1] without rotation, and the values.

        Returns the latent [c-1 d+1], and keys [p g c] and values [g w c] as functions of it.
        """
        statistics = self.statistics[layer]
        # [p g d+1] complex to [g w d+1]
        real_keys = _as_real(keys).transpose(0, 1)
        of_keys = [make_target(*head) for head in zip(real_keys, parts.key_forms, statistics.key_moments)]
        of_values = [make_target(*head) for head in zip(parts.values, parts.value_forms, statistics.value_moments)]
        latent = equal_costs(of_keys + of_values, fit_latent(of_keys + of_values, self.c - 1))
        keys, values = (torch.stack([predict(head, latent) for head in heads]) for heads in (of_keys, of_values))
        # channels beyond the rank of keys and values are zero
        num_empty = self.c - 1 - len(latent)
        latent = pad(latent, (0, 0, 0, num_empty))
        basis = quantizable_basis(latent, statistics.moments, statistics.first_token)
        keys, values = (
            torch.cat((pad(x[..., :-1], (0, num_empty)) @ basis.T, x[..., -1:]), dim=2) for x in (keys, values)
        )
        return basis @ latent, _as_complex(keys), values

    # the tensors of one layer, in float32, in place of those of `GqaToMla`

    def _place_queries(self, layer: int, queries: Tensor) -> Tensor:
        """[h w k] to [h(n+r) k]: the whole query as content, then the mixtures that keep their rotation."""
        pairs = _as_complex(queries.double())  # [p h k]
        of_head = torch.arange(self.h) // (self.h // self.g)
        mixes = self.compress_layer(layer).query_mix[of_head]
        rotary = interleave(_as_real(torch.einsum("phk,hpm->mhk", pairs, mixes)))
        return torch.cat((queries, rotary.transpose(0, 1).float()), dim=1).flatten(0, 1)

    def _kv_a_weight(self, layer: int) -> Tensor:
        return self._kv_a_affine(layer)[:, :-1]

    def _kv_a_bias(self, layer: int) -> Tensor:
        bias = self._kv_a_affine(layer)[:, -1]
        bias[self.c - 1] = self._kv_constant(layer)
        return bias

    def _kv_a_affine(self, layer: int) -> Tensor:
        """[c+r d+1]: weight and bias of the latent, a row of zeros for its constant, and the rotary keys."""
        compressed = self.compress_layer(layer)
        constant = compressed.latent.new_zeros(1, self.d + 1)
        return torch.cat((compressed.latent, constant, interleave(_as_real(compressed.rotary_keys)))).float()

    def _kv_b_weight(self, layer: int) -> Tensor:
        compressed, constant = self.compress_layer(layer), self._kv_constant(layer)
        of_head = torch.arange(self.h) // (self.h // self.g)
        keys = _as_real(compressed.keys[:, of_head] * compressed.means.T[..., None])
        expand = torch.cat((keys.transpose(0, 1), compressed.values[of_head]), dim=1)  # [h n+v c]
        expand[..., -1] /= constant_after_norm(self.c)
        # c is not a square here, so the dtype rounds the norm's weight; this weight compensates for the rounding
        rounded = self._kv_norm_weight(layer).to(self.source.dtype)[0].double()
        expand[..., :-1] *= math.sqrt(constant**2 / self.c + LATENT_EPS) / rounded
        return expand.flatten(0, 1).float()

    def _kv_norm_weight(self, layer: int) -> Tensor:
        norm = inverse_norm_weight(self.c, self._kv_constant(layer))
        norm[-1] = constant_norm_weight(self.c)
        return norm

    def _kv_constant(self, layer: int) -> float:
        weight, bias = self.compress_layer(layer).latent.split((self.d, 1), dim=1)
        largest = (weight * self.source.input_norm(layer)).norm().item() * math.sqrt(self.d) + bias.norm().item()
        return torch.tensor(self._choose_constant(self.c, largest)).to(self.source.dtype).item()


def check_widths(source: LlamaSource, r: int, c: int | None) -> int:
    """Checks both widths and returns that of the latent; without `c`, the width at which it is exact."""
    rotating = source.g * source.rotary_width
    if r % 2 or not 2 <= r <= rotating:
        raise ValueError(f"--qk-rope-head-dim must be even and 2 to {rotating}, got {r}.")
    # the latent of a layer without RoPE holds all keys
    widest = 2 * source.g * source.w - (0 if source.has_layers_without_rope else r) + 2
    if c is not None and (c % 2 or not 2 <= c <= widest):
        raise ValueError(
            f"with --qk-rope-head-dim {r}, --kv-lora-rank must be even and 2 to {widest}, at which the latent loses "
            f"nothing, got {c}."
        )
    return c or widest


def _second_moments(functions: Tensor, moments: Tensor) -> Tensor:
    """[.. g g] of complex functions [.. g d+1] of x. The products are real, which takes half as long."""
    products = torch.complex(functions.real @ moments, functions.imag @ moments)
    return products @ functions.mH


def _as_complex(x: Tensor) -> Tensor:
    """[heads w k] to complex [w/2 heads k]. Llama rotates element i with i + w/2."""
    return torch.complex(*x.unflatten(1, (2, -1)).unbind(1)).transpose(0, 1)


def _as_real(x: Tensor) -> Tensor:
    """[m ..] to [2m ..]: real parts, then imaginary parts."""
    return torch.cat((x.real, x.imag))


def _as_matrix(x: Tensor) -> Tensor:
    """[h p] complex to [h w w] real: the matrices that multiply keys, real parts first, by these numbers."""
    real, imaginary = torch.diag_embed(x.real), torch.diag_embed(x.imag)
    return torch.cat((torch.cat((real, -imaginary), dim=2), torch.cat((imaginary, real), dim=2)), dim=1)
