"""The optimizers against their papers' formulas, and the learning-rate schedule."""

import math

import pytest
import torch

from llama_ext.optim import build_optimizer, lr_at


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.matrix = torch.nn.Parameter(torch.randn(3, 4, generator=gen))
        self.vector = torch.nn.Parameter(torch.randn(4, generator=gen))
        self.frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)


def gradients(step):
    gen = torch.Generator().manual_seed(step)
    return torch.randn(3, 4, generator=gen), torch.randn(4, generator=gen)


def adamw(p, g, m, v, t, lr, decay, b1=0.9, b2=0.95, eps=1e-8):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    p = p * (1 - lr * decay)
    return p - lr * (m / (1 - b1 ** t)) / ((v / (1 - b2 ** t)).sqrt() + eps), m, v


def adamax(p, g, m, u, t, lr, decay, b1=0.9, b2=0.999, eps=1e-8):
    m = b1 * m + (1 - b1) * g
    u = torch.maximum(b2 * u, g.abs() + eps)
    p = p * (1 - lr * decay)
    return p - lr / (1 - b1 ** t) * m / u, m, u


@pytest.mark.parametrize("name, formula", [("adamw", adamw), ("adamax", adamax)])
def test_follows_the_papers_with_decoupled_decay_on_matrices_only(name, formula):
    model, lr, decay = Toy(), 0.05, 0.3
    optimizer = build_optimizer(model, name, lr=lr, weight_decay=decay)
    slots = {n: (getattr(model, n).detach().double(), 0.0, torch.zeros((), dtype=torch.float64))
             for n in ("matrix", "vector")}
    for t in range(1, 6):
        for (n, wd), g in zip((("matrix", decay), ("vector", 0.0)), gradients(t)):
            getattr(model, n).grad = g
            slots[n] = formula(slots[n][0], g.double(), slots[n][1], slots[n][2], t, lr, wd)
        optimizer.step()
    for n, (p, _, _) in slots.items():
        torch.testing.assert_close(getattr(model, n).detach().double(), p, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.frozen, torch.ones(2, 2))


def test_unknown_optimizer_names_the_choices():
    with pytest.raises(ValueError, match="adamw, adamax, got 'sgd'"):
        build_optimizer(Toy(), "sgd", lr=1.0)


def test_schedule_warms_up_and_ends_at_a_tenth():
    lrs = [lr_at(s, steps=100, peak=2.0, warmup=10) for s in range(1, 101)]
    assert lrs[0] == pytest.approx(0.2) and lrs[9] == 2.0 and max(lrs) == 2.0
    assert all(a > b for a, b in zip(lrs[9:], lrs[10:])), "falls after the warm-up"
    assert lrs[-1] == pytest.approx(0.2)
    halfway = lr_at(55, steps=100, peak=2.0, warmup=10)
    assert halfway == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert lr_at(1000, steps=100, peak=2.0, warmup=10) == lrs[-1]
    assert lr_at(1, steps=5, peak=1.0, warmup=0) < 1.0


@pytest.mark.parametrize("warmup", [-1, 100])
def test_schedule_rejects_a_warmup_that_does_not_fit(warmup):
    with pytest.raises(ValueError, match="warmup expected in 0 .. steps - 1 = 99"):
        lr_at(1, steps=100, peak=1.0, warmup=warmup)
