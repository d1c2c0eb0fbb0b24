"""Prefix products: values and gradients are those of autograd through cut weights."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nestlm.nn.linear import PrefixLinear, joined_products, prefix_products

FIVE, SIX = 5, 6


def maps(*, bias: bool, count: int = 2) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(FIVE, SIX, bias=bias, dtype=torch.float64) for _ in range(count)]


def gradients(tensors: list[torch.Tensor], loss: torch.Tensor) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(loss, tensors, allow_unused=True))


def weighted(made: list[list[torch.Tensor]], *, skip: tuple[int, int] | None = None) -> torch.Tensor:
    """A sum in which every entry has a weight of its own; one product may be left out."""
    total = torch.zeros((), dtype=torch.float64)
    for (row, parts), number in product(enumerate(made), range(len(made[0]))):
        if (row, number) != skip:
            part = parts[number]
            total = total + (part * torch.arange(1, part.numel() + 1).view_as(part).to(part).sin()).double().sum()
    return total


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip", [None, (1, 0)], ids=["all", "one without gradient"])
@pytest.mark.parametrize("cut", ["outputs", "inputs"])
def test_gradients_are_those_of_cut_weights(bias, cut, skip):
    linears = maps(bias=bias)
    widths = [5, 3, 1]
    inputs = widths if cut == "inputs" else [FIVE] * 3
    outputs = [[SIX] * 3] * 2 if cut == "inputs" else [[6, 3, 1], [4, 2, 2]]
    parts = [
        torch.randn(rows, 2, size, dtype=torch.float64, requires_grad=True)
        for rows, size in zip((2, 3, 1), inputs, strict=True)
    ]
    made = prefix_products(parts, linears, outputs=outputs)
    plain = [
        [
            F.linear(part, linear.weight[:size, : part.shape[-1]], None if linear.bias is None else linear.bias[:size])
            for part, size in zip(parts, sizes, strict=True)
        ]
        for linear, sizes in zip(linears, outputs, strict=True)
    ]
    torch.testing.assert_close(made, plain)
    known = [*parts, *(parameter for linear in linears for parameter in linear.parameters())]
    found, wanted = (gradients(known, weighted(each, skip=skip)) for each in (made, plain))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cut", ["outputs", "inputs"])
def test_joined_products_stand_one_after_another(bias, cut):
    """With zeros for the outputs that a part did not ask for, of which no gradient comes back."""
    (linear,) = maps(bias=bias, count=1)
    inputs, outputs = ([5, 3, 1], None) if cut == "inputs" else ([FIVE] * 3, [6, 3, 1])
    parts = [
        torch.randn(rows, 2, size, dtype=torch.float64, requires_grad=True)
        for rows, size in zip((2, 3, 1), inputs, strict=True)
    ]
    made = joined_products(parts, linear, outputs=outputs)
    apart = prefix_products(parts, [linear], outputs=None if outputs is None else [outputs])[0]
    plain = torch.cat([F.pad(part, (0, SIX - part.shape[-1])) for part in apart])
    torch.testing.assert_close(made, plain)
    with torch.no_grad():
        torch.testing.assert_close(joined_products(parts, linear, outputs=outputs), plain)
    known = [*parts, *linear.parameters()]
    found, wanted = (gradients(known, weighted([[each]])) for each in (made, plain))
    torch.testing.assert_close(found, wanted)


def test_joined_products_of_a_frozen_map_under_autocast():
    (linear,) = maps(bias=True, count=1)
    linear.float().requires_grad_(False)
    parts = [torch.randn(rows, FIVE, requires_grad=True) for rows in (2, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        made = joined_products(parts, linear, outputs=[4, 2])
        with torch.no_grad():
            torch.testing.assert_close(joined_products(parts, linear, outputs=[4, 2]), made)
    assert made.dtype == torch.bfloat16
    wanted = [
        F.linear(part, linear.weight[:size], linear.bias[:size]) for part, size in zip(parts, (4, 2), strict=True)
    ]
    torch.testing.assert_close(made[:2, :4].float(), wanted[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(made[2:, :2].float(), wanted[1], rtol=2e-2, atol=2e-2)
    assert not made[2:, 2:].any()
    made.float().sum().backward()
    for part, size in zip(parts, (4, 2), strict=True):
        torch.testing.assert_close(part.grad, linear.weight[:size].sum(0).expand_as(part), rtol=2e-2, atol=2e-2)


def test_frozen_maps_take_no_products_back():
    (linear,) = maps(bias=True, count=1)
    linear.requires_grad_(False)
    x = torch.randn(3, FIVE, dtype=torch.float64, requires_grad=True)
    ((made,),) = prefix_products([x], [linear], outputs=[[2]])
    with FlopCounterMode(display=False) as counter:
        made.sum().backward()
    torch.testing.assert_close(x.grad, linear.weight[:2].sum(0).expand(3, -1))
    assert counter.get_total_flops() == 2 * 3 * 2 * FIVE


def test_a_single_row():
    (linear,) = maps(bias=True, count=1)
    x = torch.randn(FIVE, dtype=torch.float64, requires_grad=True)
    ((made,),) = prefix_products([x], [linear], outputs=[[2]])
    made.sum().backward()
    torch.testing.assert_close(x.grad, linear.weight[:2].sum(0))


def test_under_autocast_products_are_narrow_and_gradients_are_wide():
    linears = [linear.float() for linear in maps(bias=True)]
    x = torch.randn(4, FIVE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ((first, narrow), (second, last)) = prefix_products([x, x], linears, outputs=[[4, 2], [3, 1]])
        loss = first.float().sum() + narrow.float().sum() + second.float().sum() + last.float().sum()
        loss.backward()  # as within a training step
    assert {first.dtype, narrow.dtype, second.dtype} == {torch.bfloat16}
    rows = x.detach().bfloat16().float().sum(0)
    wanted = torch.zeros(SIX, FIVE).index_add(0, torch.tensor([0, 1, 2, 3, 0, 1]), rows.expand(6, -1))
    torch.testing.assert_close(linears[0].weight.grad, wanted, rtol=2e-2, atol=2e-2)
    both = sum(linear.weight[:size].sum(0) for linear, size in zip(linears * 2, (4, 3, 2, 1), strict=True))
    torch.testing.assert_close(x.grad, both.expand(4, -1), rtol=2e-2, atol=2e-2)
    assert {parameter.grad.dtype for linear in linears for parameter in linear.parameters()} == {torch.float32}
    assert x.grad.dtype == torch.float32


def test_the_first_inputs_run():
    linear = PrefixLinear(FIVE, SIX, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight[:, :3], linear.bias))
