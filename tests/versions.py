"""Versions of other libraries: `python -m tests.versions newest | installed | outdated` (see the Makefile).

newest     prints the requirements of pyproject.toml without their bounds, for pip to take what is served
installed  prints what is installed of them
outdated   prints what of constraints.txt is behind the registry, and exits with 1 if something is
"""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent


def required() -> list[str]:
    """Names in pyproject.toml that the suite needs; torch is left to constraints.txt, which names a build for CPUs."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [re.search(rf"^{name} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[1] for name in ("dependencies", "dev")]
    names = [re.match(r"[\w.-]+", entry)[0] for found in lists for entry in re.findall(r'"([^"]+)"', found)]
    return sorted({*names} - {"torch"})


def installed() -> list[str]:
    found = []
    for name in ("torch", *required()):
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return found


def outdated() -> list[str]:
    """What pip finds newer than what constraints.txt has, of what is installed here."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    command = [sys.executable, "-m", "pip", "list", "--outdated", "--format", "json", "--disable-pip-version-check"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    newer = {entry["name"].replace("-", "_"): entry["latest_version"] for entry in json.loads(listed)}
    return [
        f"{name}: constraints.txt has {pinned[name]}, {newest} is served"
        for name, newest in newer.items()
        if name in pinned and pinned[name] != newest
    ]


if __name__ == "__main__":
    lines = {"newest": required, "installed": installed, "outdated": outdated}[sys.argv[1]]()
    print("\n".join(lines))
    sys.exit(sys.argv[1] == "outdated" and bool(lines))
