"""The operators against the authors' own, in JAX.

The same numbers in, the same row replaced, parents and child out.

    git clone https://github.com/SakanaAI/natural_niches ../natural_niches
    pip install jax optax scikit-learn

Skipped without them. NATURAL_NICHES names another folder. They differ on purpose where theirs gives
NaN: zero vectors in SLERP, and nobody who is better than the first parent anywhere.
"""

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, all_models, all_scores, make_m2n2

from m2n2_mnist import M2N2, slerp

jax = pytest.importorskip("jax")
for needed in ("optax", "sklearn"):  # which their modules import
    pytest.importorskip(needed)
FOLDER = Path(os.environ.get("NATURAL_NICHES", ROOT.parent / "natural_niches"))
if not (FOLDER / "natural_niches_fn.py").is_file():
    pytest.skip(
        f"{FOLDER} is no clone of natural_niches; NATURAL_NICHES names it", allow_module_level=True
    )

CASES = [(score, alpha) for score in ("correct", "probability") for alpha in (1.0, 0.5, 0.0)]


@pytest.fixture(scope="module")
def authors() -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import helper_fn
        import natural_niches_fn
    return SimpleNamespace(niches=natural_niches_fn, helper=helper_fn)


def to_jax(tensor: torch.Tensor) -> jax.Array:
    return jax.numpy.asarray(tensor.numpy())


def random_scores(models: int, score: str, random: torch.Generator) -> torch.Tensor:
    """Models good and bad, `(models, 60)`; nobody is right on the first three examples."""
    scores = torch.rand(models, 60, generator=random)
    if score == "correct":
        scores = (scores < torch.rand(models, 1, generator=random)).float()
    scores[:, :3] = 0
    return scores


def decided(scores: torch.Tensor, alpha: float) -> bool:
    """Whether all of the least fitness within rounding are equal: every code has the same worst."""
    z = scores.double().sum(dim=0)
    fitness = (scores / torch.where(z > 0, z, 1) ** alpha).sum(dim=1)
    least = scores[fitness <= fitness.min() * (1 + 1e-5)]
    return bool((least == least[0]).all())


@pytest.mark.parametrize("archive_size", [2, 4, 20])
@pytest.mark.parametrize(("score", "alpha"), CASES)
def test_archive_update(authors, score, alpha, archive_size):
    """From the empty archive on, whose slots are a tie; every fifth child is a member's equal."""
    m2n2 = make_m2n2(60, archive_size=archive_size, alpha=alpha)
    random = torch.Generator().manual_seed(archive_size)
    m2n2.archive.zero_()
    m2n2.scores.zero_()
    entered = []
    for child in range(1, 6 * archive_size + 30):
        scores = random_scores(1, score, random)[0]
        if child % 5 == 0:
            scores = m2n2.scores[m2n2._update_fitness(m2n2.scores)[0].argmin()].clone()
        if decided(torch.cat([m2n2.scores, scores[None]]), alpha):
            params = torch.full_like(m2n2.archive[0], child)
            given = [to_jax(x) for x in (scores, params, m2n2.archive, m2n2.scores)]
            archive, kept = authors.niches.update_archive(*given, alpha)
            all_models(m2n2)[-1] = params
            all_scores(m2n2)[-1] = scores
            m2n2._update_archive()
            np.testing.assert_array_equal(archive, m2n2.archive)
            np.testing.assert_array_equal(kept, m2n2.scores)
            entered.append(child in m2n2.archive)
    assert entered[0] and len(entered) > 2 * archive_size + 10 and not all(entered)


