"""Expert parallelism in which a token travels once to each device that has experts of its choice.

transformers' own implementation sends a row for each choice, and waits. With device-limited routing (DeepSeek-V2,
arXiv:2405.04434, 2.2.2) a token's experts are on M devices at most, so that at most M rows leave for it here. Shared
experts are computed while rows travel.

Letters: m tokens, k experts per token, n devices, d model width, p pairs of a token and a device.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..compat.expert_parallel import AllReduceEP, EPImplementation
from .exchange import Exchange


class DeviceLimitedEP(EPImplementation):
    """How experts get their tokens with `DistributedConfig(ep_implementation="device_limited")`.

    Each process owns consecutive experts, so that a group of the router is a device where `ep_size` equals `n_group`.
    The owner computes the weighted sum of a token's experts, and sends back one row for it.

    At inference, where all processes hold the same tokens, none travels: every process sums its own experts for all of
    them (transformers' "all_reduce").
    """

    def __init__(self, experts: nn.Module, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.all_reduce = AllReduceEP(experts, ep_mesh, tp_mesh) if self.shares_batch else None

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        is_trained = torch.is_grad_enabled() and hidden_states.requires_grad
        if self.all_reduce is not None and not is_trained:
            self.experts.tokens_sent = []
            return self.all_reduce(hidden_states, top_k_index, top_k_weights)
        own = [self._slice(x) for x in (hidden_states, top_k_index, top_k_weights)]
        return self._gather(self._exchange(*own), hidden_states.shape)

    def _exchange(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [m d] of this process alone to their weighted sums [m d]."""
        num_local, group = self.num_local_experts, self.ep_mesh.get_group()
        devices = torch.arange(self.ep_mesh.size(), device=hidden_states.device)
        is_there = (top_k_index // num_local)[None] == devices[:, None, None]  # [n m k]
        # a choice that was dropped has the weight 0, and does not travel
        is_there &= top_k_weights != 0
        goes_there = is_there.any(dim=-1)  # [n m]
        # of each device, the tokens that it gets and the choices that they made of its experts
        counts = torch.stack((goes_there.sum(dim=1), is_there.sum(dim=(1, 2))), dim=1)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=group)
        # the one wait of the host in a layer
        (send_sizes, _), (receive_sizes, choices_here) = torch.stack((counts, received)).transpose(1, 2).tolist()
        self.experts.tokens_sent = send_sizes
        # pairs sorted by device; their number is known, so that this does not wait
        order = _first(goes_there, sum(send_sizes))
        device, token = order // len(hidden_states), order % len(hidden_states)

        chosen = is_there[device, token]  # [p k]
        index = (top_k_index[token] % num_local).masked_fill(~chosen, num_local)
        weights = top_k_weights[token].masked_fill(~chosen, 0)
        of_choices, of_tokens = (Exchange(send_sizes, receive_sizes, group) for _ in range(2))
        # whole numbers below 2^24 are exact in float32, in which routers compute
        arriving_choices = of_choices.start(torch.cat((index.to(weights.dtype), weights), dim=-1))
        arriving = of_tokens.start(hidden_states[token])
        self._meanwhile()
        index, weights = of_choices.wait(arriving_choices).chunk(2, dim=-1)
        sums = self._sums_of_own_experts(of_tokens.wait(arriving), index.long(), weights, sum(choices_here))

        returning = of_tokens.back()
        arriving = returning.start(sums)
        self._meanwhile()
        return _sums(returning.wait(arriving), token, len(hidden_states))

    def _sums_of_own_experts(self, tokens: Tensor, index: Tensor, weights: Tensor, num_choices: int) -> Tensor:
        """Tokens [p d] to the weighted sums [p d] of their experts here; index [p k] is past the last for others."""
        if num_choices == 0:
            # autograd must come here on every process, also on one that nobody chose
            alone = tokens.sum(dim=0, keepdim=True), index.new_zeros(1, 1), weights.sum().view(1, 1)
            return self.experts_forward(*alone)[:0]
        # only choices of experts here take memory
        choice = _first(index < self.num_local_experts, num_choices)
        token = choice // index.shape[1]
        index, weights = (x.flatten()[choice, None] for x in (index, weights))
        return _sums(self.experts_forward(tokens[token], index, weights), token, len(tokens))

    def _meanwhile(self) -> None:
        """Computes the next part of what the layer computes besides routed experts."""
        if self.experts.meanwhile:
            self.experts.meanwhile.pop(0)()

    def _slice(self, x: Tensor) -> Tensor:
        """The part that this process takes of what the processes of tensor parallelism share."""
        if self.tp_mesh.size() == 1:
            return x
        return (
            DTensor.from_local(x, self.tp_mesh, [Replicate()], run_check=False)
            .redistribute(placements=[Shard(0)])
            .to_local()
        )

    def _gather(self, x: Tensor, shape: torch.Size) -> Tensor:
        if self.tp_mesh.size() == 1:
            return x
        stride = (shape[1], 1)
        return DTensor.from_local(x.contiguous(), self.tp_mesh, [Shard(0)], shape=shape, stride=stride).full_tensor()


def _first(is_chosen: Tensor, count: int) -> Tensor:
    """The places in a flattened mask, of which `count` are true, that are."""
    return is_chosen.flatten().argsort(descending=True, stable=True)[:count]


def _sums(rows: Tensor, token: Tensor, num_tokens: int) -> Tensor:
    """The sums [num_tokens d] of the rows [.. d] of each token, added in float32 or more."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_zeros(num_tokens, rows.shape[1], dtype=dtype).index_add(0, token, rows.to(dtype)).to(rows.dtype)
