"""Losses that are made in chunks, with their gradients, beside those of all logits at once."""

import pytest
import torch

from nestlm.nn import loss
from nestlm.nn.loss import HeadInputs, LossFn, ScoreFn
from references import cross_entropy, forward_kl

ROWS, LENGTH, SIZE, VOCAB = 3, 50, 16, 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", {"cpu": 64 * VOCAB})  # of 150 rows


def drawn():
    """Hidden states, head, targets, and another model's beliefs."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, SIZE, generator=generator).requires_grad_()
    head = torch.randn(VOCAB, SIZE, generator=generator).requires_grad_()
    targets = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    teacher = torch.randn(ROWS, LENGTH, 8, generator=generator), torch.randn(VOCAB, 8, generator=generator)
    return hidden, head, targets, HeadInputs(*teacher)


@pytest.mark.parametrize(("taught", "ce_share"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_losses_and_gradients_are_those_of_all_logits(taught, ce_share):
    hidden, head, targets, teacher = drawn()
    logits = hidden @ head.T
    text = cross_entropy(logits, targets)
    distance = forward_kl(logits, teacher.hidden_BLD @ teacher.head_VD.T)
    wanted = (1 - ce_share) * distance.mean() + ce_share * text.mean() if taught else text.mean()
    grads = torch.autograd.grad(3 * wanted, (hidden, head))
    losses = LossFn(targets, teacher if taught else None, ce_share)(hidden, head)
    torch.testing.assert_close(losses.loss, wanted)
    torch.testing.assert_close(losses.nll_BL, text.detach())
    torch.testing.assert_close(torch.autograd.grad(3 * losses.loss, (hidden, head)), grads)
    if taught:
        torch.testing.assert_close(losses.kl_BL, distance.detach())
    else:
        assert losses.kl_BL is None
    assert not losses.nll_BL.requires_grad


def test_a_frozen_head_costs_no_gradient():
    hidden, head, targets, teacher = drawn()
    (known,) = torch.autograd.grad(LossFn(targets, teacher)(hidden, head).loss, hidden)
    loss = LossFn(targets, teacher)(hidden, head.detach()).loss
    assert loss.grad_fn.made[1] is None
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), (known,))


def test_a_model_is_at_no_distance_from_itself():
    hidden, head, targets, _ = drawn()
    losses = LossFn(targets, HeadInputs.detached(hidden, head))(hidden, head)
    assert float(losses.kl_BL.abs().max()) < 1e-6
    assert float(torch.autograd.grad(losses.loss, hidden)[0].abs().max()) < 1e-6


def test_products_run_in_the_dtype_of_autocast_and_sums_in_float32():
    hidden, head, targets, teacher = drawn()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = LossFn(targets, teacher)(hidden, head)
        student, wanted = hidden @ head.T, teacher.hidden_BLD @ teacher.head_VD.T
    assert student.dtype == torch.bfloat16
    distance = forward_kl(student.float(), wanted.float())
    torch.testing.assert_close(losses.kl_BL, distance.detach())
    found = torch.autograd.grad(losses.loss, (hidden, head))
    assert [grad.dtype for grad in found] == [torch.float32] * 2
    for grad, known in zip(found, torch.autograd.grad(distance.mean(), (hidden, head)), strict=True):
        torch.testing.assert_close(grad, known, rtol=0.02, atol=2e-2 * float(known.abs().max()))


def test_without_gradients_only_losses_are_made():
    hidden, head, targets, teacher = drawn()
    with torch.no_grad():
        losses = LossFn(targets, teacher)(hidden, head)
    assert not losses.loss.requires_grad
    torch.testing.assert_close(losses[:3], LossFn(targets, teacher)(hidden, head)[:3])


def test_scores_are_losses_and_hits():
    hidden, head, targets, _ = drawn()
    losses, hits = ScoreFn(targets)(hidden, head)
    logits = hidden @ head.T
    torch.testing.assert_close(losses, cross_entropy(logits, targets).detach())
    assert torch.equal(hits, logits.argmax(-1) == targets)


def test_shapes_are_checked():
    hidden, head, targets, teacher = drawn()
    with pytest.raises(ValueError, match=r"wanted \(B, L, D\)"):
        LossFn(targets[:2])(hidden, head)
    with pytest.raises(ValueError, match="another vocabulary"):
        LossFn(targets, HeadInputs(teacher.hidden_BLD, teacher.head_VD[1:]))(hidden, head)
