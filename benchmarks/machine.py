"""What every result file records about its machine, and how benchmarks take their times."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers


def described(command: str) -> dict:
    """The command, commit, versions, threads, CPU and GPU of a run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], stdout=subprocess.PIPE, text=True).stdout.strip()
    models = {line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")}
    return {
        "command": command,
        "date": date.today().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": ", ".join(models) or platform.processor(),
        "avx512_bf16": any("avx512_bf16" in line for line in cpu_lines()),
    } | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def report(result: dict, out: Path | None) -> None:
    """Prints a result, and writes it if a file is given."""
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def resident(field: str) -> int:
    """Resident bytes of this process, from the field VmRSS (now) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}.")


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def alternated(
    sides: dict[str, Callable[[], object]],
    repetitions: int,
    turn: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times all sides in turn, so that other load on the machine affects all of them; returns the seconds of each.

    The first round is not counted. A side repeats its work for `turn` seconds, at least once: in use, tokens follow
    each other too, and the first of a turn finds the CPU's caches full of another side's code and data.
    """
    taken = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        for name, work in sides.items():
            end, seconds = clock() + turn, [seconds_of(work, clock)]
            while clock() < end:
                seconds.append(seconds_of(work, clock))
            if repetition:
                taken[name] += seconds
    return taken


def yardsticks() -> dict[str, Callable[[], object]]:
    """Two more sides for `alternated`: a dot product of two vectors of 400 MB, and a square float32 matrix product."""
    x, y = (torch.full((100_000_000,), value) for value in (0.5, 0.25))
    square = torch.randn(2048, 2048)
    return {"read 800 MB": lambda: torch.dot(x, y), "product of 2048": lambda: square @ square}


def read_bandwidth(repetitions: int = 5) -> float:
    """Bytes per second of the dot product in `yardsticks`."""
    read = yardsticks()["read 800 MB"]
    return 8e8 / statistics.median(seconds_of(read) for _ in range(repetitions))


def gemm_rate(repetitions: int = 5) -> float:
    """FLOP per second of the matrix product in `yardsticks`."""
    product = yardsticks()["product of 2048"]
    return 2 * 2048**3 / statistics.median(seconds_of(product) for _ in range(repetitions))
