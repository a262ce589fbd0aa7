"""The examples that children are scored on, against the criterion written out in NumPy.

What a subset changes in a run as a whole is tested where all of the examples are.
"""

import numpy as np
import pytest
import torch
from conftest import make_m2n2
from test_m2n2 import chi_square, every_score, reference_scores
from torch import nn

from m2n2_mnist import M2N2


def reference_half(m2n2: M2N2, subset_size: int) -> set[int]:
    """The half of the highest Σ_i s_ij (1 - s_ij) over the members, s a softmax probability."""
    spread = np.zeros(len(m2n2.train_labels))
    for params in m2n2.archive:
        if params.any():
            for j, s in enumerate(reference_scores(m2n2, params, "probability")):
                spread[j] += s * (1 - s)
    return set(np.argsort(-spread)[: subset_size // 2].tolist())


@every_score
@pytest.mark.parametrize("subset_size", [1, 15, 39])
def test_which_examples_are_chosen(subset_size, score):
    """Half by the criterion, half from the rest, no example twice, all of them in time."""
    m2n2 = make_m2n2(subset_size=subset_size, subset_every=1, score=score, schedule=40)
    seen, halves = set(), set()
    assert sorted(m2n2.subset.tolist()) != list(range(subset_size))  # data may be sorted
    for _ in range(1_000):
        half = reference_half(m2n2, subset_size)  # by the archive before the child
        m2n2.evolve(1)
        chosen = m2n2.subset.tolist()
        assert len(chosen) == len(set(chosen)) == subset_size == m2n2.subset_size
        assert half <= set(chosen)
        seen |= set(chosen)
        halves.add(frozenset(half))
        if len(seen) == 40 and len(halves) > (subset_size > 1):
            break
    assert seen == set(range(40))
    assert len(halves) > (subset_size > 1)  # it follows the members


def test_the_rest_is_drawn_evenly():
    m2n2, counts = make_m2n2(subset_size=16, subset_every=1), np.zeros(40)
    half = reference_half(m2n2, 16)
    archive = m2n2.archive.clone()
    for _ in range(500):
        m2n2.evolve(1, test_every=10**9)
        m2n2.archive.copy_(archive)  # so that the half stays
        counts[m2n2.subset] += 1
    rest = [j not in half for j in range(40)]
    assert (counts[~np.array(rest)] == 500).all()
    chi_square(counts * rest, np.array(rest) / sum(rest))


@every_score
def test_members_are_scored_on_each_new_subset(score):
    """As children are, in its order; an empty slot has no score; and it stays for its period."""
    m2n2 = make_m2n2(subset_size=15, subset_every=3, score=score, schedule=30)
    subsets = []
    for _ in range(30):
        m2n2.evolve(1)
        subsets.append(m2n2.subset.tolist())
        assert m2n2.scores.shape == (4, 15)
        for params, scores in zip(m2n2.archive, m2n2.scores, strict=True):
            expected = reference_scores(m2n2, params, score)[subsets[-1]] * bool(params.any())
            np.testing.assert_allclose(scores, expected, atol=1e-5)
    for i in range(30):
        assert (subsets[i] == subsets[i - 1]) == (i % 3 > 0)


@pytest.mark.parametrize("subset_size", [0, 40, 41])
def test_all_examples(subset_size):
    m2n2 = make_m2n2(subset_size=subset_size, subset_every=2)
    m2n2.evolve(5)
    assert m2n2.subset.tolist() == list(range(40)) and m2n2.subset_size == 40


class Overflows(nn.Linear):
    """Answers infinity to the image of ones."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        ones = (images == 1).all(dim=1, keepdim=True)
        return super().forward(images) + torch.where(ones, torch.inf, 0)


@every_score
def test_an_example_on_which_members_overflow(score):
    """One may be met after they entered: it pays nothing and is no better a choice than others."""
    images, labels = torch.linspace(-1, 1, 240).view(40, 6).sin(), torch.arange(40) % 10
    images[3] = 1
    settings = {"archive_size": 4, "subset_size": 10, "subset_every": 1, "seed": 1}
    m2n2 = M2N2(Overflows(6, 10), images, labels, images, labels, score=score, **settings)
    assert 3 not in m2n2.subset and m2n2.archive.any()  # by the seed
    met = 0
    for _ in range(100):
        m2n2.evolve(1)
        met += 3 in m2n2.subset
        assert m2n2.scores.isfinite().all()
        assert not m2n2.scores[:, m2n2.subset == 3].any()
    assert 0 < met < 50
