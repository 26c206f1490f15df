"""Errors for keyword arguments that a function would pass on, or swallow."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_argument(owner: str, name: str, known: Iterable[str]) -> TypeError:
    """An error for an argument that `owner` does not take; it names the nearest one, or all if there are few."""
    known = [*known]
    near = get_close_matches(name, known, n=1)
    names = ", ".join(known) if len(known) < 9 else f"what help({owner}) lists"
    advice = f"the nearest that it takes is {near[0]!r}." if near else f"it takes {names}."
    return TypeError(f"{owner} got an unexpected keyword argument {name!r}; {advice}")
