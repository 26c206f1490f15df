"""What every part of the campaign shares: random cases for a given time, a limit for each, and counts of what happened.

A part is a module of this folder with a function `run(campaign)`. It draws cases from `campaign.cases()`, does one
thing with each, and reports what must not happen by `campaign.finding(...)`; all else is counted with `count`.
"""

import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

PACKAGE = Path(__file__).parents[2] / "deepseek_latent"
# what must not happen, in the order of the table
KINDS = ("hang", "crash", "raw exception", "wrong answer", "half output", "leak")
SECONDS_PER_CASE = 2.0


class Hang(BaseException):
    """A case took longer than it may. Not an Exception, so that no code under test can catch it by mistake."""


class Campaign:
    """One run of one part in this process.

    Cases are numbered; case i is drawn from `Random(f"{seed}/{i}")`, so `first=i, max_cases=1` repeats it alone.
    """

    def __init__(self, seconds: float, *, seed: int = 0, first: int = 0, max_cases: int | None = None):
        self.seconds, self.seed, self.first, self.max_cases = seconds, seed, first, max_cases
        self.counts: Counter[str] = Counter()
        self.findings: list[dict[str, str]] = []
        self.case: int | None = None
        self.watcher: TextIO | None = None

    def cases(self) -> Iterator[random.Random]:
        """A source of randomness for each case, until the time is over or `max_cases` were done."""
        end, done = time.monotonic() + self.seconds, 0
        while time.monotonic() < end and done != self.max_cases:
            self.case = self.first + done
            self._report({"case": self.case})
            self.counts["inputs"] += 1
            yield random.Random(f"{self.seed}/{self.case}")
            done += 1

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """For a block that may be silent for longer than the one that watches would wait."""
        done = threading.Event()

        def tell():
            while not done.wait(20):
                self._report({"case": self.first})

        teller = threading.Thread(target=tell)
        teller.start()
        try:
            yield
        finally:
            done.set()
            teller.join()

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] += number

    def finding(self, kind: str, text: str) -> None:
        """Notes something that must not happen; `kind` is one of KINDS."""
        assert kind in KINDS, kind
        self.counts[kind] += 1
        self.findings.append({"kind": kind, "case": str(self.case), "text": text})
        self._report({"finding": self.findings[-1]})

    @contextmanager
    def judged(
        self, what: str, *, refusals: tuple[type[Exception], ...] = (ValueError, TypeError, OSError), seconds: float = 0
    ) -> Iterator[None]:
        """Runs a block that may succeed or refuse its input, and counts which of the two it did.

        To refuse means to raise one of `refusals` from a line of this package, in one sentence of a bearable length.
        Anything else that is raised is a raw exception, and more than `seconds` (default: 2) a hang.
        """
        try:
            with time_limit(seconds or SECONDS_PER_CASE):
                yield
            self.count("accepted")
        except Hang:
            self.finding("hang", f"{what}: more than {seconds or SECONDS_PER_CASE:g} s")
        except Exception as error:
            if is_refusal(error, refusals):
                self.count("refused")
            else:
                place = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{type(error).__name__}: {str(error)[:300]}"
                self.finding("raw exception", f"{what}: {reason} ({Path(place.filename).name}:{place.lineno})")

    def _report(self, line: dict) -> None:
        """Tells the process that watches this one what is being done, so that a crash can be laid to its case."""
        if self.watcher is not None:
            print(json.dumps(line), file=self.watcher, flush=True)


def is_refusal(error: Exception, refusals: tuple[type[Exception], ...]) -> bool:
    """True if a line of this package raised `error` on purpose, with a message that a person can read."""
    raised_by = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, refusals) and PACKAGE in raised_by.parents and 10 < len(str(error)) < 1200


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Hang in the main thread if the block takes longer."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_watched(run, campaign: Campaign) -> None:
    """Runs a part in this process and writes what happens to stdout, a JSON object per line, for the one that watches.

    What the code under test prints goes to stderr.
    """
    faulthandler.enable(sys.stderr)
    campaign.watcher = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run(campaign)
    campaign._report({"counts": campaign.counts})
