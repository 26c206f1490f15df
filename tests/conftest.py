import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", help="where the tests make models and tensors, such as cuda; by default the CPU")


def pytest_configure(config):
    if config.getoption("--device"):
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` and its kin give NaN, so that whoever reads memory before writing it fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
