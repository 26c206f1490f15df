"""Requests in pages are grouped so that each one is read once and attends only to its own tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_latent.cache import paged as paged_latents
from deepseek_latent.cache.paged import locate_groups
from deepseek_latent.cache.segments import Latents, SplitSegment
from tests.support import tiny_model

lengths = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), min_size=1, max_size=12)


@given(lengths, st.integers(1, 64))
def test_every_request_is_read_once_and_attends_only_to_itself(lengths, tokens_per_group):
    """`lengths` has the new and the cached tokens of each request; one without new tokens pads the list."""
    ends_q, ends_k = [0], [0]
    for new, cached in lengths:
        ends_q.append(ends_q[-1] + new)
        ends_k.append(ends_k[-1] + (new + cached if new else 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_latents, "TOKENS_PER_GROUP", tokens_per_group)
        groups = locate_groups(ends_q, ends_k, torch.device("cpu"))
    served = []
    for queries, visible, mask in groups:
        queries, visible = (torch.arange(x.stop)[x][None] if isinstance(x, slice) else x for x in (queries, visible))
        assert len(queries) == 1 or visible.numel() <= tokens_per_group
        assert mask is None or queries.shape[1] == 1
        for i, (row, columns) in enumerate(zip(queries.tolist(), visible.tolist())):
            request = ends_q.index(row[0] + len(row))
            served.append(request)
            assert row == list(range(ends_q[request - 1], ends_q[request]))
            own = list(range(ends_k[request - 1], ends_k[request]))
            seen = columns if mask is None else [k for k, see in zip(columns, mask[i, 0, 0].tolist()) if see]
            assert seen == own
            assert set(columns) == set(own)
            assert len(columns) <= 2 * len(own)
    assert sorted(served) == [i + 1 for i, (new, _) in enumerate(lengths) if new]


@torch.no_grad()
def test_tokens_of_a_packed_row_that_belong_to_no_request_get_zeros():
    class Pages:
        """One request, between a token of padding before it and two after it."""

        def append(self, latent, k_rotary, layer_idx):
            yield slice(1, 4), Latents(SplitSegment(latent[:, 0, 1:4], k_rotary[:, 0, 1:4])), None

    attention = tiny_model().model.layers[0].self_attn
    hidden, rotation = torch.randn(1, 6, attention.config.hidden_size), (torch.ones(1, 6, 4), torch.zeros(1, 6, 4))
    context = attention.attend_to_pages(*attention.project(hidden, rotation), Pages())
    assert (context[:, [0, 4, 5]] == 0).all()
    assert (context[:, 1:4] != 0).all()
