"""Steps in proportion to the gradient, none larger than the rate."""

from __future__ import annotations

import torch

from stnerp.uniform_adam import UniformAdam


def test_first_step_is_the_gradient_over_its_largest_value() -> None:
    x = torch.zeros(3, requires_grad=True)
    x.grad = torch.tensor([4.0, -1.0, 0.0])
    UniformAdam([x], lr=0.1).step()
    # Adam would move the second by as much as the first.
    torch.testing.assert_close(x.detach(), torch.tensor([-0.1, 0.025, 0.0]))


def test_steady_gradient_makes_steady_steps() -> None:
    x = torch.zeros(2, requires_grad=True)
    optimiser = UniformAdam([x], lr=0.1)
    for _ in range(10):
        x.grad = torch.tensor([1e-6, 5e-7])
        optimiser.step()
    torch.testing.assert_close(x.detach(), torch.tensor([-1.0, -0.5]))


def test_no_gradient_no_step() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    y.grad = torch.zeros(2)
    UniformAdam([x, y], lr=0.1).step()
    assert torch.equal(x, torch.ones(2))
    assert torch.equal(y, torch.ones(2))


def test_finds_the_minimum() -> None:
    x = torch.tensor([3.0, -2.0], requires_grad=True)
    optimiser = UniformAdam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 200)
    for _ in range(200):
        optimiser.zero_grad()
        (x - torch.tensor([1.0, 1.0])).square().sum().backward()
        optimiser.step()
        schedule.step()
    assert (x - 1).abs().max() < 1e-2
