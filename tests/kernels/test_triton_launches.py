"""How many launches a decoder layer takes on a GPU, which bounds the time of a decoded token from below."""

import collections
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("launches are counted where Triton's interpreter makes them", allow_module_level=True)

from triton.runtime.interpreter import GridExecutor

from deepseek_latent import LatentCache
from deepseek_latent.kernels.gpu import layers as gpu_layers
from tests.kernels.support import with_gpu_layers
from tests.support import LITE, random_ids, tiny_model

# operations that start nothing on a device, because they make views or allocate memory
NO_LAUNCH = {"alias", "as_strided", "detach", "empty", "empty_strided", "expand", "new_empty", "permute", "select"}
NO_LAUNCH |= {
    "promote_types",
    "slice",
    "split",
    "split_with_sizes",
    "t",
    "transpose",
    "unbind",
    "unflatten",
    "unsafe_view",
    "unsqueeze",
    "view",
}


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.by_name = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.strip("_")
        if name not in NO_LAUNCH:
            self.by_name[name] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(
    ("overrides", "tokens", "most"), [(LITE, 1, 9), ({}, 1, 10), (LITE, 4, 16)], ids=["Lite", "V2", "Lite, 4 tokens"]
)
def test_a_layer_with_experts_takes_few_launches(overrides, tokens, most, monkeypatch):
    """A step over three layers, less one over two."""
    kernels, execute = collections.Counter(), GridExecutor.__call__

    def count(executor, *args, **kwargs):
        kernels[executor.fn.__name__] += 1
        # what the interpreter does to run a kernel is not what a GPU does
        with torch.utils._python_dispatch._disable_current_modes():
            return execute(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    monkeypatch.setattr(gpu_layers, "DEVICES", ("cpu",))
    taken = []
    for num_layers in (3, 2):
        model = with_gpu_layers(tiny_model(**overrides | {"num_hidden_layers": num_layers}))
        cache, ids = LatentCache(model.config, max_cache_len=24), random_ids(tokens, 12)
        model(ids[:, :11], cache=cache)
        kernels.clear()
        cache.count.to_device(ids.device)
        with cache.count.recorded(), Launches() as launches:
            model(ids[:, 11:], cache=cache)
        taken.append(kernels + launches.by_name)
    taken[0].subtract(taken[1])
    assert sum(taken[0].values()) <= most, +taken[0]
