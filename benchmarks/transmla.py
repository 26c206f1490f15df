"""The recipe of TransMLA (arXiv:2502.07864 v3) as in its code, transmla/partial_rope.py and lora_qkv.py.

1. The frequencies are cut into blocks of `fold` neighbors. The keys of all heads at the frequencies of a block are
   mixed by their principal directions (RoRoPE, FreqFold). Of each block, the first `fold / collapse` components keep
   their rotation, the i-th at the block's frequency i * `collapse`, and all heads share them. With `rope_heads`, as the
   class `PartialRope` of that code has it, that many times as many keep it, although its second step refuses them.
2. The other components and the values become principal components (PCA) of the activations of step 1's model, after
   the keys were divided by the ratio of their mean norm to that of the values times `balance` (BKV).

Its damping adds the same number to all eigenvalues and leaves the eigenvectors as they are, so it is left out. There is
no norm over the latents, as by default there.

Letters: those of `partial_rope`, and c latent width, f fold, j components of a block, f g in all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .partial_rope import PartialRope, SourceLayer, as_real


class MixedKeys(NamedTuple):
    """The keys of one layer as components of blocks of frequencies."""

    mix: Tensor  # [p/f f g j] orthogonal: a key is the sum of its components times these
    components: Tensor  # [p/f j d] complex, those that keep their rotation first
    num_kept: int  # components of a block that keep their rotation
    frequencies: Tensor  # [m] of those


def mix_keys(
    source: SourceLayer,
    moments: Tensor,  # [d d]
    *,
    frequencies: Tensor,  # [p]
    fold: int,
    collapse: int,
    rope_heads: int = 1,
) -> MixedKeys:
    if fold % collapse or len(frequencies) % fold:
        raise ValueError(f"expected collapse, fold and the frequencies to divide each other, got {collapse}, {fold}.")
    keys = source.keys.unflatten(0, (-1, fold)).flatten(1, 2)  # [p/f fg d]
    second_moments = (keys @ moments.to(keys.dtype) @ keys.mH).real
    directions = torch.linalg.eigh(second_moments)[1].flip(-1).to(keys.dtype)
    kept_frequencies = frequencies.view(-1, fold)[:, ::collapse].repeat(1, rope_heads)
    mix = directions.unflatten(1, (fold, -1))
    return MixedKeys(mix, directions.mT @ keys, kept_frequencies.shape[1], kept_frequencies.flatten())


def partial_rope(source: SourceLayer, mixed: MixedKeys) -> PartialRope:
    """Step 1 alone."""
    return _assemble(source, mixed, mixed.components[:, mixed.num_kept :], source.values)


def compress(
    source: SourceLayer,
    mixed: MixedKeys,
    moments: Tensor,  # [d d] of the model after step 1
    *,
    c: int,
    balance: float | None,
) -> PartialRope:
    """Both steps: c latents, and 2m rotary elements that all heads share. Without `balance`, keys are not divided."""
    content = mixed.components[:, mixed.num_kept :]
    keys = torch.view_as_real(content).movedim(-1, 0).flatten(0, 2)  # [2(p/f)(j - kept) d]
    values = source.values.flatten(0, 1)

    def mean_norm(x: Tensor) -> Tensor:
        return (x @ moments * x).sum(dim=1).sqrt().mean()

    # its code leaves out as many values as there are rotary elements
    rotary_width = 2 * len(mixed.frequencies)
    ratio = 1.0 if balance is None else mean_norm(keys) / (mean_norm(values[rotary_width:]) * balance)
    y = torch.cat((keys / ratio, values))
    directions = torch.linalg.eigh(y @ moments @ y.T)[1][:, -c:]
    keys, values = (directions @ (directions.T @ y)).split((len(keys), len(values)))
    keys = torch.complex(*(keys * ratio).unflatten(0, (2, *content.shape[:2])).unbind(0))
    return _assemble(source, mixed, keys, values.view_as(source.values))


def _assemble(source: SourceLayer, mixed: MixedKeys, content: Tensor, values: Tensor) -> PartialRope:
    """`content` [p/f j-kept d] are the components without rotation."""
    (h, g), kept = (source.queries.shape[1], source.keys.shape[1]), mixed.num_kept
    queries = source.queries.unflatten(0, mixed.mix.shape[:2])  # [p/f f h d]
    rotary_queries = torch.einsum("ifhj,ifhd->ijhd", mixed.mix[..., :kept].repeat_interleave(h // g, 2), queries)
    rotary_keys = mixed.components[:, :kept].flatten(0, 1)[:, None].expand(-1, g, -1)
    content_keys = torch.einsum("ifgj,ijd->ifgd", mixed.mix[..., kept:], content).flatten(0, 1)
    return PartialRope(
        frequencies=mixed.frequencies.expand(g, -1),
        rotary_queries=as_real(rotary_queries.flatten(0, 1)),
        rotary_keys=as_real(rotary_keys),
        content_queries=as_real(source.queries),
        content_keys=as_real(content_keys),
        values=values,
    )
