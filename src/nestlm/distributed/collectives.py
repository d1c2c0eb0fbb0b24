"""Collectives over all ranks. In a single process they return their input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def num_ranks() -> int:
    """Return the number of ranks; 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank. Rank 0 alone writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def prefix_rank(message: str) -> str:
    """Put the rank before a message, where there are several ranks."""
    return f"rank {rank()}: {message}" if num_ranks() > 1 else message


def broadcast_from_rank_zero(value: T) -> T:
    """Return on all ranks the picklable value that rank 0 passes."""
    if num_ranks() == 1:
        return value
    values: list[T] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_object(items: list[T]) -> list[T]:
    """Return on all ranks the picklable items of all ranks, in the order of ranks."""
    if num_ranks() == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(num_ranks())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def barrier() -> None:
    """Wait until all ranks have called this."""
    if num_ranks() > 1:
        dist.barrier()


def all_reduce_max(number: int, *, device: torch.device) -> int:
    """Return the largest number over ranks."""
    if num_ranks() == 1:
        return number
    numbers = torch.tensor([number], device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over ranks, without gradient. It lies on the device of the process group."""
    return all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_mean(values: Tensor) -> Tensor:
    """Average a tensor over ranks, without gradient."""
    return all_reduce(values, dist.ReduceOp.SUM) / num_ranks()


def all_reduce_means(values: Mapping[str, Tensor | float], *, device: torch.device) -> Mapping[str, Tensor | float]:
    """Average named numbers over ranks in one reduction. All ranks pass the same names."""
    if num_ranks() == 1 or not values:
        return values
    together = all_reduce_mean(
        torch.stack([torch.as_tensor(value, device=device).float() for value in values.values()])
    )
    return dict(zip(values, together.unbind(), strict=True))


def all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    """Reduce a tensor over ranks, without gradient."""
    if num_ranks() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values, op=op)
    return values


class RowShard(NamedTuple):
    """The rows of a step that a rank holds: every `num_ranks`-th row, beginning with row `rank`."""

    rank: int = 0
    num_ranks: int = 1

    def global_rows(self, rows: int) -> int:
        """Return the rows of the step over all ranks, given the rows of this rank."""
        return rows * self.num_ranks

    def local_rows(self, values: Tensor, *, dim: int = 0) -> Tensor:
        """Select this rank's rows of a tensor (..., rows of the step, ...) along `dim`."""
        return values[(slice(None),) * dim + (slice(self.rank, None, self.num_ranks),)]

    def all_gather(self, values: Tensor) -> Tensor:
        """Gather the rows (rows, ...) of all ranks in the order of the step, without gradient."""
        if self.num_ranks == 1:
            return values.detach()
        parts = [torch.empty_like(values) for _ in range(self.num_ranks)]
        dist.all_gather(parts, values.detach().contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Average values over the ranks that share the step.

        The gradient is that of this rank's values alone: the mean of gradients over ranks is then that of the mean.
        """
        return values if self.num_ranks == 1 else values + (all_reduce_mean(values) - values.detach())


ALL_ROWS = RowShard()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients of replicated parameters by their mean over ranks, in one reduction.

    Sharded parameters are left out: FSDP reduces theirs.
    """
    if num_ranks() == 1:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    grads = [grad for grad in grads if not isinstance(grad, DTensor)]
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= num_ranks()
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


@torch.no_grad()
def broadcast_module(module: nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to all ranks; sharded ones are left out."""
    if num_ranks() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), src=0)
