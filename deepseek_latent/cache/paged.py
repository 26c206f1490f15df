"""Latents in the pages of transformers' continuous batching, which packs requests of any length into one row.

Letters: b requests in a group, s new tokens of each, t visible tokens, c latent width, r rotary width, p width of a
page's row, half of c + r.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from ..compat.pages import PagedAttentionCache, update_pages
from ..compat.transformers import attention_name, is_paged
from .format import LatentFormat
from .segments import Latents, Segment

# the most tokens that attention reads for a group of several requests; a longer request is a group by itself
TOKENS_PER_GROUP = 1 << 16


def page_row_width(cached_width: int) -> int:
    """The width p of the two rows, "key" and "value", that hold a latent and its rotary key.

    transformers' pages have two rows of the same width for each token, meant for its key and its value. A latent and
    its rotary key are cut in the middle and fill both: c + r elements, and one unused element if c + r is odd.
    """
    return -(-cached_width // 2)


class Group(NamedTuple):
    """Requests that one call of attention serves: b requests with s new tokens each and at most t visible ones.

    queries  [b s]      indices of their new tokens in the packed row, or a slice if b is 1
    visible  [b t]      indices of their tokens among all that were read; after a request's end its last token repeats
    mask     [b 1 1 t]  False after a request's end; None, which is causal, if all requests have t tokens
    """

    queries: slice | Tensor
    visible: slice | Tensor
    mask: Tensor | None


def group_requests(query_lengths: list[int], key_lengths: list[int]) -> list[list[int]]:
    """Groups requests, and returns the indices of each group ordered by length.

    Requests with the same two lengths form a group. So do requests that decode one token and whose lengths differ by
    at most a factor of two: then at most half of the tokens read are padding, and the number of groups stays small.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(query_lengths)), key=lambda i: (query_lengths[i], key_lengths[i])):
        s, t = query_lengths[i], key_lengths[i]
        if s == 0:
            # transformers pads the list of requests if it compiles
            continue
        if groups and (len(groups[-1]) + 1) * t <= TOKENS_PER_GROUP:
            shortest = groups[-1][0]
            same_lengths = (s, t) == (query_lengths[shortest], key_lengths[shortest])
            both_decode = s == query_lengths[shortest] == 1
            if same_lengths or (both_decode and t <= 2 * key_lengths[shortest]):
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


class PagedLatents:
    """The pages of one forward pass of continuous batching, and which tokens of the packed row belong to a request.

    It is made once per forward pass, from the pages and the keyword arguments that transformers passes to the model.
    A request attends to its own tokens only, in order, and its last new token is the last one that it attends to. So
    each request is plain causal attention, needs no mask over all requests, and costs the same whatever the others are.
    """

    @torch.compiler.disable  # the number and sizes of groups are known only at run time
    def __init__(self, pages: PagedAttentionCache, cached_width: int, arguments: dict[str, Any]):
        self.pages, self.cached_width, self.arguments = pages, cached_width, arguments
        _check_pages(pages, cached_width, arguments["block_table"])
        ends_q, ends_k = arguments["cu_seq_lens_q"], arguments["cu_seq_lens_k"]
        ends_k = ends_k["full_attention"] if isinstance(ends_k, dict) else ends_k
        # only here the host waits for the device; all layers use the result
        self.groups = locate_groups(ends_q.tolist(), ends_k.tolist(), ends_k.device)

    def append(
        self,
        latent: Tensor,  # [1 1 s c]  all requests, packed
        k_rotary: Tensor,  # [1 1 s r]
        layer_idx: int,
    ) -> Iterator[tuple[slice | Tensor, Latents, Tensor | None]]:
        """Writes new tokens to the layer's pages, and returns queries, latents and mask of each group (see `Group`).

        `select_tokens` takes the group's queries from the packed row. Latents are read when the group is reached.
        """
        row_format = LatentFormat(latent.shape[-1], k_rotary.shape[-1], latent.dtype)
        halves = self._write_and_read(row_format.encode(latent, k_rotary), layer_idx)

        def latents_of(visible: slice | Tensor) -> Latents:
            rows = torch.cat([select_tokens(half, visible) for half in halves], dim=-1)
            return Latents(Segment(rows[..., : self.cached_width], row_format))

        return ((queries, latents_of(visible), mask) for queries, visible, mask in self.groups)

    def _write_and_read(self, rows: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Writes rows [1 1 s c+r] to the pages, and reads the two halves [t p] of all visible rows of all requests."""
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
    """Refuses a plain forward pass with a paged implementation, for which transformers makes no mask of padding."""
    if is_paged(config):
        name = attention_name(config)
        raise ValueError(
            f"attn_implementation 'paged|{name}' is for continuous batching (generate_batch); "
            f"call set_attn_implementation({name!r}) for a plain forward pass."
        )


def locate_groups(ends_q: list[int], ends_k: list[int], device: torch.device) -> list[Group]:
    """Groups requests by where their new and visible tokens end in the packed rows; both lists start with 0."""
    query_lengths, key_lengths = ([end - start for start, end in pairwise(ends)] for ends in (ends_q, ends_k))
    groups = []
    for members in group_requests(query_lengths, key_lengths):
        s, t = query_lengths[members[-1]], key_lengths[members[-1]]
        if len(members) == 1:
            start_q, start_k = ends_q[members[0]], ends_k[members[0]]
            groups.append(Group(slice(start_q, start_q + s), slice(start_k, start_k + t), None))
            continue
        start_q, start_k, lengths = (
            torch.tensor([values[i] for i in members], device=device)[:, None]
            for values in (ends_q, ends_k, key_lengths)
        )
        offsets = torch.arange(t, device=device)
        # padding repeats the request's own token, so that a NaN of another request cannot spread by a weight of zero
        visible = start_k + offsets.minimum(lengths - 1)
        mask = None if key_lengths[members[0]] == t else (offsets < lengths)[:, None, None]
        groups.append(Group(start_q + torch.arange(s, device=device), visible, mask))
    return groups


def select_tokens(packed: Tensor, indices: slice | Tensor) -> Tensor:
    """Takes the tokens of a group, [b s ...], from a packed row [s' ...]; a slice is one request."""
    return packed[indices][None] if isinstance(indices, slice) else packed[indices]
