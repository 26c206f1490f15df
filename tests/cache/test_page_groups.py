"""Requests in pages are grouped so that each one is read once and attends only to its own tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_latent.cache import paged as paged_latents
from deepseek_latent.cache.paged import locate_groups

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
