"""Builds the C++ beside this file once per machine, and keeps the library where nobody else can replace it.

A library is code that runs as the user who loads it. So one that was built before is loaded only if that user or the
system's own made it, nobody else can write to it or move it, and its checksum is right. It is built again otherwise.
"""

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from huggingface_hub import constants

from ...whole_files import remove_leftovers, whole_file

HERE = Path(__file__).parent
SOURCES = ("products.cpp", "projections.cpp", "experts.cpp", "attention.cpp", "gradients.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC")
# a compiler that says nothing for longer hangs
MOST_SECONDS = 1800
# hexadecimal digits of a checksum, which the last bytes of a library are: no loader reads what follows the code
CHECKSUM = 64


def load_library() -> None:
    """Loads the library for this source, torch, compiler and CPU into torch, built first if necessary.

    It is kept under HF_HOME. If that folder cannot be written, or if others could exchange what is in it, this process
    builds one for itself and warns.

    Raises:
        RuntimeError: if there is no C++ compiler, or if it fails, hangs, or makes what cannot be loaded.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("expected a C++ compiler, found neither g++ nor clang++; install one, such as Debian's g++.")
    path = Path(constants.HF_HOME, "deepseek_latent", f"kernels-{_digest(compiler)}.so").absolute()
    reason = why_not_safe(path.parent)
    if reason is None:
        if path.parent.is_dir():
            # a whole library is never written again, so this is the time to do it
            remove_leftovers(path)
        damage = why_not_whole(path) or _load(path)
        if damage is None:
            return
        if os.path.lexists(path):
            warnings.warn(f"the kernels are built again, because those kept cannot be used: {damage}.", stacklevel=2)
        reason = _build_kept(compiler, path)
        if reason is None:
            return
    warnings.warn(
        f"the kernels are built for this process alone, because {reason}; to keep them, set HF_HOME to a folder that "
        "only you can write to (HF_HUB_CACHE can still name a folder of models that is shared).",
        stacklevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        _build_and_load(compiler, Path(folder, path.name), "for this process alone")


def why_not_whole(path: Path) -> str | None:
    """Why the library at `path` must not be loaded; None if nobody else can write to it and its checksum is right."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return f"{path} is not a file"
            if reason := _who_else_writes(path, status):
                return reason
            content = file.read()
    except OSError as error:
        return str(error)
    whole = hashlib.sha256(content[:-CHECKSUM]).hexdigest().encode() == content[-CHECKSUM:]
    return None if whole else f"{path} was cut off or altered"


def why_not_safe(folder: Path) -> str | None:
    """Who else than this user and the system's own could exchange files in `folder`, as a sentence; None if nobody."""
    try:
        folders = {folder, *folder.parents, folder.resolve(), *folder.resolve().parents}
        reasons = (_who_else_writes(each, each.stat()) for each in sorted(folders) if each.exists())
        return next(filter(None, reasons), None)
    except OSError as error:
        # such as a folder that this user may not enter
        return f"{folder} cannot be used ({error})"


def _who_else_writes(path: Path, status: os.stat_result) -> str | None:
    user, mode = os.geteuid(), status.st_mode
    # in some containers, the system's own files belong to another number than 0
    if status.st_uid not in (user, 0, Path("/").stat().st_uid):
        return f"{path} belongs to another user"
    # a user's own group, which Linux gives the user's number, has no other members
    is_own_group = stat.S_ISDIR(mode) and status.st_gid == os.getegid() == user
    others = stat.S_IWOTH | (0 if is_own_group else stat.S_IWGRP)
    # from a folder where this bit is set, only their owner can move files away
    is_sticky = stat.S_ISDIR(mode) and mode & stat.S_ISVTX
    return None if is_sticky or not mode & others else f"others can write to {path}"


def _build_kept(compiler: str, path: Path) -> str | None:
    """Builds and loads a library and keeps it at `path`; if it cannot be kept there, says why and loads none."""
    folder, is_loaded = path.parent, False
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if reason := why_not_safe(folder):
            return reason
        if path.exists() and not (path.is_file() or path.is_dir()):
            # such as a pipe, which no writer of this package replaces
            path.unlink()
        with whole_file(path, private=True) as unfinished:
            _build_and_load(compiler, unfinished, f"once, since they are kept in {folder}")
            is_loaded = True
        # others may load it, such as the user of a container whose image was built by root
        path.chmod(0o644)
    except OSError as error:
        if not is_loaded:
            return f"{folder} cannot be written to ({error})"
        warnings.warn(f"the kernels were built and could not be kept in {folder}: {error}.", stacklevel=3)
    return None


def _build_and_load(compiler: str, path: Path, how_often: str) -> None:
    """Builds a library at `path`, in a folder that nobody else uses, and loads it."""
    # nothing else is printed in the minute that this takes
    print(
        f"compiling the operators of deepseek_latent for this CPU, about a minute, {how_often} ...",
        file=sys.stderr,
        flush=True,
    )
    folder, torch_folder = path.parent, Path(torch.__file__).parent
    objects = {HERE / name: folder / f"{name}.o" for name in SOURCES}
    include = f"-I{torch_folder / 'include'}"
    # all files at the same time, since torch's headers take most of the time
    _run([[compiler, *FLAGS, include, "-c", source, "-o", made] for source, made in objects.items()])
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run([[compiler, *FLAGS, "-shared", *objects.values(), *libraries, "-o", path]])
    content = path.read_bytes() if path.is_file() else b""
    with path.open("ab") as file:
        file.write(hashlib.sha256(content).hexdigest().encode())
    if error := _load(path):
        raise RuntimeError(f"{compiler} built kernels that cannot be loaded: {error}")


def _load(path: Path) -> str | None:
    """Loads a library, or says why the system cannot."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{error} ({error.__cause__})"
    return None


def _run(commands: list[list]) -> None:
    running = []
    try:
        for command in commands:
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        errors = "".join(process.communicate(timeout=MOST_SECONDS)[1] for process in running)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{commands[0][0]} did not build the kernels in {MOST_SECONDS} s.") from error
    finally:
        for process in running:
            process.kill()
            process.wait()
    if any(process.returncode for process in running):
        reason = next((line for line in errors.splitlines() if "error" in line or "failed" in line), errors).strip()
        raise RuntimeError(f"{commands[0][0]} could not build the kernels: {reason}")


def _digest(compiler: str) -> str:
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{compiler} does not tell its version: {error}") from error
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [platform.processor()]
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    sources = [path.read_text() for path in sorted(HERE.glob("*.h")) + sorted(HERE.glob("*.cpp"))]
    return hashlib.sha256("\n".join([version, cpu, torch.__version__, *FLAGS, *sources]).encode()).hexdigest()[:16]
