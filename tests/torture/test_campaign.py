"""The campaign notices what it is there to notice: a hang, a crash, a raw exception."""

import time

from deepseek_latent.conversion.source import Source

from .__main__ import run_part
from .campaign import Campaign


def test_a_case_is_drawn_again_from_its_number():
    drawn = [random.random() for random in Campaign(60, max_cases=5).cases()]
    assert len(set(drawn)) == 5
    assert [random.random() for random in Campaign(60, first=3, max_cases=1).cases()] == drawn[3:4]


def test_refusals_are_told_from_raw_exceptions_and_hangs(tmp_path):
    campaign = Campaign(60)
    with campaign.judged("one sentence of ours"):
        Source(tmp_path / "missing")
    with campaign.judged("the right type from elsewhere"):
        int("not a number, though the message is long enough")
    with campaign.judged("too slow", seconds=0.05):
        time.sleep(5)
    with campaign.judged("nothing wrong"):
        pass
    assert campaign.counts == {"refused": 1, "raw exception": 1, "hang": 1, "accepted": 1}


def test_a_part_that_dies_is_a_crash_and_goes_on_with_the_next_case():
    counts, findings = run_part("failing_part", seconds=60, seed=0)
    assert [(finding["kind"], finding["case"]) for finding in findings] == [("crash", "3"), ("wrong answer", "5")]
    assert counts["inputs"] == 7
