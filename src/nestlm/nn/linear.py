"""Linear maps run over a prefix of their inputs or outputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Cuts = Sequence[Sequence[int]]  # number of outputs, by layer and part


class PrefixLinear(nn.Linear):
    """`nn.Linear` that accepts a prefix of its inputs."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs); fewer inputs than `in_features` use the first columns of the weight."""
        return prefix_products([input], [self])[0][0]


def prefix_products(
    parts: Sequence[Tensor], linears: Sequence[nn.Linear], *, outputs: Cuts | None = None
) -> list[list[Tensor]]:
    """Apply each linear layer to each part of a batch, cut to the inputs and outputs that the part uses.

    Args:
        parts: the batch, split by width: (..., inputs) each, where `inputs` is at most `in_features`; the widest first.
        linears: the layers, such as the query, key and value projections.
        outputs: `outputs[layer][part]` is the number of the layer's first outputs to compute for the part, descending
            over parts; None: all outputs.

    Returns:
        `products[layer][part]`, (..., outputs) each.
    """
    if outputs is None:
        outputs = [[linear.out_features] * len(parts) for linear in linears]
    plain = len(parts) == len(linears) == 1 and linears[0].weight.shape == (outputs[0][0], parts[0].shape[-1])
    if torch.is_grad_enabled() and not plain:
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        return split_evenly(PrefixProducts.apply(outputs, False, *parts, *weights, *biases), len(parts))
    return [
        multiply_parts(parts, linear.weight, linear.bias, cuts) for linear, cuts in zip(linears, outputs, strict=True)
    ]


def joined_products(parts: Sequence[Tensor], linear: nn.Linear, *, outputs: Sequence[int] | None = None) -> Tensor:
    """Apply a linear layer to each part of a batch, and concatenate the products along the first dimension.

    Args:
        parts: the batch, split by width: (count, ..., inputs) each, where `inputs` is at most `in_features`; the widest
            first. The middle dimensions are equal.
        linear: the layer.
        outputs: number of the layer's first outputs to compute for each part, descending; the rest of a row is 0.
            None: all outputs.

    Returns:
        The products, (sum of counts, ..., largest number of outputs).
    """
    if outputs is None:
        outputs = [linear.out_features] * len(parts)
    if torch.is_grad_enabled():
        return PrefixProducts.apply([outputs], True, *parts, linear.weight, linear.bias)[0]
    dtype = product_dtype(parts[0])
    return join_products([part.to(dtype) for part in parts], linear.weight, linear.bias, outputs)


def multiply_parts(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, outputs: Sequence[int]
) -> list[Tensor]:
    """Apply a weight to each part, cut to the part's inputs and to its number of outputs. The cut weight is a view."""
    return [
        F.linear(part, weight[:cut, : part.shape[-1]], None if bias is None else bias[:cut])
        for part, cut in zip(parts, outputs, strict=True)
    ]


def join_products(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, outputs: Sequence[int]) -> Tensor:
    """Compute `multiply_parts` in the dtype of the parts, and write all products into one tensor, padded with 0."""
    counts = [len(part) for part in parts]
    whole = parts[0].new_empty((sum(counts), *parts[0].shape[1:-1], outputs[0]))
    for part, cut, rows in zip(parts, outputs, whole.split(counts), strict=True):
        rows_no, part_ni = rows.flatten(0, -2), part.flatten(0, -2)
        weight_io = weight[:cut, : part.shape[-1]].to(part.dtype).T
        if cut < outputs[0]:
            rows_no[:, cut:] = 0
        if bias is None:
            torch.mm(part_ni, weight_io, out=rows_no[:, :cut])
        else:
            torch.addmm(bias[:cut].to(part.dtype), part_ni, weight_io, out=rows_no[:, :cut])
    return whole


def split_evenly(flat: Sequence[Any], size: int) -> list[list[Any]]:
    """Split a sequence into consecutive lists of `size` items."""
    return [list(flat[start : start + size]) for start in range(0, len(flat), size)]


