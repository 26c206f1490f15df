"""Kernels that start while the kernel ahead of them is at work (programmatic dependent launch)."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def _has_dependent_launches(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(x: Tensor, overlap: bool) -> dict:
    """`overlap` lets a kernel start, and load its weights, while the kernel ahead of it in the stream is at work.

    Right after any kernel that changes no weight, in a stream or a captured graph: all else is read, and everything
    is written, when that kernel has ended (programmatic dependent launch, from compute capability 9.0 on; before,
    nothing overlaps). Every kernel here lets the next one start as early.
    """
    can = _has_dependent_launches(x.device)
    return {"OVERLAPS": can} | ({"launch_pdl": True} if can and overlap else {})


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Stands after the loads of weights and before all else: what is loaded before is not put off by the assembler.

    In a launch with `overlap=True` a program comes here while the kernel before is at work, and waits for its end; in
    other launches this waits for nothing.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
