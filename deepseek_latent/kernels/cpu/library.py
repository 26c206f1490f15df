"""Loads the operators in C++ once per process, and makes them known to torch and torch.compile.

Letters: n rows of a weight, k their width.
"""

import functools
import threading

import torch
from torch import Tensor

from .build import load_library
from .fake import FAKES

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


_loading = threading.Lock()


def load_operators() -> str:
    """Registers `torch.ops.deepseek_latent`, built first if necessary, and returns which instructions it uses.

    Raises:
        RuntimeError: if there is no C++ compiler, or if it fails.
    """
    # a name can be registered once, and threads may ask at the same time
    with _loading:
        return _load_once()


@functools.cache
def _load_once() -> str:
    load_library()
    for name, fake in FAKES.items():
        torch.library.register_fake(f"deepseek_latent::{name}", fake)
    if not operators.has_bfloat16_products():
        SLOW_IN_TORCH.add(torch.bfloat16)
    return operators.instructions()
