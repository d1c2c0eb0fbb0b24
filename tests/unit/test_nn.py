"""Functions of the decoder that bring their own gradients, beside torch's."""

import pytest
import torch
import torch.nn.functional as F

from nestlm.nn.norm import RMSNorm
from nestlm.nn.rope import apply_rotary_emb, rotary_table


def test_the_norm_is_torchs():
    norm = RMSNorm(24, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 24, requires_grad=True)
    upstream = torch.randn(2, 5, 24)
    wanted = F.rms_norm(x, (24,), norm.weight, 1e-5)
    torch.testing.assert_close(norm(x), wanted)
    found = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (x, norm.weight), upstream))
    norm.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(norm(x), x, upstream), found[:1])


@pytest.mark.parametrize("size", [8, 6])  # of the eight entries of a head
def test_pairs_turn_by_their_angles_and_gradients_turn_back(size):
    heads = torch.randn(2, 5, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    table = rotary_table(torch.arange(5), dim=size, theta=100.0, dtype=torch.float64)
    half = size // 2
    pairs = torch.complex(heads[..., :half], heads[..., half:size])
    angles = torch.outer(torch.arange(5), 100.0 ** (-torch.arange(half, dtype=torch.float64) / half))
    rotate_pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.cat((rotate_pairs.real, rotate_pairs.imag, heads[..., size:]), dim=-1)
    torch.testing.assert_close(apply_rotary_emb(heads, table), wanted)
    assert torch.autograd.gradcheck(lambda x: apply_rotary_emb(x, table), heads)
