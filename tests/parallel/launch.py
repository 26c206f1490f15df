"""Runs a program of this folder in several gloo processes, or in one."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def run(program: str, *arguments, processes: int) -> None:
    """Runs a program with these arguments; AssertionError with the end of its output if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(FOLDER / program), *map(str, arguments)]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 600}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout[-3000:]


def finish() -> None:
    """Ends a process after the others have come here: gloo's threads may abort one that ends as usual."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        os._exit(0)
