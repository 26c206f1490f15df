"""Builds the C++ beside this file once per machine, and makes its operators known to torch and torch.compile.

Letters: n rows of a weight, k their width.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = ("products.cpp", "projections.cpp", "experts.cpp", "attention.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC")

# dtypes whose products torch would emulate on this CPU; known once the operators are loaded
SLOW_IN_TORCH: set[torch.dtype] = set()

operators = torch.ops.deepseek_latent


class WithOperators(functools.partial):
    """A function bound to a module whose copy, also one unpickled in another process, finds the operators loaded."""

    def __setstate__(self, state: tuple) -> None:
        super().__setstate__(state)
        load_operators()


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None) -> Tensor:
    """`F.linear` of x [.. k] by weight [n k], for int8 codes with scales [n groups]: [.. n] in the dtype of x."""
    y = operators.linear(x.reshape(-1, x.shape[-1]).contiguous(), weight, scales).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


@functools.cache
def load_operators() -> str:
    """Registers `torch.ops.deepseek_latent`, built first if necessary, and returns which instructions it uses.

    Raises:
        RuntimeError: if there is no C++ compiler, or if it fails.
    """
    torch.ops.load_library(_build_library())
    torch.library.register_fake("deepseek_latent::linear", _linear)
    torch.library.register_fake("deepseek_latent::grouped", _grouped)
    for name in ("experts", "mlp", "rms_norm", "rotate", "attend"):
        torch.library.register_fake(f"deepseek_latent::{name}", _like_the_first)
    torch.library.register_fake("deepseek_latent::absorb", _absorb)
    torch.library.register_fake("deepseek_latent::expand", _expand)
    torch.library.register_fake("deepseek_latent::project", _project)
    torch.library.register_fake("deepseek_latent::attention", _attention)
    if not operators.has_bfloat16_products():
        SLOW_IN_TORCH.add(torch.bfloat16)
    return operators.instructions()


def _build_library() -> Path:
    """The path of the library for this source, torch, compiler and CPU. Built if necessary, and kept under HF_HOME."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("expected a C++ compiler, found neither g++ nor clang++; install one, such as Debian's g++.")
    path = Path(constants.HF_HOME, "deepseek_latent", f"kernels-{_digest(compiler)}.so")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = {HERE / name: f"{folder}/{name}.o" for name in SOURCES}
        include = f"-I{torch_folder / 'include'}"
        # all files at the same time, since torch's headers take most of the time
        _run([[compiler, *FLAGS, include, "-c", source, "-o", made] for source, made in objects.items()])
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([[compiler, *FLAGS, "-shared", *objects.values(), *libraries, "-o", f"{folder}/done.so"]])
        os.replace(f"{folder}/done.so", path)
    return path


def _run(commands: list[list]) -> None:
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = "".join(process.communicate()[1] for process in running)
    if any(process.returncode for process in running):
        reason = next((line for line in errors.splitlines() if "error" in line), errors).strip()
        raise RuntimeError(f"{commands[0][0]} could not build the kernels: {reason}")


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [platform.processor()]
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    sources = [path.read_text() for path in sorted(HERE.glob("*.h")) + sorted(HERE.glob("*.cpp"))]
    return hashlib.sha256("\n".join([version, cpu, torch.__version__, *FLAGS, *sources]).encode()).hexdigest()[:16]


# shapes and dtypes of results, for torch.compile


def _linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _grouped(x: Tensor, weight: Tensor, ends: Tensor, scales: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _like_the_first(x: Tensor, *rest) -> Tensor:
    return torch.empty_like(x)


def _absorb(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], w.shape[-1], dtype=torch.float32)


def _expand(x: Tensor, w: Tensor) -> Tensor:
    return w.new_empty(*x.shape[:2], w.shape[1])


def _project(q_x, q, q_scales, x, kv_a, *rest) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], q.shape[0]), x.new_empty(*x.shape[:2], kv_a.shape[0])


def _attention(q_content: Tensor, q_rotary: Tensor, w_uk: Tensor, w_uv: Tensor, *rest) -> Tensor:
    return w_uv.new_empty(*q_content.shape[:3], w_uv.shape[1])
