"""The paper's own experiment (tests/paper.py): its parameter orders, brute force, and a slow run of its table."""

import pytest

pytest.importorskip("sklearn", reason="the paper's data come with scikit-learn")
import torch
from paper import PASSES, Evaluator, MLPByPixel, brute_force, experiment, show_table
from settings import digits, train_specialists

from m2n2_mnist import M2N2, get_params


@pytest.fixture
def merging() -> M2N2:
    return experiment("M2N2", "by input pixel", pretrained=True, seed=42)


def test_parameter_orders_are_of_the_same_function() -> None:
    images, labels, *_ = digits()
    for mlp in train_specialists(images, labels, seed=42):
        by_pixel = MLPByPixel(mlp)
        torch.testing.assert_close(by_pixel(images), mlp(images), rtol=1e-4, atol=1e-4)
        assert torch.equal(get_params(by_pixel)[:256], mlp.hidden.weight[:, 0])  # all weights of the first pixel


def test_merging_surpasses_both_specialists(merging: M2N2) -> None:
    specialists = merging._right().float().mean(dim=1)
    merging.evolve(200)
    assert merging.history[-1]["train_acc"] > specialists.max()


def test_brute_force_is_at_least_as_good_as_its_ends(merging: M2N2) -> None:
    evaluator, (a, b) = Evaluator(merging), merging.archive[:2]
    best = evaluator.accuracy(brute_force(evaluator, a, b, points=20))
    assert evaluator.passes == 21
    assert best >= max(evaluator.accuracy(a), evaluator.accuracy(b))


@pytest.mark.slow
def test_experiment_1_of_the_paper() -> None:
    """Five seeds, a quarter of an hour on two cores."""
    methods = ["M2N2", "M2N2 without crossover", "GA"]
    accuracies = show_table("scratch", methods, range(42, 47), PASSES["scratch"])
    m2n2, without_crossover, ga = (accuracies[method].mean() for method in methods)
    assert abs(m2n2 - 87) < 2.5
    assert m2n2 > without_crossover > ga
