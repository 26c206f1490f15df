"""The recipe of MHA2MLA (arXiv:2502.14837) as in its code, the files patch_func.py, patching_model_load.py, 2_norm.py.

1. Each key head keeps RoPE at some of its frequencies: the highest, the lowest, evenly spaced ones, or those where the
   mean norms of queries and keys have the largest product ("2-norm"). The others lose their rotation.
2. The weights of these others and of the values are cut to a low rank by one singular value decomposition ("joint") or
   by one each ("split"). No activations are used.

Rotary keys are cached for every key head, so its model is not DeepSeek's: equal caches leave it fewer latents.

Letters: those of `partial_rope`.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .partial_rope import PartialRope, SourceLayer, as_real, run

SELECTIONS = ("high", "low", "uniform", "2-norm")
DECOMPOSITIONS = ("joint", "split")


@torch.no_grad()
def norm_products(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """[g p] of each layer: mean norm of keys at each frequency times that of queries, summed over the query heads."""
    width, g = model.model.layers[0].self_attn.head_dim, model.config.num_key_value_heads
    norms = []

    def accumulate(total: Tensor):
        def hook(module, args, output):
            pairs = output.flatten(0, 1).unflatten(1, (-1, 2, width // 2))  # [tokens heads 2 p]
            total.add_(pairs.double().norm(dim=2).sum(dim=0) / windows.numel())

        return hook

    handles = []
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            norms.append(torch.zeros(projection.out_features // width, width // 2, dtype=torch.float64))
            handles.append(projection.register_forward_hook(accumulate(norms[-1])))
    run(model, windows)
    for handle in handles:
        handle.remove()
    return [q.unflatten(0, (g, -1)).sum(dim=1) * k for q, k in zip(norms[::2], norms[1::2])]


def choose_frequencies(selection: str, products: Tensor, num_kept: int) -> Tensor:
    """[g m]: the frequencies that keep their rotation in each key head. `products` [g p] are those of norm_products."""
    g, p = products.shape
    if selection == "2-norm":
        return products.topk(num_kept).indices
    if selection == "uniform" and p % num_kept:
        raise ValueError(f"expected evenly spaced frequencies to divide {p}, got {num_kept}.")
    chosen = {
        "high": torch.arange(num_kept),
        "low": torch.arange(p - num_kept, p),
        "uniform": torch.arange(0, p, p // num_kept),
    }[selection]
    return chosen.expand(g, -1)


def convert(
    source: SourceLayer,
    kept: Tensor,  # [g m] from choose_frequencies
    *,
    frequencies: Tensor,  # [p]
    rank: int | None = None,
    decomposition: str = "joint",
) -> PartialRope:
    """One layer that caches 2m elements of every key head and `rank` latents; without `rank`, step 1 alone."""
    p, g, _ = source.keys.shape
    is_kept = torch.zeros(g, p, dtype=torch.bool).scatter_(1, kept, True)
    # stable, so the kept ones come first and frequencies stay in order
    order = (~is_kept).to(torch.uint8).argsort(dim=1, stable=True)  # [g p]
    rotary, content = order.split((kept.shape[1], p - kept.shape[1]), dim=1)

    def select(x: Tensor, chosen: Tensor) -> Tensor:  # [p heads d] and [g m] to [heads 2m d]
        chosen = chosen.repeat_interleave(x.shape[1] // g, dim=0).T
        return as_real(x.gather(0, chosen[..., None].expand(-1, -1, x.shape[2])))

    keys, values = select(source.keys, content), source.values
    if rank is not None and decomposition == "joint":
        both = low_rank(torch.cat((keys.flatten(0, 1), values.flatten(0, 1))), rank)
        keys, values = (x.view_as(y) for x, y in zip(both.split((keys[..., 0].numel(), g * 2 * p)), (keys, values)))
    elif rank is not None:
        keys, values = (low_rank(x.flatten(0, 1), rank // 2).view_as(x) for x in (keys, values))
    return PartialRope(
        frequencies=frequencies[rotary],
        rotary_queries=select(source.queries, rotary),
        rotary_keys=select(source.keys, rotary),
        content_queries=select(source.queries, content),
        content_keys=keys,
        values=values,
    )


def low_rank(weight: Tensor, rank: int) -> Tensor:
    """The best approximation of a weight [out d] with this rank."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]
