"""GQA as latent attention with a smaller cache: a few keys keep their rotation, a latent holds all else.

Letters: d model width, h query heads, g key heads, w width of a source head, p = w/2 its frequencies, r rotary width,
c KV latent width, y [2 g w] keys and values together, x [d+1] the input of a layer with a 1 appended.

A pair of key elements is one complex number z, which RoPE multiplies by e^{i t f} at position t. The g heads of one
frequency f rotate alike, so any invertible mixture of them can rotate in their place if the queries are mixed by its
inverse. That is exact. Two steps are not:

1. Only r/2 mixtures keep their rotation. In all others e^{-i D f}, for a distance D, is replaced by its mean over the
   distances that a head attends to. The mean is near 1 for a slow frequency and near 0 for a fast one.
2. These keys and the values become a latent of c - 1 principal components, in the basis of `latent_basis`. The last
   channel is the constant of `gqa_to_mla`.

Both steps minimize one number, the change of attention's output to first order. An error in a score costs the spread
of the values that the head attends to, an error in a value costs what `o_proj` makes of it. Source of the idea:
TransMLA (arXiv:2502.07864), whose real rotations, evenly spaced frequencies and balanced norms are replaced.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .calibration import LayerStatistics
from .gqa_to_mla import (
    LATENT_EPS,
    GqaToMla,
    constant_after_norm,
    constant_norm_weight,
    interleave,
    inverse_norm_weight,
    rope_frequencies,
    rope_parameters,
)
from .latent_basis import num_unquantized_channels, quantizable_basis
from .llama_source import LlamaSource
from .source import Source

# relative to the largest variance: directions below it are noise
NEGLIGIBLE_VARIANCE = 1e-12
# relative to the mean variance of the inputs, added to each: directions that the text does not show have some variance
RIDGE = 1e-8


class LayerParts(NamedTuple):
    """A layer of the source in float64: its keys and values as functions of x, and the cost of an error in them."""

    keys: Tensor  # [p g d+1] complex
    key_moments: Tensor  # [p g g] complex: second moments of the heads of a frequency
    values: Tensor  # [g w d+1]
    means: Tensor  # [h p] complex: mean rotation over the distances of a head, times the length factor squared
    score_costs: Tensor  # [h p] cost of a squared error of a key element, through the score
    value_costs: Tensor  # [g w w] cost of an error of a value, a quadratic form
    moments: Tensor  # [d+1 d+1] second moments of x
    first_token: Tensor  # [d+1] mean of x at the first token of a text


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
    """A Llama, Mistral or Qwen2 checkpoint as DeepSeek-V2 with latents of width c and rotary keys of width r.

    Without `c`, the latent is wide enough to be exact, so that only the first step loses something. `num_kept` is the
    result of `choose_num_kept`, which is computed if it is not given.

    Raises ValueError as `GqaToMla` does, and for widths that `check_widths` refuses.
    """

    def __init__(
        self,
        files: Source,
        statistics: list[LayerStatistics],
        *,
        r: int,
        c: int | None = None,
        num_kept: Tensor | None = None,
    ):
        super().__init__(files)
        self.n, self.r, self.c = self.w, r, check_widths(self.source, r, c)
        self.num_unquantized = num_unquantized_channels(self.c)
        self.query_scale = math.sqrt((self.n + self.r) / self.w)
        self.statistics = statistics
        self.frequencies, self.length_factor = rope_frequencies(self.source.config, self.w)
        self.num_kept = self.choose_num_kept() if num_kept is None else num_kept  # [p]
        self._cached_layer: tuple[int, CompressedLayer] | None = None

    def rope_parameters(self) -> dict:
        frequencies = self.frequencies.repeat_interleave(self.num_kept)
        return rope_parameters(self.source.config, frequencies, self.length_factor)

    def choose_num_kept(self) -> Tensor:
        """[p]: how many mixtures of each frequency keep their rotation: r/2 in all, the same in every layer."""
        layers = range(len(self.statistics))
        losses = torch.stack([self.rotation_losses(self.read_parts(layer)) for layer in layers]).sum(dim=0)
        # losses of a frequency are sorted, so the largest losses of all are the first ones of each frequency
        largest = losses.flatten().topk(self.r // 2).indices
        return torch.bincount(largest // self.g, minlength=self.w // 2)

    def rotation_losses(self, parts: LayerParts) -> Tensor:
        """[p g]: the loss from replacing a mixture's rotation by its mean, the largest of a frequency first."""
        return torch.stack([self.mix_heads(parts, frequency)[1] for frequency in range(self.w // 2)])

    # one layer

    def read_parts(self, layer: int) -> LayerParts:
        source, statistics = self.source, self.statistics[layer]
        variance = statistics.moments[:-1, :-1].diagonal().mean()
        moments = statistics.moments.clone()
        moments[:-1, :-1].diagonal().add_(RIDGE * variance)

        def affine(name: str) -> Tensor:
            return torch.cat((source.weight(layer, name), source.bias(layer, name)[:, None]), dim=1).double()

        queries, keys, values = (affine(name) for name in ("q_proj", "k_proj", "v_proj"))
        queries, keys = (_as_complex(x.unflatten(0, (-1, self.w))) for x in (queries, keys))  # [p heads d+1]
        values = values.unflatten(0, (self.g, self.w))
        distance = torch.arange(statistics.distances.shape[1], dtype=torch.float64)
        rotations = torch.exp(-1j * distance[:, None] * self.frequencies)
        means = statistics.distances.to(rotations.dtype) @ rotations / statistics.distances.sum(dim=1, keepdim=True)
        # an error in a score changes what a head adds to the residual stream by the spread of its values
        out = source.weight(layer, "o_proj").double().unflatten(1, (self.h, self.w)).permute(1, 0, 2)  # [h d w]
        of_head = torch.arange(self.h) // (self.h // self.g)
        forms = out.transpose(1, 2) @ out
        spread = (forms * _covariance(values, moments)[of_head]).sum(dim=(1, 2))
        query_moments = _second_moments(queries[:, :, None], moments)[..., 0, 0].real.T
        # the factor 0.5: a score is the real part of a complex product
        score_costs = 0.5 / self.w * self.length_factor**4 * spread[:, None] * query_moments
        value_costs = forms.unflatten(0, (self.g, -1)).sum(dim=1)
        key_moments = _second_moments(keys, moments)
        costs = score_costs, value_costs
        means = means * self.length_factor**2
        return LayerParts(keys, key_moments, values, means, *costs, moments, statistics.first_token)

    def mix_heads(self, parts: LayerParts, frequency: int) -> tuple[Tensor, Tensor]:
        """T [g g] complex, whose rows mix the heads of a frequency, and the loss of each row without its rotation [g].

        The rows are principal components of the heads, each head weighted by the cost of replacing its rotation.
        """
        replaced = 1 - (parts.means[:, frequency].abs() / self.length_factor**2) ** 2
        weights = (parts.score_costs[:, frequency] * replaced).unflatten(0, (self.g, -1)).sum(dim=1).sqrt()
        weights = weights.clamp(min=weights.max() * 1e-6 + torch.finfo(torch.float64).tiny)
        values, vectors = torch.linalg.eigh(weights[:, None] * parts.key_moments[frequency] * weights)
        # the scale of a row is arbitrary
        return vectors.flip(1).mH * (weights / weights.mean()), values.flip(0).clamp(min=0)

    def compress_layer(self, layer: int) -> CompressedLayer:
        """The compressed layer, cached for the next call because several tensors are made from it."""
        if self._cached_layer is None or self._cached_layer[0] != layer:
            self._cached_layer = (layer, self._compress_layer(self.read_parts(layer)))
        return self._cached_layer[1]

    def _compress_layer(self, parts: LayerParts) -> CompressedLayer:
        rotary, mixes, remaining = [], [], []
        for frequency, num_kept in enumerate(self.num_kept.tolist()):
            mix, _ = self.mix_heads(parts, frequency)
            inverse = torch.linalg.inv(mix)
            rotary.append(mix[:num_kept] @ parts.keys[frequency])
            mixes.append(inverse[:, :num_kept].conj())
            remaining.append(parts.keys[frequency] - inverse[:, :num_kept] @ rotary[-1])
        query_mix = torch.zeros(self.g, self.w // 2, self.r // 2, dtype=torch.complex128)
        for frequency, (mix, end) in enumerate(zip(mixes, self.num_kept.cumsum(0).tolist())):
            query_mix[:, frequency, end - mix.shape[1] : end] = mix
        latent, keys, values = self.principal_components(parts, torch.stack(remaining))
        return CompressedLayer(torch.cat(rotary), query_mix, latent, keys, values, parts.means)

    def principal_components(self, parts: LayerParts, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compresses keys [p g d+1] without rotation, and the values.

        Returns the latent [c-1 d+1], and keys [p g c] and values [g w c] as functions of it. The latent holds principal
        components around the mean, weighted by the cost of errors; keys and values are the best linear prediction.
        """
        key_weights, value_weights = self.error_weights(parts)
        y = torch.cat((keys.real.flatten(0, 1), keys.imag.flatten(0, 1), parts.values.flatten(0, 1)))
        weighted = torch.cat(
            (key_weights[:, None] * y[: len(key_weights)], (value_weights @ parts.values).flatten(0, 1))
        )
        mean = parts.moments[:, -1]
        centered = parts.moments - mean[:, None] * mean
        variances, directions = torch.linalg.eigh(weighted @ centered @ weighted.T)
        variances, directions = variances.flip(0)[: self.c - 1], directions.flip(1)[:, : self.c - 1]
        is_kept = variances > NEGLIGIBLE_VARIANCE * variances[0].clamp(min=torch.finfo(variances.dtype).tiny)
        directions, variances = directions[:, is_kept], variances[is_kept]
        # the channels have a mean square of 1, so that they fit any dtype
        scale = (variances.sum() / (self.c - 1)).rsqrt() if len(variances) else 1.0
        latent = scale * directions.T @ weighted
        prediction = y @ centered @ latent.T / (scale**2 * variances)
        latent[:, -1] -= latent @ mean
        # channels beyond the rank of keys and values are zero
        num_empty = self.c - 1 - len(variances)
        latent = torch.nn.functional.pad(latent, (0, 0, 0, num_empty))
        prediction = torch.nn.functional.pad(prediction, (0, num_empty))
        basis = quantizable_basis(latent, parts.moments, parts.first_token)
        latent, prediction = basis @ latent, prediction @ basis.T
        prediction = torch.cat((prediction, (y @ mean)[:, None]), dim=1)
        real, imaginary, values = prediction.split((keys[..., 0].numel(), keys[..., 0].numel(), self.g * self.w))
        return latent, torch.complex(real, imaginary).unflatten(0, (-1, self.g)), values.unflatten(0, (self.g, -1))

    def error_weights(self, parts: LayerParts) -> tuple[Tensor, Tensor]:
        """Square roots of the costs of errors: in key elements [2 p g], real parts first, and in values [g w w]."""
        costs = parts.score_costs * (parts.means.abs() / self.length_factor**2) ** 2
        key_weights = costs.unflatten(0, (self.g, -1)).sum(dim=1).T.flatten().sqrt()
        eigenvalues, directions = torch.linalg.eigh(parts.value_costs)
        return key_weights.repeat(2), directions * eigenvalues.clamp(min=0).sqrt()[:, None, :] @ directions.mT

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
    keys = source.g * source.w
    if r % 2 or not 2 <= r <= keys:
        raise ValueError(f"--qk-rope-head-dim must be even and 2 to {keys}, got {r}.")
    widest = 2 * keys - r + 2
    if c is not None and (c % 2 or not 2 <= c <= widest):
        raise ValueError(f"--kv-lora-rank must be even and 2 to {widest}, which is exact, got {c}.")
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


def _covariance(functions: Tensor, moments: Tensor) -> Tensor:
    """[g w w] of functions [g w d+1] of x."""
    centered = moments - moments[:, -1:] * moments[:, -1]
    return functions @ centered @ functions.mT
