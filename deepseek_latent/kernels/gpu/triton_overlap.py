"""Kernels that start while the kernel ahead of them still runs (programmatic dependent launch)."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def _has_dependent_launches(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(x: Tensor, overlap: bool = False) -> dict:
    """With `overlap`, a kernel starts and loads its weights while the kernel ahead of it in the stream still runs.

    It reads everything else, and writes, only after that kernel has ended. So `overlap` is correct after any kernel
    that changes no weight, in a stream or in a captured graph. Below compute capability 9.0 nothing overlaps. Every
    kernel that takes these options lets the next one start early.
    """
    can_overlap = _has_dependent_launches(x.device)
    return {"OVERLAPS": can_overlap} | ({"launch_pdl": True} if can_overlap and overlap else {})


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Waits until the kernel ahead has ended, if this one was launched with `overlap=True`; otherwise does not wait.

    A kernel calls it after its loads of weights, which the assembler does not move past it, and before everything else.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