def captured(
    authors: ModuleType, m2n2: M2N2, first: int, patch: pytest.MonkeyPatch
) -> tuple[list, list]:
    """The probabilities by which parents are drawn, theirs and ours, when the first is `first`."""
    theirs, ours = [], []

    def choice(key: jax.Array, n: int, shape: tuple[int, ...], p: jax.Array) -> jax.Array:
        theirs.extend([np.asarray(p)] * shape[0])
        return jax.numpy.full(shape, first)

    def draw(weights: torch.Tensor) -> torch.Tensor:
        ours.append((weights / weights.sum()).numpy())
        return torch.tensor([first])

    patch.setattr(jax.random, "choice", choice)
    patch.setattr(m2n2, "_draw", draw)
    state = to_jax(m2n2.archive), to_jax(m2n2.scores)
    authors.sample_parents(*state, jax.random.PRNGKey(0), m2n2.alpha, m2n2.use_attraction)
    m2n2._select_parents()
    return theirs, ours


@pytest.mark.parametrize("attraction", [True, False])
@pytest.mark.parametrize(("score", "alpha"), CASES)
def test_parents(authors, score, alpha, attraction, monkeypatch):
    m2n2 = make_m2n2(60, archive_size=5, alpha=alpha, use_attraction=attraction)
    random = torch.Generator()
    for seed in range(10):
        m2n2.scores.copy_(random_scores(5, score, random.manual_seed(seed)))
        m2n2.scores[3] = m2n2.scores.amax(dim=0)  # nobody beats it
        m2n2.scores[4] = 0  # an empty slot
        for first in range(4):
            theirs, ours = captured(authors.niches, m2n2, first, monkeypatch)
            assert len(theirs) == len(ours) == 2
            if attraction and first == 3:
                assert np.isnan(theirs[1]).all()
                theirs[1] = np.eye(5)[3]  # ours is the first parent again
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def vectors(params: int, seed: int) -> torch.Tensor:
    """Two parents, at an angle that differs from seed to seed."""
    a, b = torch.randn(2, params, generator=torch.Generator().manual_seed(seed))
    return torch.stack([a, 0.5 * b + (seed - 2) * a])


@pytest.mark.parametrize("w", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_slerp(authors, seed, w):
    a, b = vectors(95, seed)
    for x, y in ((a, b), (a, a), (a, 3 * a), (a, a + 0.09 * a.roll(1))):
        theirs = authors.helper.slerp(w, to_jax(x), to_jax(y))
        np.testing.assert_allclose(slerp(w, x, y), theirs, rtol=1e-4, atol=1e-4)


def our_child(
    m2n2: M2N2, parents: torch.Tensor, w: float, split_point: int, patch: pytest.MonkeyPatch
) -> torch.Tensor:
    """Of the parents `(2, params)`, with the random numbers given."""

    def randint(high: int, size: tuple[int], **options: object) -> torch.Tensor:
        assert high == parents.shape[1]  # as in theirs
        return torch.full(size, split_point)

    m2n2.archive[:2] = parents
    with patch.context() as context:
        context.setattr(torch.Tensor, "uniform_", lambda empty, **options: empty.fill_(w))
        context.setattr(torch, "randint", randint)
        return m2n2._crossover(torch.tensor([0]), torch.tensor([1]))


@pytest.mark.parametrize("seed", range(5))
def test_crossover(authors, seed, monkeypatch):
    split, whole = make_m2n2(), make_m2n2(use_split_point=False)
    params, helper = split.archive.shape[1], authors.helper
    parents = vectors(params, seed)
    a, b = to_jax(parents)
    cases = []
    for p in (0, 1, params // 2, params - 1):
        cases.append((helper.slerp_w_splitpoint(0.3, p, a, b), split, 0.3, p))
    key = jax.random.PRNGKey(seed)
    first, second = jax.random.split(key)  # what their crossover draws from
    split_point = jax.random.randint(first, (), 0, params).item()
    w = jax.random.uniform(second).item()
    cases.append((helper.crossover((a, b), key), split, w, split_point))
    w = jax.random.uniform(key).item()
    cases.append((helper.crossover_without_splitpoint((a, b), key), whole, w, 0))
    for theirs, m2n2, w, split_point in cases:
        ours = our_child(m2n2, parents, w, split_point, monkeypatch)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
