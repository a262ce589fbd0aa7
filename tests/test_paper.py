"""The paper's own experiment (tests/paper.py): parameter orders, brute force, a slow run."""

import pytest

pytest.importorskip("sklearn", reason="the paper's data come with scikit-learn")
import torch
from paper import PASSES, Evaluator, MLPByPixel, brute_force, experiment, show_table
from settings import digits, train_specialists

from m2n2_mnist import get_params


def test_parameter_orders_are_of_the_same_function():
    images, labels, *_ = digits()
    for mlp in train_specialists(images, labels, seed=42):
        by_pixel = MLPByPixel(mlp)
        torch.testing.assert_close(by_pixel(images), mlp(images), rtol=1e-4, atol=1e-4)
        of_the_first_pixel = mlp.hidden.weight[:, 0]
        assert torch.equal(get_params(by_pixel)[:256], of_the_first_pixel)


def test_merging_surpasses_both_specialists():
    """A grid of SLERPs is at least as good as its ends, M2N2 better."""
    m2n2 = experiment("M2N2", "by input pixel", pretrained=True, seed=42)
    evaluator, (a, b) = Evaluator(m2n2), m2n2.archive[:2].clone()
    best = evaluator.accuracy(brute_force(evaluator, a, b, points=20))
    assert evaluator.children == 21
    specialists = evaluator.accuracy(a), evaluator.accuracy(b)
    m2n2.evolve(200)
    assert best >= max(specialists) and m2n2.history[-1]["train_acc"] > max(specialists)


@pytest.mark.slow
def test_experiment_1_of_the_paper():
    """Five seeds, a quarter of an hour on two cores."""
    methods = ["M2N2", "M2N2 without crossover", "GA"]
    accuracies = show_table("scratch", methods, range(42, 47), PASSES["scratch"])
    m2n2, without_crossover, ga = (accuracies[method].mean() for method in methods)
    assert abs(m2n2 - 87) < 2.5
    assert m2n2 > without_crossover > ga
