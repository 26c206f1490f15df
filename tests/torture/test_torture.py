"""The campaign of `make torture` in a short form: every part for some seconds, without a finding."""

import pytest

from .__main__ import PARTS, run_part


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_short_campaign_finds_nothing(part):
    counts, findings = run_part(part, seconds=30, seed=0)
    assert counts["inputs"] > 0
    assert findings == []
