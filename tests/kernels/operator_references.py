"""What each operator computes, in torch and float64, from the same arguments. Sizes that do not fit raise an error.

Letters are those of the operators: see kernels/cpu/fake.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_latent.cache.format import latent_format


def weight_of(elements: Tensor, scales: Tensor | None) -> Tensor:
    """The weight [.. n k] that int8 codes with scales [.. n] or [.. n groups] stand for."""
    assert (scales is None) == (elements.dtype != torch.int8)
    if scales is None:
        return elements.double()
    assert scales.is_floating_point()
    scales = scales[..., None] if scales.dim() < elements.dim() else scales
    assert scales.shape[:-1] == elements.shape[:-1]
    return elements.double() * scales.double().repeat_interleave(elements.shape[-1] // scales.shape[-1], dim=-1)


def linear(x, weight, scales=None):
    return product(x, weight_of(weight, scales))


def product(x: Tensor, weight: Tensor) -> Tensor:
    assert x.dim() == weight.dim() == 2
    return x.double() @ weight.T


def grouped(x, weight, ends, scales=None):
    weights, bounds = weight_of(weight, scales), [0, *ends.tolist()]
    assert len(bounds) == len(weights) + 1
    assert bounds == sorted(bounds)
    assert bounds[-1] <= len(x)
    y = x.new_zeros(len(x), weight.shape[1], dtype=torch.float64)
    for one, start, end in zip(weights, bounds, bounds[1:]):
        y[start:end] = product(x[start:end], one)
    return y


def absorb(x, w):
    assert x.shape[1:] == w.shape[:2]
    return torch.einsum("mhn,hnc->mhc", x.double(), w.double())


def expand(x, w):
    assert x.shape[1:] == (w.shape[0], w.shape[2])
    return torch.einsum("mhc,hvc->mhv", x.double(), w.double())


def rms_norm(x, weight, eps):
    return F.rms_norm(x.double(), weight.shape, weight.double(), eps)


def rotate(x, cos, sin):
    assert x.dim() in (3, 4)
    assert cos.shape == sin.shape
    turns = torch.complex(cos.double(), sin.double())
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).clone(memory_format=torch.contiguous_format))
    turns = turns if x.dim() == 3 else turns[:, :, None]
    assert turns.shape[-1] == pairs.shape[-1]
    assert turns.shape[1] == pairs.shape[1]
    return torch.view_as_real(pairs * turns).flatten(-2)


def project(q_x, q, q_scales, x, kv_a, kv_a_scales, norm, eps, cos, sin, head_width):
    c, r = norm.shape[0], 2 * cos.shape[2]
    (b, s, a), d = q_x.shape, x.shape[2]
    assert x.shape[:2] == (b, s)
    assert head_width > 0
    queries = linear(q_x.reshape(b * s, a), q, q_scales).view(b, s, len(q) // head_width, head_width)
    rows = linear(x.reshape(b * s, d), kv_a, kv_a_scales).view(b, s, c + r)
    queries[..., head_width - r :] = rotate(queries[..., head_width - r :], cos, sin)
    latent, key = rms_norm(rows[..., :c], norm, eps), rotate(rows[..., c:], cos, sin)
    return queries.flatten(2), torch.cat((latent, key), dim=-1)


def mlp(x, weights, scales):
    gate, up, down = (weight_of(*pair) for pair in _pairs(weights, scales))
    return product(F.silu(product(x, gate)) * product(x, up), down)


def _pairs(weights: list[Tensor], scales: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    return list(zip(weights, scales or [None] * len(weights), strict=True))


def experts(x, gate_up, down, chosen, shares, scales, shared, shared_scales):
    gates, downs = (weight_of(*pair) for pair in _pairs([gate_up, down], scales))
    assert chosen.shape == shares.shape == (len(x), chosen.shape[1])
    assert chosen.dtype == torch.int64
    assert (chosen >= 0).all()
    assert len(gates) == len(downs)
    y = x.new_zeros(x.shape, dtype=torch.float64) + (mlp(x, shared, shared_scales) if shared or shared_scales else 0)
    for token, slot in (chosen < len(downs)).nonzero().tolist():
        gate, up = gates[chosen[token, slot]].chunk(2)
        one = x[token : token + 1]
        y[token] += (
            product(F.silu(product(one, gate)) * product(one, up), downs[chosen[token, slot]])[0] * shares[token, slot]
        )
    return y


def attend(absorbed, q_rotary, latents, rotary_keys, scale, mask=None, bits=""):
    b, s, h, c = absorbed.shape
    # of quantized latents, the last channels are stored before the key
    r = rotary_keys[0].shape[2] if bits else q_rotary.shape[3]
    num_unquantized = r - q_rotary.shape[3]
    assert num_unquantized >= 0
    assert q_rotary.shape[:3] == (b, s, h)
    keys = []
    for latent, key in zip(latents, rotary_keys, strict=True):
        assert latent.shape[:2] == key.shape[:2] or 1 in (latent.shape[0], key.shape[0])
        if bits:
            rows_format = latent_format(bits if bits == "fp8" else f"int{bits}", c - num_unquantized, 0, torch.bfloat16)
            assert latent.shape[2] == rows_format.row_width
            latent = rows_format.decode(latent.clone(memory_format=torch.contiguous_format), torch.float64)
        assert latent.shape[2:] == (c - num_unquantized,)
        assert key.shape[1:] == (latent.shape[1], r)
        keys.append(torch.cat((latent.double().expand(b, -1, -1), key.double().expand(b, -1, -1)), dim=-1))
    rows = torch.cat(keys, dim=1)
    scores = torch.einsum("bshw,btw->bhst", torch.cat((absorbed.double(), q_rotary.double()), dim=-1), rows) * scale
    if mask is None:
        t = rows.shape[1]
        future = torch.arange(t) > t - s + torch.arange(s)[:, None]
        scores = scores.masked_fill(future, -torch.inf)
    else:
        assert mask.shape[2:] == scores.shape[2:]
        scores = scores + mask.double()
        assert scores.shape == (b, h, s, rows.shape[1])
    # a query that sees no token gives zeros
    weights = F.softmax(scores, dim=-1).masked_fill((scores == -torch.inf).all(dim=-1, keepdim=True), 0)
    return torch.einsum("bhst,btc->bshc", weights, rows[..., :c])


def attention(q_content, q_rotary, w_uk, w_uv, latents, rotary_keys, scale, mask=None, bits=""):
    b, s = q_content.shape[:2]
    absorbed = absorb(q_content.flatten(0, 1), w_uk).unflatten(0, (b, s))
    context = attend(absorbed, q_rotary, latents, rotary_keys, scale, mask, bits)
    return expand(context.flatten(0, 1), w_uv).unflatten(0, (b, s))


# by the name of the operator
REFERENCES = {
    function.__name__: function
    for function in (
        linear, grouped, absorb, expand, rms_norm, rotate, project, mlp, experts, attend, attention,
    )
}  # fmt: skip
