"""What a model card keeps of the card of its source, whose text may be anything."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# a field and the indented or listed lines below it
_FIELD = r"^{name}[ \t]*:.*(?:\r?\n[ \t#-].*)*"
# such as "apache-2.0" and "pt-BR": nothing in it is markup
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
MAX_FIELD = 4_000  # characters


class SourceCard(NamedTuple):
    """License and languages of a README.md, and a warning if one of them cannot be read."""

    license: str | None = None
    language: str | list[str] | None = None
    warning: str | None = None


def read_card(folder: Path) -> SourceCard:
    """The card of a checkpoint. It never fails: what cannot be read is left out, with a warning.

    Only the two fields are parsed, so whatever stands beside them does no harm.
    """
    file = folder / "README.md"
    if not file.is_file():
        return SourceCard()
    metadata = _METADATA.match(file.read_bytes().decode("utf-8", errors="replace"))
    if metadata is None:
        return SourceCard()
    values = {}
    for name in ("license", "language"):
        if field := re.search(_FIELD.format(name=name), metadata[1], re.MULTILINE):
            values[name] = _parse(field[0], name)
    unread = " and ".join(name for name, value in values.items() if value is None)
    warning = f"the {unread} in {file} cannot be read, so the new model card has none; add it there."
    return SourceCard(**values, warning=warning if unread else None)


def _parse(text: str, name: str) -> Any:
    """The identifier or, for languages, the list of identifiers that a field holds; None if it holds anything else."""
    if len(text) > MAX_FIELD:
        return None
    try:
        value = yaml.safe_load(text)[name]
    # a date that does not exist is a ValueError
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if name == "language":
        # "no" is Norwegian, and false in YAML
        no = {False: "no"}
        value = [no.get(x, x) if isinstance(x, bool) else x for x in value] if isinstance(value, list) else value
        value = "no" if value is False else value
    texts = value if isinstance(value, list) and name == "language" else [value]
    return value if texts and all(isinstance(each, str) and _IDENTIFIER.fullmatch(each) for each in texts) else None
