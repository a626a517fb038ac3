"""Ghost gradients against a loop over tokens."""

from __future__ import annotations

import torch

from gemmascope_plugin.training.learner import ghost_loss


def test_it_equals_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    residual, pre = (torch.randn(7, n, generator=generator).double() for n in (5, 9))
    decoder = torch.randn(9, 5, generator=generator).double().requires_grad_()
    pre.requires_grad_()
    dead = torch.arange(9) % 3 == 0
    total = torch.zeros((), dtype=torch.float64)
    for r, z in zip(residual, pre, strict=True):
        g = sum(torch.exp(z[i]) * decoder[i] for i in range(9) if dead[i])
        g = g * float((r.norm() / (2 * g.norm() + 1e-6)).detach())
        error = (g - r).pow(2).sum()
        total = total + error * float((r.pow(2).sum() / (error + 1e-6)).detach()) / 7
    loss = ghost_loss(residual, pre, decoder, dead)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(loss, residual.pow(2).sum(-1).mean(), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss, (pre, decoder))
    expected = torch.autograd.grad(total, (pre, decoder))
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)
        assert gradient.any()
    assert not gradients[0][:, ~dead].any() and not gradients[1][~dead].any()


def test_nothing_dead_costs_nothing() -> None:
    dead = torch.zeros(9, dtype=torch.bool)
    loss = ghost_loss(torch.ones(2, 5), torch.ones(2, 9), torch.ones(9, 5), dead)
    assert loss == 0
