"""Flat parameter vectors, SLERP and the MLP."""

import math

import pytest
import torch
from torch import nn

from m2n2_mnist import MLP, get_params, set_params, slerp


@pytest.mark.parametrize(
    "inputs, hidden, classes", [(64, 256, 10), (6, 5, 3), (6, 5, 16), (6, 5, 17)]
)
def test_the_mlp_is_the_plain_formula(inputs, hidden, classes):
    """Its in-place ReLU and its padded output layer have its logits and gradients."""
    model, images = MLP(inputs, hidden, classes), torch.randn(9, 1, inputs)
    plain = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )
    set_params(plain, get_params(model))
    before = images.clone()
    for network in (model, plain):
        nn.functional.cross_entropy(network(images), torch.arange(9) % 3).backward()
    torch.testing.assert_close(model(images), plain(images))
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad.any()
        torch.testing.assert_close(one.grad, two.grad)
    assert torch.equal(images, before)


def test_params_round_trip_and_order():
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


def test_slerp_by_hand():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    third = torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    torch.testing.assert_close(slerp(1 / 3, a, b), third)
    ends = slerp(torch.tensor([0.0, 1.0]), a, 2 * b)  # one t for each parameter
    torch.testing.assert_close(ends, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("t", [0, 0.25, 0.5, 1, torch.tensor([0.1, 0.6, 0.9])])
def test_slerp_where_the_angle_is_of_no_use(t):
    a, zero = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3)
    for first, second in ((a, a), (a, 2 * a), (a, -a), (a, zero), (zero, a), (zero, zero)):
        linear = (1 - t) * first + t * second
        torch.testing.assert_close(slerp(t, first, second), linear, atol=1e-5, rtol=1e-5)
    assert slerp(t, 1e30 * a, 1e30 * a.flip(0)).isfinite().all()
