"""A Llama whose attention keeps RoPE on a part of its keys. The recipes of other projects make such models.

All weights are dense here: low-rank factors are multiplied together. So perplexities are those of the compressed model,
while memory and speed are not.

Letters: b windows, s tokens, d model width, h query heads, g key heads, w width of a head, p = w/2 its frequencies,
m frequencies that are kept, n width of the part without RoPE.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

WINDOWS_PER_BATCH = 4


class SourceLayer(NamedTuple):
    """The projections of one attention layer in float64. A pair of elements that RoPE rotates is a complex number."""

    queries: Tensor  # [p h d] complex
    keys: Tensor  # [p g d] complex
    values: Tensor  # [g w d]


class PartialRope(NamedTuple):
    """Projections of one attention layer whose keys are partly rotated, in float64."""

    frequencies: Tensor  # [g m] of the rotary keys of each head
    rotary_queries: Tensor  # [h 2m d] real parts, then imaginary parts
    rotary_keys: Tensor  # [g 2m d]
    content_queries: Tensor  # [h n d]
    content_keys: Tensor  # [g n d]
    values: Tensor  # [g w d]


class PartialRopeAttention(nn.Module):
    """Causal attention by the weights in a `PartialRope`, without padding and without a cache."""

    def __init__(self, layer: PartialRope, o_proj: nn.Module):
        super().__init__()
        self.queries_per_key = len(layer.rotary_queries) // len(layer.rotary_keys)
        self.scale = layer.values.shape[1] ** -0.5
        self.o_proj = o_proj
        for name, tensor in layer._asdict().items():
            self.register_buffer(name, tensor.to(o_proj.weight.dtype), persistent=False)

    def forward(self, hidden_states: Tensor, **ignored) -> tuple[Tensor, None]:
        positions = torch.arange(hidden_states.shape[1], dtype=self.frequencies.dtype)
        angles = positions[:, None] * self.frequencies[:, None]  # [g s m]

        def project(weight: Tensor) -> Tensor:  # [heads width d] to [b heads s width]
            return (hidden_states @ weight.flatten(0, 1).T).unflatten(-1, weight.shape[:2]).transpose(1, 2)

        keys = torch.cat((_rotate(project(self.rotary_keys), angles), project(self.content_keys)), dim=-1)
        angles = angles.repeat_interleave(self.queries_per_key, dim=0)
        queries = torch.cat((_rotate(project(self.rotary_queries), angles), project(self.content_queries)), dim=-1)
        keys, values = (x.repeat_interleave(self.queries_per_key, dim=1) for x in (keys, project(self.values)))
        output = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=self.scale)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    real, imaginary = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)


@contextlib.contextmanager
def replaced_attention(model: PreTrainedModel, layers: list[PartialRope]) -> Iterator[PreTrainedModel]:
    """The model with the attention of `layers`, until the end of the `with` block."""
    originals = [layer.self_attn for layer in model.model.layers]
    for layer, replacement in zip(model.model.layers, layers):
        layer.self_attn = PartialRopeAttention(replacement, layer.self_attn.o_proj)
    try:
        yield model
    finally:
        for layer, original in zip(model.model.layers, originals):
            layer.self_attn = original


def read_layers(model: PreTrainedModel) -> list[SourceLayer]:
    """The layers of a Llama. Raises ValueError for biases and for scaled rotations, which are not supported here."""
    width = model.model.layers[0].self_attn.head_dim

    def read(projection: nn.Linear) -> Tensor:  # [heads w d]
        return projection.weight.detach().double().unflatten(0, (-1, width))

    layers = []
    for layer in model.model.layers:
        q, k, v = (getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj"))
        if any(projection.bias is not None for projection in (q, k, v)):
            raise ValueError(f"expected a model without biases in attention, got {type(model).__name__} with biases.")
        layers.append(SourceLayer(as_complex(read(q)), as_complex(read(k)), read(v)))
    if model.model.rotary_emb.attention_scaling != 1:
        raise ValueError("expected RoPE without a factor on cos and sin, got one; choose a model without YaRN.")
    return layers


def frequencies_of(model: PreTrainedModel) -> Tensor:  # [p]
    return model.model.rotary_emb.inv_freq.double()


@torch.no_grad()
def input_moments(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """[d d] of each layer: mean of x x^T, where x is the normalized input of its attention, in float64."""
    d = model.config.hidden_size
    moments = [torch.zeros(d, d, dtype=torch.float64) for _ in model.model.layers]

    def accumulate(total: Tensor):
        def hook(module, args, output):
            x = output.flatten(0, 1).float()
            total.add_((x.T @ x).double() / windows.numel())

        return hook

    handles = [
        layer.input_layernorm.register_forward_hook(accumulate(total))
        for layer, total in zip(model.model.layers, moments)
    ]
    run(model, windows)
    for handle in handles:
        handle.remove()
    return moments


@torch.no_grad()
def run(model: PreTrainedModel, windows: Tensor) -> None:
    """Runs the layers for the hooks on them."""
    for batch in windows.split(WINDOWS_PER_BATCH):
        model.model(batch, use_cache=False)


@torch.no_grad()
def losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """[b]: mean cross-entropy of every token but the first of each window, in nats."""
    found = []
    for batch in windows.split(WINDOWS_PER_BATCH):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        found.append(nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(dim=1))
    return torch.cat(found).double()


def as_complex(x: Tensor) -> Tensor:
    """[heads w d] to complex [w/2 heads d]. Llama rotates element i with i + w/2."""
    return torch.complex(*x.unflatten(1, (2, -1)).unbind(1)).transpose(0, 1)


def as_real(x: Tensor) -> Tensor:
    """Complex [m heads d] to [heads 2m d]: real parts, then imaginary parts."""
    return torch.cat((x.real, x.imag)).transpose(0, 1)
