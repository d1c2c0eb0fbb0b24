"""Run code on tensors without storage, and track the memory that they would take."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
CHOOSING = {ATEN.argmax.default, ATEN.argmin.default}
SMALL = 2**20  # elements; what is larger and made from nothing has no storage


class MemoryTracker(TorchDispatchMode):
    """Records every allocation and release of tensor storage, with the moment in which it happens.

    Operations on tensors without storage give tensors without storage. Other operations, such as draws of choices, run
    with their values, so that what depends on them is as in a real run. Choices that would depend on values of tensors
    without storage are made up (`supposed`).

    Attributes:
        moment: name of the part of a step that runs now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.moment = ""
        self._events: list[tuple[int, int, str]] = []  # number of a storage, bytes (released: below 0), moment
        self._owners: dict[int, str] = {}
        self._alive: dict[int, int] = {}  # numbers by the address of the storage's own object
        self._watched: list[Any] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record what this thread allocates; backward passes run in this thread, too."""
        with warnings.catch_warnings(), torch.autograd.set_multithreading_enabled(False), self.fake, self:
            # torch looks for gradients of tensors that it takes the storage from
            warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
            yield

    def without_storage(self, module: nn.Module) -> None:
        """Put CPU tensors without storage in place of parameters on the meta device."""
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                tensor = FakeTensor(self.fake, parameter.detach(), torch.device("cpu"))
                part.register_parameter(name, nn.Parameter(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run one operation and record its results."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors):
            return NotImplemented  # made of tensors that come here in their turn
        out = self._run(func, args, kwargs, tensors)
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self.note(made)
        return out

    def _run(self, func: Any, args: Any, kwargs: Mapping[str, Any], tensors: list[Tensor]) -> Any:
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is ATEN._local_scalar_dense.default:
                return 0  # a number that nobody knows
            out = func(*args, **kwargs)
            if func in CHOOSING:
                return supposed(out.shape, choices=args[0].shape[args[1] if len(args) > 1 else -1])
            return out
        if not tensors:  # it makes some from nothing
            out = func(*args, **kwargs)
            if elements(out) > SMALL:
                return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def note(self, tensor: Tensor) -> int:
        """Record the storage of a tensor where it is new; returns the number of the storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        number = self._alive.get(key)
        if number is None:
            number, size = len(self._watched), storage.nbytes()
            self._alive[key] = number
            self._events.append((number, size, self.moment))
            self._watched.append(weakref.finalize(storage, self._drop, key, number, size))
        return number

    def _drop(self, key: int, number: int, size: int) -> None:
        del self._alive[key]
        self._events.append((number, -size, self.moment))

    def assign(self, owner: str, tensors: Iterable[Tensor | None]) -> None:
        """Name the owner of tensors, also for allocations that are recorded already."""
        for tensor in tensors:
            if tensor is not None:
                self._owners.setdefault(self.note(tensor), owner)

    def peaks(self, *, rest: str) -> dict[str, dict[str, float]]:
        """Return the peak allocation of each moment, broken down by owner; tensors without owner count as `rest`."""
        held: dict[str, float] = defaultdict(float)
        most: dict[str, float] = defaultdict(float)
        parts: dict[str, dict[str, float]] = {}
        total = 0.0
        for number, size, moment in self._events:
            held[self._owners.get(number, rest)] += size
            total += size
            if total > most[moment]:
                most[moment], parts[moment] = total, dict(held)
        return parts


def elements(made: Any) -> int:
    """Count the elements of all tensors in the result of an operation."""
    return sum(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor))


def supposed(shape: torch.Size, *, choices: int) -> Tensor:
    """Make up the choices of rows: every other row takes the last choice, the others take all choices in turn."""
    with unset_fake_temporarily():
        number = torch.arange(shape.numel())
        return torch.where(number % 2 == 0, choices - 1, number // 2 % choices).view(shape)


class FusedNorm(Function):
    """An RMS norm that keeps for its backward pass what CUDA's kernel keeps: its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """(..., D) to (..., D), without values."""
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Allocate the gradients of input and weight, without values."""
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)


class CudaNorm(nn.Module):
    """Takes the place of an RMS norm; CUDA has no kernel for an input and a weight of two dtypes either."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.norm = norm

    @property
    def weight(self) -> Tensor:
        """Weight of the replaced norm."""
        return self.norm.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., D), without values."""
        same = hidden.dtype == self.weight.dtype
        return FusedNorm.apply(hidden, self.weight) if same else self.norm(hidden)


def with_cuda_kernels(module: nn.Module) -> None:
    """Put CUDA's kernels in place of a CPU's where these keep other tensors. Fused attention keeps the same."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.RMSNorm):
                setattr(part, name, CudaNorm(child))
