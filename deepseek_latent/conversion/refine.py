"""Trains the attention of a compressed model, one layer after the other, to return what the source's returns.

Only projections that the conversion made are trained: the queries, the latent and rotary key, the keys and values made
of the latent, and the output. A layer reads what the compressed layers before it give it, so it also makes up for a
part of their errors. Nothing is learned from the tokens that follow, so this is a part of the conversion.

Letters: b windows, s tokens per window, d model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from ..modeling_deepseek_v2 import DeepseekV2ForCausalLM
from .architectures import architecture_of
from .compress import CompressedMla
from .progress import track
from .target import Piece

STEPS = 60  # per layer
WINDOWS_PER_STEP = 8
WARM_UP_STEPS = 5
LEARNING_RATE = 3e-4
# a layer with a smaller relative error is exact up to rounding, and is left as it is
NEGLIGIBLE_ERROR = 1e-9


class RefinedMla:
    """A compressed checkpoint with trained attention: `config`, and the `pieces` of its files."""

    def __init__(self, compressed: CompressedMla, model: DeepseekV2ForCausalLM):
        self.compressed, self.config = compressed, compressed.config
        self._attention = {name: x for name, x in model.state_dict().items() if ".self_attn." in name}

    def pieces(self) -> list[Piece]:
        return [
            piece._replace(make=lambda x=self._attention[piece.name]: x) if piece.name in self._attention else piece
            for piece in self.compressed.pieces()
        ]


@torch.no_grad()
def refine(
    student: DeepseekV2ForCausalLM,
    teacher: PreTrainedModel,
    windows: Tensor,  # [b s]
) -> None:
    """Trains the attention of `student` in place. `teacher` is its source, with SDPA attention."""
    student.requires_grad_(False)
    # windows of all kinds of text in each step
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    batches = windows[order].split(WINDOWS_PER_STEP)
    teacher_states, options = zip(*(_first_inputs(teacher, batch) for batch in batches))
    centers = architecture_of(teacher.config).centers_norms

    def as_in_llama(state: Tensor) -> Tensor:
        # the conversion subtracts the mean that norms of the source would
        return state - state.mean(-1, keepdim=True) if centers else state

    student_states = [as_in_llama(state) for state in teacher_states]
    positions = torch.arange(windows.shape[1])[None]
    embeddings = student.model.rotary_emb(student_states[0].float(), positions)
    layers = zip(teacher.model.layers, student.model.layers)
    for source_layer, layer in track(list(layers), "refining layers"):
        outputs = [_advance(source_layer, state, option) for state, option in zip(teacher_states, options)]

        def attend(x: Tensor, attention=layer.self_attn) -> Tensor:
            return attention(
                hidden_states=x, attention_mask=None, position_embeddings=embeddings, position_ids=positions
            )[0]

        inputs = [layer.input_layernorm(state).float() for state in student_states]
        eps = layer.post_attention_layernorm.eps
        # an error counts relative to the residual stream, which the next norm divides by its size
        targets = [
            (as_in_llama(added.float()), as_in_llama(residual.float()).square().mean(-1, keepdim=True) + eps)
            for added, residual, _ in outputs
        ]
        _train(layer.self_attn.float(), attend, inputs, targets)
        teacher_states = [state for _, _, state in outputs]
        student_states = [state + attend(x).to(state.dtype) for state, x in zip(student_states, inputs)]
        student_states = [state + layer.mlp(layer.post_attention_layernorm(state)) for state in student_states]
        layer.self_attn.to(student.dtype)


def _train(attention: nn.Module, attend: Callable[[Tensor], Tensor], inputs: list[Tensor], targets: list) -> None:
    """Adam on the relative square error of `attend`; a larger error at the end than at the beginning undoes it."""

    def error(batch: int) -> Tensor:
        expected, square = targets[batch]
        return ((attend(inputs[batch]) - expected).square() / square).mean()

    weights = _trained_weights(attention)
    before, began = [weight.clone() for weight in weights.values()], sum(error(i) for i in range(len(inputs)))
    if began < NEGLIGIBLE_ERROR * len(inputs):
        return
    optimizer = torch.optim.Adam(weights.values(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = get_linear_schedule_with_warmup(optimizer, WARM_UP_STEPS, STEPS)
    constant = attention.kv_a_layernorm.weight.shape[0] - 1
    with torch.enable_grad():
        for weight in weights.values():
            weight.requires_grad_(True)
        for step in range(STEPS):
            optimizer.zero_grad()
            error(step % len(inputs)).backward()
            # the channel that dominates the norm stays constant
            weights["kv_a_proj_with_mqa"].grad[constant] = 0
            optimizer.step()
            schedule.step()
    for weight in weights.values():
        weight.requires_grad_(False)
        weight.grad = None
    if not sum(error(i) for i in range(len(inputs))) < began:
        for weight, value in zip(weights.values(), before):
            weight.copy_(value)


def _trained_weights(attention: nn.Module) -> dict[str, nn.Parameter]:
    names = ("q_proj" if attention.q_lora_rank is None else "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    return {name: getattr(attention, name).weight for name in names}


class _FirstLayerReached(Exception):
    """Ends a forward pass whose later layers are not needed."""


def _first_inputs(model: PreTrainedModel, batch: Tensor) -> tuple[Tensor, dict]:
    """What the first layer is given for a batch [b s]: hidden states [b s d], and its keyword arguments."""
    given = []

    def stop(module, args, kwargs):
        given.append((args[0], kwargs))
        raise _FirstLayerReached

    handle = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.model(batch, use_cache=False)
    except _FirstLayerReached:
        return given[0]
    finally:
        handle.remove()
    raise AssertionError("a model calls its first layer")


def _advance(layer: nn.Module, state: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Of a layer given a hidden state: what attention added to it, the sum, and the next hidden state."""
    sums = []
    handle = layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: sums.append(args[0]))
    following = layer(state, **options)
    handle.remove()
    return sums[0] - state, sums[0], following
