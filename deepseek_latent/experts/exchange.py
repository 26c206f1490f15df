"""An exchange of rows between processes whose waiting is apart from its start, in both directions of autograd.

What is computed between `start` and `wait` runs while rows travel. In the backward pass autograd runs the newest
function first, so the gradient of what was computed there is computed while gradients travel back.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """Rows [m ..] sorted by receiver, of which each process gets a share of its own size from every other.

    One object is for one pair of `start` and `wait`, since it holds what is under way.
    """

    def __init__(self, send_sizes: list[int], receive_sizes: list[int], group: Any):
        self.send_sizes, self.receive_sizes, self.group = send_sizes, receive_sizes, group
        self._under_way: tuple[Any, Tensor, Tensor] | None = None

    def back(self) -> "Exchange":
        """The exchange that returns a row of the same number for each that was received."""
        return Exchange(self.receive_sizes, self.send_sizes, self.group)

    def start(self, rows: Tensor) -> Tensor:
        """Sends rows, and returns where others will be [sum(receive_sizes) ..]; nothing may read it before `wait`."""
        return _Start.apply(rows, self)

    def wait(self, arriving: Tensor) -> Tensor:
        """What `start` returned, once everything has arrived."""
        return _Wait.apply(arriving, self)

    def _issue(self, rows: Tensor, receive_sizes: list[int], send_sizes: list[int]) -> Tensor:
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive_sizes), *rows.shape[1:])
        work = dist.all_to_all_single(received, rows, receive_sizes, send_sizes, group=self.group, async_op=True)
        # rows must live until they have left
        self._under_way = work, rows, received
        return received

    def _arrived(self) -> Tensor:
        work, _, received = self._under_way
        self._under_way = None
        work.wait()
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._issue(rows, exchange.receive_sizes, exchange.send_sizes)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        # _Wait.backward has sent the gradient; what it returned has the shape that autograd wants
        return ctx.exchange._arrived(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arriving: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange._arrived()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.exchange._issue(gradient, ctx.exchange.send_sizes, ctx.exchange.receive_sizes)
        return gradient, None
