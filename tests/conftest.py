import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--device", help="device on which tests create models and tensors, such as cuda (default: the CPU)"
    )


def pytest_configure(config):
    if config.getoption("--device"):
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` and similar functions fill memory with NaN, so that code that reads it before writing fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _rounding_to_bfloat16(monkeypatch):
    """Makes Triton's interpreter round float32 to bfloat16 as a GPU does, instead of truncating it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def cast(builder, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy().reshape(source.data.shape), tl.bfloat16)
        return original(builder, source, dtype)

    original = InterpreterBuilder.cast_impl
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
