"""The soak tells a leak from noise."""

import random

import pytest

from .campaign import Campaign
from .soak import FEWEST_ROUNDS, judge


def rounds_of(bytes_per_call=0, files_per_call=0.0, calls=12, number=60):
    """What the soak measures: resident bytes with jumps of some hundred kilobytes, open files, threads."""
    noise = random.Random(0)
    return [
        (500_000_000 + i * calls * bytes_per_call + noise.randrange(300_000), 6 + int(i * calls * files_per_call), 2)
        for i in range(number)
    ]


@pytest.mark.parametrize(
    ("leak", "found"), [({}, 0), ({"bytes_per_call": 100_000}, 1), ({"files_per_call": 1 / 12}, 1)], ids=str
)
def test_a_leak_is_told_from_noise(leak, found):
    campaign = Campaign(1)
    judge(campaign, rounds_of(**leak), 12)
    assert campaign.counts["leak"] == found


def test_too_few_rounds_are_not_judged():
    campaign = Campaign(1)
    judge(campaign, rounds_of(100_000, number=FEWEST_ROUNDS - 1), 12)
    assert campaign.findings == []
