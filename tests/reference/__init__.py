"""DeepSeek-V2 (arXiv:2405.04434) in float64, slow and close to the paper: the truth of the numeric tests."""

from .attention import absorbed_attention, absorbed_mla, attention, expanded_mla
from .layers import feed_forward, rms_norm
from .model import is_moe_layer, logits
from .moe import (
    communication_balance_loss,
    device_balance_loss,
    dropped_choices,
    expert_balance_loss,
    moe,
    route,
    router_scores,
)
from .rotary import inverse_frequencies, rotary_magnitude, rotate, softmax_scale, yarn_inverse_frequencies

__all__ = [
    "absorbed_attention",
    "absorbed_mla",
    "attention",
    "communication_balance_loss",
    "device_balance_loss",
    "dropped_choices",
    "expanded_mla",
    "expert_balance_loss",
    "feed_forward",
    "inverse_frequencies",
    "is_moe_layer",
    "logits",
    "moe",
    "rms_norm",
    "rotary_magnitude",
    "rotate",
    "route",
    "router_scores",
    "softmax_scale",
    "yarn_inverse_frequencies",
]
