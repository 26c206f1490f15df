"""What transformers' tensor and expert parallelism (5.17 to 5.24) need to know of latent attention and of adapters.

Their own style "mla_kv_a_proj" sums the gradient of the rotary key inside of `kv_a_proj_with_mqa`. An adapter is
computed outside of that module, so that its gradient, and that of everything below, would be a part of the sum.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, distribute_tensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

SUMS_GRADIENTS = "sums_gradients"


class SharedModule(nn.Module):
    """A module of which several processes may compute a part each; tensor parallelism then replaces both methods."""

    def used_by_all(self, x: Tensor) -> Tensor:
        """Returns x, whose gradient is the sum over the processes."""
        return x

    def same_for_all(self, x: Tensor) -> Tensor:
        """Returns x of the first process."""
        return x


class SumsGradientsParallel(TensorParallelLayer):
    """The style of a `SharedModule`, such as attention, whose heads are divided, or a layer of experts."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")

        # a copy of the module keeps this function, and so the group, which cannot be copied
        def used_by_all(x: Tensor) -> Tensor:
            return _UsedByAll.apply(x, group) if torch.is_grad_enabled() and x.requires_grad else x

        def same_for_all(x: Tensor) -> Tensor:
            dist.broadcast(x, src=dist.get_global_rank(group, 0), group=group)
            return x

        module.used_by_all, module.same_for_all = used_by_all, same_for_all
        return module


ALL_PARALLEL_STYLES.register(SUMS_GRADIENTS, SumsGradientsParallel())


class _UsedByAll(torch.autograd.Function):
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


def local_shape(weight: Tensor) -> torch.Size:
    """The shape of this process's part of a weight."""
    return weight.to_local().shape if is_split(weight) else weight.shape


class Split(NamedTuple):
    """How tensor or expert parallelism divides a weight among the processes that compute with its parts."""

    mesh: DeviceMesh
    placement: Placement
    shape: torch.Size

    def __deepcopy__(self, memo: dict) -> "Split":
        # groups of processes cannot be copied
        return self

    def whole(self, part: Tensor) -> Tensor:
        """The weight of which this process has `part`."""
        sizes = {"shape": self.shape, "stride": torch.empty(self.shape, device="meta").stride()}
        return DTensor.from_local(part, self.mesh, [self.placement], run_check=False, **sizes)

    def part_of(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """This process's part of x, which has only these `dims` in common with the weight."""
        if self.placement.dim % x.dim() not in dims:
            return x
        dim = self.placement.dim % x.dim()
        return x.index_select(dim, _indices(self, x.shape[dim], dim, x.dim()).to(x.device))


def split_of(weight: Tensor) -> Split | None:
    """How a weight is divided; None for a whole one. FSDP's division does not count, since it gathers the parts."""
    if not is_split(weight):
        return None
    mesh = weight.device_mesh
    # FSDP makes a mesh without names if it is given none
    names = mesh.mesh_dim_names or ()
    found = {name: placement for name, placement in zip(names, weight.placements) if not placement.is_replicate()}
    name = next((name for name in ("ep", "tp") if name in found), None)
    return None if name is None else Split(mesh if mesh.ndim == 1 else mesh[name], found[name], weight.shape)


def take_part(module: nn.Module, name: str) -> Tensor:
    """This process's part of a weight of `module`, which FSDP gathers no more."""
    if isinstance(module, FSDPModule):
        module.unshard()
        state = module._get_fsdp_state()
        # torch 2.10 has one group of parameters, and later versions a list
        if hasattr(state, "_fsdp_param_groups"):
            state._fsdp_param_groups.clear()
        else:
            state._fsdp_param_group = None
    weight = getattr(module, name).detach()
    return weight.to_local() if is_split(weight) else weight


@lru_cache
def _indices(split: Split, size: int, dim: int, num_dims: int) -> Tensor:
    shape = [size if i == dim else 1 for i in range(num_dims)]
    # it is kept for training, too
    with torch.inference_mode(False):
        numbers = torch.arange(size, device=split.mesh.device_type).view(shape)
        return distribute_tensor(numbers, split.mesh, [split.placement], src_data_rank=None).to_local().flatten()
