"""What ranks say to each other; where there is one process alone, nothing is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def num_ranks() -> int:
    """Processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one; rank 0 alone writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def prefix_rank(message: str) -> str:
    """A message that says on which rank it came up, where there are several."""
    return f"rank {rank()}: {message}" if num_ranks() > 1 else message


def broadcast_from_rank_zero(value: T) -> T:
    """The plain value of rank 0, on all ranks."""
    if num_ranks() == 1:
        return value
    values: list[T] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_object(items: list[T]) -> list[T]:
    """The plain items of all ranks, rank by rank, on all ranks."""
    if num_ranks() == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(num_ranks())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def barrier() -> None:
    """Until all ranks are here."""
    if num_ranks() > 1:
        dist.barrier()


def all_reduce_max(number: int, *, device: torch.device) -> int:
    """The highest number that a rank has."""
    if num_ranks() == 1:
        return number
    numbers = torch.tensor([number], device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over ranks of a plain tensor that is already on the device where ranks meet."""
    return all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_mean(values: Tensor) -> Tensor:
    """Mean over ranks, without gradient."""
    return all_reduce(values, dist.ReduceOp.SUM) / num_ranks()


def all_reduce_means(values: Mapping[str, Tensor | float], *, device: torch.device) -> Mapping[str, Tensor | float]:
    """Means over ranks of numbers that all ranks have, in one reduction."""
    if num_ranks() == 1 or not values:
        return values
    together = all_reduce_mean(
        torch.stack([torch.as_tensor(value, device=device).float() for value in values.values()])
    )
    return dict(zip(values, together.unbind(), strict=True))


def all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    """A plain tensor reduced over ranks, without gradient."""
    if num_ranks() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values, op=op)
    return values


class RowShard(NamedTuple):
    """Which rows of a step a rank holds: every `num_ranks`-th, beginning with its own number."""

    rank: int = 0
    num_ranks: int = 1

    def global_rows(self, rows: int) -> int:
        """Rows of the step, of all ranks together, when this one holds so many."""
        return rows * self.num_ranks

    def local_rows(self, values: Tensor, *, dim: int = 0) -> Tensor:
        """This rank's part of what was made for all rows of the step."""
        return values[(slice(None),) * dim + (slice(self.rank, None, self.num_ranks),)]

    def all_gather(self, values: Tensor) -> Tensor:
        """All ranks' rows (rows, ...) in the order of the step, without gradient."""
        if self.num_ranks == 1:
            return values.detach()
        parts = [torch.empty_like(values) for _ in range(self.num_ranks)]
        dist.all_gather(parts, values.detach().contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks that share the step.

        Its gradient is that of this rank's values alone, so that the mean of gradients over ranks is the mean's.
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
    """Give all ranks the plain parameters and buffers that rank 0 has; sharded ones are left out."""
    if num_ranks() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), src=0)
