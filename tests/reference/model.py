"""The whole decoder, from token ids to logits."""

from typing import Any

import torch
from torch import Tensor

from .attention import expanded_mla
from .layers import feed_forward, in_float64, linear, rms_norm, weights_under
from .moe import moe


def is_moe_layer(config: Any, layer: int) -> bool:
    """Whether a layer has experts rather than one dense network.

    Source: paper 3.1.2 (all but the first layer), generalized as in the released code.
    """
    return (
        config.n_routed_experts is not None
        and layer >= config.first_k_dense_replace
        and layer % config.moe_layer_freq == 0
    )


def decoder_layer(
    config: Any,
    weights: dict[str, Tensor],  # of one layer, named after `model.layers.{l}.`, float64
    layer: int,
    hidden: Tensor,  # [b s d]
    positions: Tensor,  # [b s]  int
    visible: Tensor,  # [b s s]  bool
) -> Tensor:  # [b s d]
    """Pre-norm attention (eqs. 37-47) and pre-norm FFN (eq. 20), each added to the residual stream."""
    normed = rms_norm(hidden, weights["input_layernorm.weight"], config.rms_norm_eps)
    hidden = hidden + expanded_mla(config, weights_under(weights, "self_attn."), normed, positions, visible)
    normed = rms_norm(hidden, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    mlp_weights = weights_under(weights, "mlp.")
    if is_moe_layer(config, layer):
        return hidden + moe(config, mlp_weights, normed)
    return hidden + feed_forward(mlp_weights, normed)


def logits(
    config: Any,
    state_dict: dict[str, Tensor],  # official names, one tensor per expert, any dtype
    input_ids: Tensor,  # [b s]
    positions: Tensor | None = None,  # [b s]  int, 0 .. s-1 when None
    visible: Tensor | None = None,  # [b s s]  bool, causal when None
) -> Tensor:  # [b s vocab]
    """The whole model without a cache, in float64: attention of eqs. 37-47, experts of eqs. 20-22."""
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act must be 'silu', got {config.hidden_act!r}.")
    weights = in_float64(state_dict)
    num_sequences, num_tokens = input_ids.shape
    if positions is None:
        positions = torch.arange(num_tokens).expand(num_sequences, -1)
    if visible is None:
        visible = torch.ones(num_tokens, num_tokens).tril().bool().expand(num_sequences, -1, -1)

    hidden = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config.num_hidden_layers):
        layer_weights = weights_under(weights, f"model.layers.{layer}.")
        hidden = decoder_layer(config, layer_weights, layer, hidden, positions, visible)
    hidden = rms_norm(hidden, weights["model.norm.weight"], config.rms_norm_eps)
    return linear(weights, "model.embed_tokens" if config.tie_word_embeddings else "lm_head", hidden)
