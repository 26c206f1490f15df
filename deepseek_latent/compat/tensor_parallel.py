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
    """The style of an attention module: tells it which processes have the other heads."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        module.group_of_heads = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        return module


ALL_PARALLEL_STYLES.register(LATENT_ATTENTION, LatentAttentionParallel())


def is_split(weight: Tensor) -> bool:
    """Whether each process has a part of this weight; its shape is that of the whole."""
    return isinstance(weight, DTensor)


def shared_by_heads(x: Tensor, group: Any) -> Tensor:
    """Returns x, which heads of all processes of `group` use; its gradient is the sum of theirs.

    `group` is None where one process has all heads.
    """
    return x if group is None or not (torch.is_grad_enabled() and x.requires_grad) else _SharedByHeads.apply(x, group)


class _SharedByHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None]:
        dx = dx.contiguous()
        dist.all_reduce(dx, group=ctx.group)
        return dx, None
