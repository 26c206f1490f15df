"""Shapes and dtypes of the operators' results, for torch.compile and meta tensors, which refuse what operators refuse.

Letters: m tokens, n rows of a weight, k their width; b batch, s new tokens, t cached tokens, h heads; n, r, v content,
rotary and value width per head; a, c widths of latents; e experts, f their width, d model width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _check(x: Tensor, name: str, *sizes: int | None) -> None:
    """Raises ValueError unless x has these sizes; None stands for any."""
    if x.dim() != len(sizes) or any(want is not None and got != want for got, want in zip(x.shape, sizes)):
        wanted = ", ".join("*" if size is None else str(size) for size in sizes)
        raise ValueError(f"expected {name} of sizes [{wanted}], got {list(x.shape)}.")


def _check_device(*tensors: Tensor | None) -> None:
    devices = {x.device.type for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, got them on {' and '.join(sorted(devices))}.")


def _linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    _check_device(x, weight, scales)
    _check(weight, "weight [n k]", None, None)
    _check(x, "x [m k]", None, weight.shape[1])
    return x.new_empty(x.shape[0], weight.shape[0])


def _grouped(x: Tensor, weight: Tensor, ends: Tensor, scales: Tensor | None = None) -> Tensor:
    _check_device(x, weight, ends, scales)
    _check(weight, "weight [e n k]", None, None, None)
    _check(x, "x [m k]", None, weight.shape[2])
    _check(ends, "ends [e]", weight.shape[0])
    return x.new_empty(x.shape[0], weight.shape[1])


def _absorb(x: Tensor, w: Tensor) -> Tensor:
    _check_device(x, w)
    _check(w, "w [h n c]", None, None, None)
    _check(x, "x [m h n]", None, *w.shape[:2])
    return x.new_empty(*x.shape[:2], w.shape[-1], dtype=torch.float32)


def _expand(x: Tensor, w: Tensor) -> Tensor:
    _check_device(x, w)
    _check(w, "w [h v c]", None, None, None)
    _check(x, "x [m h c]", None, w.shape[0], w.shape[2])
    return w.new_empty(*x.shape[:2], w.shape[1])


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_device(x, weight)
    _check(weight, "weight [d]", x.shape[-1] if x.dim() else None)
    return torch.empty_like(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check_device(x, cos, sin)
    if x.dim() not in (3, 4):
        raise ValueError(f"expected x [b s r] or [b s h r], got {list(x.shape)}.")
    _check_angles(cos, sin, x)
    if x.shape[-1] != 2 * cos.shape[2]:
        raise ValueError(f"expected x [.. r] with r = {2 * cos.shape[2]}, got {list(x.shape)}.")
    return x.new_empty(x.shape)


def _check_angles(cos: Tensor, sin: Tensor, x: Tensor) -> None:
    is_shared = cos.dim() > 0 and cos.shape[0] == 1
    _check(cos, "cos [b or 1, s, r / 2]", 1 if is_shared else x.shape[0], x.shape[1], None)
    _check(sin, "sin, like cos,", *cos.shape)


def _project(
    q_x: Tensor,
    q: Tensor,
    q_scales: Tensor | None,
    x: Tensor,
    kv_a: Tensor,
    kv_a_scales: Tensor | None,
    norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    head_width: int,
    q_runs: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    _check_device(q_x, q, q_scales, x, kv_a, kv_a_scales, norm, cos, sin)
    _check(x, "x [b s d]", None, None, None)
    _check(q_x, "q_x [b s a]", *x.shape[:2], None)
    _check(norm, "norm [c]", None)
    _check_angles(cos, sin, x)
    _check(q, "q [h(n+r) a]", None, q_x.shape[2])
    _check(kv_a, "kv_a [c+r d]", norm.shape[0] + 2 * cos.shape[2], x.shape[2])
    return x.new_empty(*x.shape[:2], q.shape[0]), x.new_empty(*x.shape[:2], kv_a.shape[0])


def _mlp(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    _check_device(x, *weights, *scales)
    _check(x, "x [m k]", None, None)
    if len(weights) != 3:
        raise ValueError(f"expected gate, up and down, got {len(weights)} weights.")
    gate, up, down = weights
    _check(gate, "gate [f d]", None, x.shape[1])
    _check(up, "up [f d]", *gate.shape)
    _check(down, "down [d f]", *reversed(gate.shape))
    return x.new_empty(x.shape)


def _experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    chosen: Tensor,
    shares: Tensor,
    scales: Sequence[Tensor],
    shared: Sequence[Tensor],
    shared_scales: Sequence[Tensor],
) -> Tensor:
    _check_device(x, gate_up, down, chosen, shares, *scales, *shared, *shared_scales)
    _check(x, "x [m k]", None, None)
    _check(down, "down [e d f]", None, x.shape[1], None)
    _check(gate_up, "gate_up [e 2f d]", down.shape[0], 2 * down.shape[2], x.shape[1])
    _check(chosen, "chosen [m k]", x.shape[0], None)
    _check(shares, "shares [m k]", *chosen.shape)
    return _mlp(x, shared, shared_scales) if shared else x.new_empty(x.shape)


def _attend(
    absorbed: Tensor,
    q_rotary: Tensor,
    latents: Sequence[Tensor],
    rotary_keys: Sequence[Tensor],
    scale: float,
    mask: Tensor | None = None,
    bits: str = "",
) -> Tensor:
    _check_device(absorbed, q_rotary, *latents, *rotary_keys, mask)
    _check(absorbed, "absorbed [b s h c]", None, None, None, None)
    _check(q_rotary, "q_rotary [b s h r]", *absorbed.shape[:3], None)
    if not latents or len(latents) != len(rotary_keys):
        raise ValueError(
            f"expected as many latents as rotary keys, and at least one, got {len(latents)} and {len(rotary_keys)}."
        )
    for latent, key in zip(latents, rotary_keys):
        _check(latent, "latents [b or 1, t, width]", None, None, None)
        # of quantized latents, the last channels are stored before the key
        width = q_rotary.shape[3] if not bits or key.dim() != 3 else max(q_rotary.shape[3], key.shape[2])
        _check(key, "rotary keys [b or 1, t, r]", None, latent.shape[1], width)
    return absorbed.new_empty(absorbed.shape)


def _attention(
    q_content: Tensor,
    q_rotary: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    latents: Sequence[Tensor],
    rotary_keys: Sequence[Tensor],
    scale: float,
    mask: Tensor | None = None,
    bits: str = "",
) -> Tensor:
    _check_device(q_content, w_uk, w_uv, *latents)
    _check(q_content, "q_content [b s h n]", None, None, None, None)
    b, s, h, n = q_content.shape
    _check(w_uk, "w_uk [h n c]", h, n, None)
    _check(w_uv, "w_uv [h v c]", h, None, w_uk.shape[2])
    absorbed = q_content.new_empty(b, s, h, w_uk.shape[2], dtype=torch.float32)
    _attend(absorbed, q_rotary, latents, rotary_keys, scale, mask, bits)
    return w_uv.new_empty(b, s, h, w_uv.shape[1])


# by the name of the operator
FAKES: dict[str, Callable] = {
    "linear": _linear,
    "grouped": _grouped,
    "absorb": _absorb,
    "expand": _expand,
    "rms_norm": _rms_norm,
    "rotate": _rotate,
    "project": _project,
    "mlp": _mlp,
    "experts": _experts,
    "attend": _attend,
    "attention": _attention,
}
