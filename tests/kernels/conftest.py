import pytest
import torch

from deepseek_latent.kernels.cpu import library


@pytest.fixture(scope="module")
def operators():
    library.load_operators()
    return torch.ops.deepseek_latent
