"""What transformers' tensor parallelism (5.17 to 5.24) needs to know of latent attention.

Its own style "mla_kv_a_proj" sums the gradient of the rotary key inside of `kv_a_proj_with_mqa`. An adapter is computed
outside of that module, so that its gradient, and that of everything below, would be a part of the sum.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

LATENT_ATTENTION = "latent_attention"


class LatentAttentionParallel(TensorParallelLayer):
    """The style of an attention module: the gradient of what all heads use is the sum over the processes' heads."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")

        # a copy of the module keeps this function, and so the group, which cannot be copied
        def used_by_all_heads(x: Tensor) -> Tensor:
            return _UsedByAllHeads.apply(x, group) if torch.is_grad_enabled() and x.requires_grad else x

        module.used_by_all_heads = used_by_all_heads
        return module


ALL_PARALLEL_STYLES.register(LATENT_ATTENTION, LatentAttentionParallel())


class _UsedByAllHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None]:
        dx = dx.contiguous()
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


def is_split(weight: Tensor) -> bool:
    """Whether each process has a part of this weight; its shape is that of the whole."""
    return isinstance(weight, DTensor)
