"""Progress of long work on stderr: a bar on a terminal, and one line where nobody watches."""

import sys
from collections.abc import Sequence

from tqdm import tqdm


def track(items: Sequence, description: str) -> tqdm:
    """Iterates over items with a bar, or after a line with the description if stderr is not a terminal."""
    announce_without_terminal(description)
    return _bar(items, desc=description)


def track_briefly(items: Sequence, description: str) -> tqdm:
    """Iterates over items with a bar that is removed at the end, and without a line elsewhere than on a terminal."""
    return _bar(items, desc=description, leave=False)


def track_bytes(total: int, description: str, done: int = 0) -> tqdm:
    """A bar of bytes that the caller updates, or a line with the description if stderr is not a terminal."""
    announce_without_terminal(description)
    return _bar(desc=description, total=total, initial=done, unit="B", unit_scale=True)


def announce(stage: str) -> None:
    """Prints one line for work that has no steps to count."""
    print(f"{stage} ...", file=sys.stderr)


def announce_without_terminal(stage: str) -> None:
    if not sys.stderr.isatty():
        announce(stage)


def _bar(*items: Sequence, **options) -> tqdm:
    # as in huggingface_hub, None means no bar if stderr is not a terminal
    return tqdm(*items, disable=None, **options)
