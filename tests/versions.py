"""Versions of other libraries: `python -m tests.versions newest | docs | installed | outdated` (see the Makefile).

newest     prints the requirements of pyproject.toml without bounds, so that pip installs the newest releases
docs       prints the requirements of the documentation site, which needs neither torch nor this package
installed  prints their installed versions
outdated   prints which entries of constraints.txt have a newer release, and exits with 1 if any has
"""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent


def required() -> list[str]:
    """Names in pyproject.toml that the suite needs, without torch, of which constraints.txt names a build for CPUs."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [re.search(rf"^{name} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[1] for name in ("dependencies", "dev")]
    names = [re.match(r"[\w.-]+", entry)[0] for found in lists for entry in re.findall(r'"([^"]+)"', found)]
    return sorted({*names} - {"torch"})


def docs() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"([^"]+)"', re.search(r"^docs = \[(.*)\]", text, re.MULTILINE)[1])


def installed() -> list[str]:
    found = []
    for name in ("torch", *required()):
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return found


def outdated() -> list[str]:
    """Entries of constraints.txt that are installed here and have a newer release, according to pip."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    command = [sys.executable, "-m", "pip", "list", "--outdated", "--format", "json", "--disable-pip-version-check"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    newer = {entry["name"].replace("-", "_"): entry["latest_version"] for entry in json.loads(listed)}
    return [
        f"{name}: constraints.txt has {pinned[name]}, and {newest} is released"
        for name, newest in newer.items()
        if name in pinned and pinned[name] != newest
    ]


if __name__ == "__main__":
    lines = {"newest": required, "docs": docs, "installed": installed, "outdated": outdated}[sys.argv[1]]()
    print("\n".join(lines))
    sys.exit(sys.argv[1] == "outdated" and bool(lines))
