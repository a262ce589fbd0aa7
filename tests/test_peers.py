"""The methods M2N2 is held against: each keeps to its budget and learns."""

import pytest
import torch
from peers import SETTINGS, Evaluator, run
from torch import Tensor

from m2n2_mnist import M2N2, MLP

EVOTORCH = {"PGPE", "SNES", "separable CMA-ES", "MAP-Elites"}
CHILDREN = 1_000


def clouds(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten clouds around the ten axes."""
    labels = torch.arange(examples) % 10
    noise = torch.randn(examples, 10, generator=torch.Generator().manual_seed(seed))
    return 3 * torch.eye(10)[labels] + noise, labels


@pytest.mark.parametrize("method", SETTINGS)
def test_keeps_to_its_budget_and_learns(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if method in EVOTORCH:
        pytest.importorskip("evotorch", reason="tests/requirements-peers.txt is not installed")
    settings = {"mutation_std": 0.05} | (SETTINGS[method] if method == "GA" else {})
    m2n2 = M2N2(MLP(10, 16), *clouds(400, 0), *clouds(400, 1), seed=0, **settings)
    passes, logits = 0, m2n2.logits

    def counted(params: Tensor, images: Tensor) -> Tensor:
        nonlocal passes
        passes += images is m2n2.train_images
        return logits(params, images)

    monkeypatch.setattr(m2n2, "logits", counted)
    own = {} if method in ("M2N2", "GA") else SETTINGS[method]
    if method == "MAP-Elites":
        own = {"mutation_std": 0.05}
    row = run(method, m2n2, seed=0, children=CHILDREN, **own)
    assert row["test"] > 30  # chance is 10
    assert 0 < passes <= CHILDREN + 30  # what is chosen in the end is measured on top
    assert list(row["milestones"].values()) == sorted(row["milestones"].values())


def test_the_objectives_are_those_of_the_training_examples() -> None:
    images, labels = clouds(50, 0)
    m2n2 = M2N2(MLP(10, 16), images, labels, *clouds(20, 1), seed=0)
    evaluator, params = Evaluator(m2n2), m2n2.archive[0]
    logits = m2n2.logits(params, images).T
    torch.testing.assert_close(evaluator.loss(params), torch.nn.functional.cross_entropy(logits, labels).item())
    right = logits.argmax(dim=1) == labels
    odd, even = right[labels % 2 == 1].float().mean(), right[labels % 2 == 0].float().mean()
    assert evaluator.accuracy(params) == pytest.approx(right.float().mean().item())
    assert evaluator.by_cell(params)[1:] == [min(9, int(10 * odd)), min(9, int(10 * even))]
    assert evaluator.passes == 3
