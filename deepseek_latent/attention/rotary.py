"""Rotary positions: the frequencies and length factors of YaRN, and the rotation itself, in real numbers.

Letters: b batch, s tokens, h heads, n content width, r rotary width.
"""

import math

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from ..configuration_deepseek_v2 import DeepseekV2Config


def yarn_length_factor(factor: float, mscale: float) -> float:
    """sqrt(t) of paper 3.1.4: 0.1 mscale ln(factor) + 1, and 1 if the context is not extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: DeepseekV2Config) -> float:
    """1 / sqrt(n + r), times YaRN's length factor squared: once for q and once for k (paper 3.1.4)."""
    scale = config.qk_head_dim**-0.5
    mscale = config.rope_parameters.get("mscale_all_dim")
    if config.rope_parameters["rope_type"] == "default" or not mscale:
        return scale
    return scale * yarn_length_factor(config.rope_parameters["factor"], mscale) ** 2


def yarn_frequencies(width: int, rope: dict) -> tuple[Tensor, float]:
    """Computes inverse frequencies [r/2] in float64, and the factor that cos and sin are multiplied by.

    A pair that turns more than `beta_fast` times within the original context keeps its frequency, and one that turns
    fewer than `beta_slow` times is slowed by `factor`; between them lies a linear ramp. The factor for cos and sin is
    the ratio of two length factors. It is 1 in every published checkpoint: the length factor is in `softmax_scale`.
    Source: YaRN (arXiv:2309.00071) 3.2-3.4; DeepSeek-V2 3.1.4.
    """
    factor, base = rope["factor"], rope["rope_theta"]

    def index_of_pair(turns: float) -> float:
        return width * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = index_of_pair(rope.get("beta_fast") or 32), index_of_pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pair = torch.arange(width // 2, dtype=torch.float64)
    # a ramp of width 0 would divide by zero
    slowed = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    frequency = base ** -(2 * pair / width)
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = rope.get("mscale", 1.0), rope.get("mscale_all_dim") or 0.0
        attention_factor = yarn_length_factor(factor, mscale) / yarn_length_factor(factor, mscale_all_dim)
    return frequency / factor * slowed + frequency * (1 - slowed), attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i+1) of x [b s .. r] by the angles whose cos and sin are [b s r/2] float32.

    It computes in float32. The result has the interleaved order of the checkpoint and the dtype of x.
    Source: paper 2.1.3, RoPE(.) of eqs. 14-15.
    """
    per_token = cos.shape[:2] + (1,) * (x.dim() - 3) + cos.shape[2:]
    cos, sin = cos.view(per_token), sin.view(per_token)
    even, odd = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class DeepseekV2RotaryEmbedding(nn.Module):
    """Holds the inverse frequencies [r/2] and converts positions [b s] to cos and sin [b s r/2], float32.

    An angle is the product of a position and a frequency in float64. In float32, angles at position 163,839 would have
    errors of up to 0.008, which differ between neighboring positions. A frequency is the sum of two float32 numbers,
    `inv_freq` and its rounding error, since not every device has float64. The types `default` and `yarn` are computed
    here, and the other types, which only converted checkpoints use, by transformers.
    """

    def __init__(self, config: DeepseekV2Config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        buffers, self.attention_scaling = self.initial_buffers()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def initial_buffers(self) -> tuple[dict[str, Tensor], float]:
        """The buffers by name, and the factor that cos and sin are multiplied by."""
        rope, width = self.config.rope_parameters, self.config.qk_rope_head_dim
        if self.rope_type == "yarn":
            exact, attention_scaling = yarn_frequencies(width, rope)
        elif self.rope_type == "default":
            exact, attention_scaling = (
                rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width),
                1.0,
            )
        else:
            exact, attention_scaling = ROPE_INIT_FUNCTIONS[self.rope_type](self.config)
        rounded = exact.float()
        buffers = {
            "inv_freq": rounded,
            "inv_freq_rest": (exact - rounded).float(),
            # `dynamic_rope_update` restores these when a sequence is short again
            "original_inv_freq": rounded.clone(),
        }
        return buffers, attention_scaling

    def _apply(self, fn, recurse: bool = True):
        """Moves the frequencies, but keeps their dtype when the model's weights are cast."""

        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        frequencies = self.inv_freq.to(x.device, wide) + self.inv_freq_rest.to(x.device, wide)
        angles = position_ids[..., None].to(wide) * frequencies
        return (angles.cos() * self.attention_scaling).float(), (angles.sin() * self.attention_scaling).float()
