"""What the tests of operators and kernels share."""

import copy

import pytest
import torch
from torch import Tensor

from deepseek_latent.compat.bound_functions import bind
from deepseek_latent.experts.codec import Packed, pack
from deepseek_latent.kernels import optimize_for_inference
from deepseek_latent.modeling_deepseek_v2 import DeepseekV2DecoderLayer
from tests.support import seeded

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def packed_by_rows(weight: Tensor) -> Packed:
    """A weight [.. n k] as codes and one scale per row [.. n 1]."""
    return pack(weight, bits=8, group=None)


def optimized(model):
    """A copy of the model that uses the operators."""
    twin = copy.deepcopy(model)
    optimize_for_inference(twin)
    return twin


def with_gpu_layers(model):
    """The model, whose decoder layers decode by the kernels for GPUs; needs Triton."""
    from deepseek_latent.kernels.gpu.layers import REPLACEMENTS

    for module in list(model.modules()):
        if type(module) is DeepseekV2DecoderLayer:
            bind(module, REPLACEMENTS[DeepseekV2DecoderLayer])
    return model
