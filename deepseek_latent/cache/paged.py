"""Latents in the pages of transformers' continuous batching, which serves requests of any length in one packed row.

Letters: b requests attended to together, s new tokens of each, t visible ones, h heads, n content, r rotary, v value
width, c latent width, p page row width, half of c + r.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from ..compat.transformers import (
    PagedAttentionCache,
    attention_name,
    config_for_pages,
    is_paged,
    update_pages,
    with_pages_for,
)

# bound on the tokens that one call of attention reads for several requests; a longer request is read alone
TOKENS_PER_GROUP = 1 << 16


def page_row_width(cached_width: int) -> int:
    """Elements p of a latent and its rotary key that are stored as "key"; as many are stored as "value".

    transformers' pages hold two rows of one width for every token, meant for a key and a value. Cut in the middle, a
    latent and its rotary key fill both exactly: c + r elements, each stored once, and one idle element if c + r is odd.
    """
    return -(-cached_width // 2)


class Group(NamedTuple):
    """Requests that one call of attention serves: b of them with s new tokens each and at most t visible ones.

    queries  [b s]      where their new tokens are in the packed row, as a slice where b is 1
    visible  [b t]      where their tokens are among all that were read; behind a request's end its last token repeats
    mask     [b 1 1 t]  False behind a request's end; None where all end at t, and then order decides (causal)
    """

    queries: slice | Tensor
    visible: slice | Tensor
    mask: Tensor | None


def group_requests(query_lengths: list[int], key_lengths: list[int]) -> list[list[int]]:
    """Indices of requests by group, each group ordered by length.

    Requests alike in both lengths go together. So do decoding ones whose lengths differ up to twofold: at most half
    of what is read for them is padding, and there are few groups however many requests there are.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(query_lengths)), key=lambda i: (query_lengths[i], key_lengths[i])):
        s, t = query_lengths[i], key_lengths[i]
        if s == 0:
            # transformers pads the list of requests where it compiles
            continue
        if groups and (len(groups[-1]) + 1) * t <= TOKENS_PER_GROUP:
            shortest = groups[-1][0]
            alike = (s, t) == (query_lengths[shortest], key_lengths[shortest])
            both_decode = s == query_lengths[shortest] == 1
            if alike or (both_decode and t <= 2 * key_lengths[shortest]):
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


