"""Text that strangers wrote, such as the names in their files, made safe for a terminal and for Markdown."""

import re

MAX_NAME_LENGTH = 200


def printable(text: str) -> str:
    """`text` with escapes such as \\x1b in place of what a terminal acts on and of what hides or reorders text."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def shortened(text: str, length: int) -> str:
    """`text` without its middle if it is longer than `length`, and without a part of a word if it has several."""
    if len(text) <= length:
        return text
    half = (length - 5) // 2
    beginning, end = text[:half], text[-half:]
    return f"{beginning.rpartition(' ')[0] or beginning} ... {end.partition(' ')[2] or end}"


def code_span(text: str) -> str:
    """A name as code within a line of Markdown, where nothing in it is markup."""
    text = shortened(printable(text), MAX_NAME_LENGTH)
    fence = "`" * (_longest_run(text) + 1)
    # the spaces are not shown
    return f"{fence} {text} {fence}" if "`" in text or not text.strip() else f"{fence}{text}{fence}"


def code_block(text: str, language: str) -> str:
    """A line of code as a block of Markdown."""
    text = printable(text)
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    """The length of the longest row of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
