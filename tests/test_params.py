"""Flat parameter vectors, SLERP and the MLP."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from m2n2_mnist import MLP, get_params, set_params, slerp


def test_mlp_of_the_paper() -> None:
    model, images = MLP(64, 256), torch.randn(7, 1, 8, 8)
    w1, b1, w2, b2 = (parameter.detach().double().numpy() for parameter in model.parameters())
    pixels = images.flatten(1).double().numpy()
    expected = np.maximum(pixels @ w1.T + b1, 0) @ w2.T + b2
    before = images.clone()
    np.testing.assert_allclose(model(images).detach(), expected, atol=1e-5)
    assert len(get_params(model)) == 19_210 and torch.equal(images, before)


@pytest.mark.parametrize("classes", [3, 16, 17])
def test_the_mlp_is_the_plain_formula(classes: int) -> None:
    """Its in-place ReLU and its padded output layer have the logits and the gradients of it."""
    model, images = MLP(6, 5, classes), torch.randn(9, 6)
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, classes))
    set_params(plain, get_params(model))
    for network in (model, plain):
        nn.functional.cross_entropy(network(images), torch.arange(9) % 3).backward()
    torch.testing.assert_close(model(images), plain(images))
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad.any()
        torch.testing.assert_close(one.grad, two.grad)


def test_params_round_trip_and_order() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    vector = torch.arange(11.0)
    set_params(model, vector)
    assert torch.equal(model[0].weight, torch.tensor([[0.0, 1, 2], [3, 4, 5]]))
    assert torch.equal(model[1].bias, torch.tensor([10.0]))
    assert torch.equal(get_params(model), vector) and not get_params(model).requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    vector.zero_()
    assert model[1].bias.item() == 10  # a copy, not a view
    for length in (10, 12):
        with pytest.raises(ValueError, match="11 parameters"):
            set_params(model, torch.zeros(length))


def test_slerp_by_hand() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    third = torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    torch.testing.assert_close(slerp(1 / 3, a, b), third)
    both = slerp(torch.tensor([0.0, 1.0]), a, 2 * b)  # one t for each parameter
    torch.testing.assert_close(both, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("seed", range(20))
def test_slerp_properties(seed: int) -> None:
    torch.manual_seed(seed)
    a, b, t = torch.randn(50), torch.randn(50), torch.rand(()).item()
    assert torch.equal(slerp(0, a, b), a) and torch.equal(slerp(1, a, b), b)
    torch.testing.assert_close(slerp(t, a, b), slerp(1 - t, b, a))
    a, b = a / a.norm(), b / b.norm()
    middle = slerp(t, a, b)
    assert middle.norm().item() == pytest.approx(1, abs=1e-5)
    omega = math.acos(torch.dot(a, b))
    assert math.acos(torch.dot(a, middle).clamp(-1, 1)) == pytest.approx(t * omega, abs=1e-3)


@pytest.mark.parametrize("t", [0, 0.25, 0.5, 1, torch.tensor([0.1, 0.6, 0.9])])
def test_slerp_where_the_angle_is_of_no_use(t: float | Tensor) -> None:
    a, zero = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3)
    for first, second in ((a, a), (a, 2 * a), (a, -a), (a, zero), (zero, a), (zero, zero)):
        linear = (1 - t) * first + t * second
        torch.testing.assert_close(slerp(t, first, second), linear, atol=1e-5, rtol=1e-5)
    assert slerp(t, 1e30 * a, 1e30 * a.flip(0)).isfinite().all()