class PagedLatents:
    """What one forward pass of continuous batching knows: the pages, where to write and read, and who is in the row.

    Made once per forward pass from the pages and the keyword arguments that transformers gives the model. Always true:
    a request reads its own tokens only, in order, and its last new token is the last one it reads. So every request is
    plain causal attention, no mask over all requests is needed, and what one costs does not grow with the others.
    """

    @torch.compiler.disable  # how many groups there are is known only at run time
    def __init__(self, pages: PagedAttentionCache, cached_width: int, arguments: dict[str, Any]):
        self.pages, self.cached_width, self.arguments = pages, cached_width, arguments
        _check_pages(pages, cached_width, arguments["block_table"])
        ends_q, ends_k = arguments["cu_seq_lens_q"], arguments["cu_seq_lens_k"]
        ends_k = ends_k["full_attention"] if isinstance(ends_k, dict) else ends_k
        # the one place where the host waits for the device; all layers share the result
        self.groups = locate_groups(ends_q.tolist(), ends_k.tolist(), ends_k.device)

    @torch.compiler.disable
    def attend(
        self,
        attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        layer_idx: int,
        q_content: Tensor,  # [1 s h n]  all requests, packed
        q_rotary: Tensor,  # [1 s h r]
        latent: Tensor,  # [1 1 s c]
        k_rotary: Tensor,  # [1 1 s r]
    ) -> Tensor:  # [1 s h v]
        """Writes the new latents to the layer's pages and attends to each request's own.

        `attention` takes q_content [b s h n], q_rotary [b s h r], rows of latent and rotary key side by side
        [b t c+r] and a mask, and gives the context [b s h v]. Padding tokens get zeros.
        """
        first, second = self._write_and_read(torch.cat((latent, k_rotary), dim=-1), layer_idx)
        context = None
        for queries, visible, mask in self.groups:
            rows = torch.cat((_pick(first, visible), _pick(second, visible)), dim=-1)[..., : self.cached_width]
            part = attention(_pick(q_content[0], queries), _pick(q_rotary[0], queries), rows, mask)
            if context is None:
                context = part.new_zeros(q_content.shape[1], *part.shape[2:])
            context[queries] = part
        return context[None]

    def _write_and_read(self, rows: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """New rows [1 1 s c+r] into the pages; the halves of all visible ones, each [t p], request after request."""
        if rows.dtype != self.pages.dtype:
            raise ValueError(
                f"the pages hold {self.pages.dtype}, the new latents are {rows.dtype}; load the model in one dtype."
            )
        p = page_row_width(self.cached_width)
        halves = F.pad(rows, (0, 2 * p - self.cached_width)).split(p, dim=-1)
        first, second = update_pages(self.pages, halves, layer_idx, self.arguments)
        return first.reshape(-1, p), second.reshape(-1, p)


def _check_pages(pages: PagedAttentionCache, cached_width: int, block_table: Tensor | None) -> None:
    p = page_row_width(cached_width)
    if (pages.config.num_key_value_heads, pages.config.head_dim) != (1, p):
        raise ValueError(
            f"continuous batching needs pages made for latents, 1 head of width {p}, got "
            f"{pages.config.num_key_value_heads} of width {pages.config.head_dim}; start it with the model's own "
            "generate_batch or init_continuous_batching."
        )
    if block_table is not None:
        raise ValueError("latents cannot be read through a block table; set max_blocks_per_request to 0.")


def check_unpaged(config: PreTrainedConfig) -> None:
    """Refuses a plain forward pass under a name for which transformers makes no mask: padding would be attended to."""
    if is_paged(config):
        name = attention_name(config)
        raise ValueError(
            f"attn_implementation 'paged|{name}' is for continuous batching (generate_batch); "
            f"call set_attn_implementation({name!r}) for a plain forward pass."
        )


def locate_groups(ends_q: list[int], ends_k: list[int], device: torch.device) -> list[Group]:
    """Groups of the requests whose new and visible tokens end at these places of the packed rows, the first at 0."""
    query_lengths, key_lengths = ([end - start for start, end in pairwise(ends)] for ends in (ends_q, ends_k))
    groups = []
    for members in group_requests(query_lengths, key_lengths):
        s, t = query_lengths[members[-1]], key_lengths[members[-1]]
        if len(members) == 1:
            start_q, start_k = ends_q[members[0]], ends_k[members[0]]
            groups.append(Group(slice(start_q, start_q + s), slice(start_k, start_k + t), None))
            continue
        start_q, start_k, lengths = (
            torch.tensor([of[i] for i in members], device=device)[:, None] for of in (ends_q, ends_k, key_lengths)
        )
        order = torch.arange(t, device=device)
        # a token of its own, so that nothing of one request, be it NaN, reaches another through a weight of zero
        visible = start_k + order.minimum(lengths - 1)
        mask = None if key_lengths[members[0]] == t else (order < lengths)[:, None, None]
        groups.append(Group(start_q + torch.arange(s, device=device), visible, mask))
    return groups


def _pick(rows: Tensor, where: slice | Tensor) -> Tensor:
    return rows[where][None] if isinstance(where, slice) else rows[where]


def check_batching_config(given: Any) -> None:
    """Refuses what was asked for and cannot be done with latents; `given` is a ContinuousBatchingConfig or None."""
    if given is not None and (any(given.cuda_graph_booleans) or given.max_blocks_per_request):
        raise ValueError(
            "continuous batching of latents groups requests by their lengths at every step, so it has no CUDA graphs "
            "and no block tables; leave use_cuda_graph and max_blocks_per_request unset."
        )


def with_latent_pages(manager: Any) -> Any:
    """Has `manager`, a ContinuousBatchingManager, make its pages for latents; returns it.

    One head of width p makes 2 p = c + r elements per token and layer.
    """
    manager.continuous_batching_config.use_cuda_graph = (False, False)
    manager.continuous_batching_config.max_blocks_per_request = 0
    return with_pages_for(manager, lambda config: config_for_pages(config, 1, page_row_width(config.cached_width)))
