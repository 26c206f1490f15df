"""The operators in C++ with random arguments, right and wrong ones, under AddressSanitizer and UBSan.

Each call must be refused in a sentence or give what torch computes in float64. The library is built with both
sanitizers, so that a read or write out of bounds ends the process with a report, which counts as a crash.
"""

import os
import random
import subprocess
import sys

from .campaign import Campaign

FLAGS = ("-std=c++20", "-O1", "-g1", "-march=native", "-fopenmp", "-fPIC", "-fno-omit-frame-pointer")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OPTIONS = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096:exitcode=99"


def run(campaign: Campaign) -> None:
    if "LD_PRELOAD" not in os.environ:
        _start_again(campaign)
    # not for the compiler
    del os.environ["LD_PRELOAD"]
    with campaign.preparing():
        # torch is imported late, since nothing of it is left when the process starts again
        from deepseek_latent.kernels.cpu import build, library
        from tests.kernels.operator_calls import judge
        from tests.kernels.operator_references import REFERENCES

        build.FLAGS = (*FLAGS, *SANITIZERS)
        library.load_operators()
    for source in campaign.cases():
        operator = source.choice([*REFERENCES])
        arguments, changes = _arguments(operator, source)
        verdict = judge(operator, arguments)
        campaign.count(f"{operator} calls")
        if verdict in ("right", "refused"):
            campaign.count(verdict)
        else:
            kind, reason = verdict.split(": ", 1)
            campaign.finding(kind, f"{operator} with {' and '.join(changes) or 'right arguments'}: {reason}")


def _arguments(operator: str, source: random.Random) -> tuple[dict, list[str]]:
    """Arguments that were right before up to two changes, and what these were."""
    from tests.kernels.operator_calls import CHANGES, changed, draw, places_of, with_other_options

    arguments, changes = draw(operator, source), []
    for _ in range(source.choice([0, 1, 1, 2])):
        if source.random() < 0.2:
            arguments = with_other_options(arguments, source)
            changes.append("options")
        elif places := places_of(arguments):
            place, change = source.choice(places), source.choice(CHANGES)
            other = changed(arguments, place, change, source)
            arguments = other or arguments
            changes += [f"{change.__name__} {place}"] if other else []
    return arguments, changes


def _start_again(campaign: Campaign) -> None:
    """Starts this process again with AddressSanitizer loaded before everything else, as it has to be."""
    # AddressSanitizer looks for the function that throws exceptions when it starts, and python has none
    libraries = [_path_of(name) for name in ("libasan.so", "libstdc++.so")]
    # `run_watched` has pointed stdout to stderr
    os.dup2(campaign.watcher.fileno(), 1)
    own = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": OPTIONS, "UBSAN_OPTIONS": "print_stacktrace=1"}
    os.execve(sys.executable, sys.orig_argv, os.environ | own)


def _path_of(library: str) -> str:
    command = ["g++", f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