class PrefixProducts(Function):
    """Products of parts and prefixes of weights, with gradients accumulated within the products.

    Autograd would pad the gradient of each cut weight and copy it, and sum the gradients of shared inputs afterwards.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Cuts, join: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Apply each weight and bias to each part.

        Args:
            ctx: the context of autograd.
            outputs: numbers of outputs, by layer and part.
            join: concatenate the products of a layer.
            tensors: all parts, then all weights, then all biases.

        Returns:
            A product for each layer and part, or one for each layer if `join`.
        """
        num_parts = len(outputs[0])
        dtype = product_dtype(tensors[0])
        parts = [part.to(dtype) for part in tensors[:num_parts]]  # once for all maps
        weights, biases = split_evenly(tensors[num_parts:], len(outputs))
        ctx.save_for_backward(*parts, *weights)
        ctx.num_parts, ctx.biases, ctx.joined = num_parts, biases, outputs if join else None
        ctx.set_materialize_grads(False)
        if join:
            return tuple(map(join_products, repeat(parts), weights, biases, outputs))
        return tuple(chain.from_iterable(map(multiply_parts, repeat(parts), weights, biases, outputs)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of parts, weights and biases; None where autograd needs no gradient."""
        saved = ctx.saved_tensors
        parts, weights = saved[: ctx.num_parts], saved[ctx.num_parts :]
        wanted = iter(ctx.needs_input_grad[2:])
        parts_ni = [part.reshape(-1, part.shape[-1]) for part in parts]
        flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        if ctx.joined is not None:
            counts = [len(part) for part in parts_ni]
            flat = chain.from_iterable(map(split_joined_gradient, flat, repeat(counts), ctx.joined))
        grads_no = split_evenly(list(flat), len(parts))
        with torch.autocast(parts[0].device.type, enabled=False):  # which may reach to here
            for_parts = [
                part_gradient([row[number] for row in grads_no], weights, part) if next(wanted) else None
                for number, part in enumerate(parts)
            ]
            for_weights = [
                weight_gradient(row, parts_ni, weight) if next(wanted) else None
                for row, weight in zip(grads_no, weights, strict=True)
            ]
            for_biases = [
                bias_gradient(row, bias) if next(wanted) else None
                for row, bias in zip(grads_no, ctx.biases, strict=True)
            ]
        return (None, None, *for_parts, *for_weights, *for_biases)


def split_joined_gradient(grad_no: Tensor | None, counts: Sequence[int], outputs: Sequence[int]) -> list[Tensor | None]:
    """Split the gradient of concatenated products into those of the parts."""
    if grad_no is None:
        return [None] * len(counts)
    return [rows[:, :cut] for rows, cut in zip(grad_no.split(counts), outputs, strict=True)]


def part_gradient(grads_no: Sequence[Tensor | None], weights: Sequence[Tensor], part: Tensor) -> Tensor | None:
    """Sum the gradient of a part over maps, in the part's shape."""
    total = None
    for grad_no, weight in zip(grads_no, weights, strict=True):
        if grad_no is not None:
            cut = weight[: grad_no.shape[1], : part.shape[-1]].to(grad_no.dtype)
            total = grad_no @ cut if total is None else total.addmm_(grad_no, cut)
    return None if total is None else total.view_as(part)


def weight_gradient(grads_no: Sequence[Tensor | None], parts_ni: Sequence[Tensor], weight: Tensor) -> Tensor | None:
    """Sum the gradient of a weight over parts. The first part is the widest; entries beyond it are 0."""
    total = None
    for grad_no, part_ni in zip(grads_no, parts_ni, strict=True):
        if grad_no is None:
            continue
        outputs, inputs = grad_no.shape[1], part_ni.shape[1]
        beta = 1
        if total is None:
            beta, total = 0, torch.empty_like(weight)
            total[outputs:] = 0
            total[:outputs, inputs:] = 0
        reached = total[:outputs, :inputs]
        if grad_no.dtype == weight.dtype:
            reached.addmm_(grad_no.T, part_ni, beta=beta)
        elif beta:
            reached += grad_no.T @ part_ni
        else:
            reached.copy_(grad_no.T @ part_ni)
    return total


def bias_gradient(grads_no: Sequence[Tensor | None], bias: Tensor) -> Tensor:
    """Return the gradient of a bias: the sum of the output gradients over all rows of all parts."""
    total = torch.zeros_like(bias)
    for grad_no in grads_no:
        if grad_no is not None:
            total[: grad_no.shape[1]] += grad_no.sum(0)
    return total


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product with this tensor: autocast's, or the tensor's own."""
    kind = tensor.device.type
    narrowed = torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if narrowed else tensor.dtype


def cast_linear_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the linear layers of a frozen module, once, to the dtype that autocast would cast them to at every call.

    Embeddings and norms stay as they are, so the module computes the same numbers.
    """
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.to(dtype)
