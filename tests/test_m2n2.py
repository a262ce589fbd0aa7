"""The equations of M2N2 against plain NumPy loops, and what must hold of any run."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import make_m2n2
from torch.utils._python_dispatch import TorchDispatchMode

from m2n2_mnist import M2N2, MLP, get_params

# The reference: the paper's equations, a loop for every sum.


def reference_fitness(scores: np.ndarray, alpha: float) -> np.ndarray:
    fitness = np.zeros(len(scores))
    for j in range(scores.shape[1]):
        z = sum(scores[:, j])
        for i in range(len(scores)):
            if z > 0:
                fitness[i] += scores[i, j] / z**alpha
    return fitness


def reference_attraction(scores: np.ndarray, first: int, alpha: float) -> np.ndarray:
    attraction = np.zeros(len(scores))
    for j in range(scores.shape[1]):
        z = sum(scores[:, j])
        for i in range(len(scores)):
            if z > 0:
                attraction[i] += max(scores[i, j] - scores[first, j], 0) / z**alpha
    return attraction


def reference_slerp(t: float, a: np.ndarray, b: np.ndarray, omega: float) -> np.ndarray:
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


def random_scores(rows: int, examples: int, score: str, seed: int) -> torch.Tensor:
    scores = torch.rand(rows, examples, generator=torch.Generator().manual_seed(seed))
    scores[:, :3] = 0  # examples that nobody covers
    return (scores > 0.6).float() if score == "correct" else scores


CASES = [(score, alpha) for score in ("correct", "probability") for alpha in (0, 0.5, 1)]


@pytest.mark.parametrize(("score", "alpha"), CASES)
def test_fitness(score: str, alpha: float) -> None:
    m2n2 = make_m2n2(score=score, alpha=alpha)
    for seed in range(5):
        m2n2._scores.copy_(random_scores(5, 40, score, seed))
        expected = reference_fitness(m2n2.scores.double().numpy(), alpha)
        np.testing.assert_allclose(m2n2._update_fitness(), expected, rtol=1e-5)
        expected = reference_fitness(m2n2._scores.double().numpy(), alpha)
        np.testing.assert_allclose(m2n2._update_fitness(with_child=True), expected, rtol=1e-5)


def test_fitness_by_hand() -> None:
    m2n2 = make_m2n2(examples=4, archive_size=3)
    m2n2.scores.copy_(torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]))
    expected = torch.tensor([1 / 3 + 1 / 2, 1 / 3, 1 / 3 + 1 / 2 + 1])
    torch.testing.assert_close(m2n2._update_fitness(), expected)


@pytest.mark.parametrize("score", ["correct", "probability"])
def test_fitness_sums_to_the_covered_examples(score: str) -> None:
    m2n2 = make_m2n2(score=score)
    for seed in range(10):
        m2n2._scores.copy_(random_scores(5, 40, score, seed))
        covered = (m2n2.scores.sum(dim=0) > 0).sum().item()
        assert m2n2._update_fitness().sum().item() == pytest.approx(covered, rel=1e-5)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """At most the 99.99th percentile of chi-square, by the Wilson-Hilferty approximation."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = counts.sum() * probabilities[possible]
    statistic, free = ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1
    assert statistic < free * (1 - 2 / (9 * free) + 3.72 * math.sqrt(2 / (9 * free))) ** 3


@pytest.mark.parametrize(("score", "alpha"), CASES)
@pytest.mark.parametrize("attraction", [True, False])
def test_parents_are_drawn_by_fitness_and_attraction(score: str, alpha: float, attraction: bool) -> None:
    m2n2 = make_m2n2(score=score, alpha=alpha, use_attraction=attraction)
    m2n2.scores.copy_(random_scores(4, 40, score, seed=3))
    m2n2.scores[3] = 0  # never the first parent, never attractive
    scores = m2n2.scores.double().numpy()
    fitness = reference_fitness(scores, alpha)
    counts = np.zeros((4, 4))
    for _ in range(6_000):
        counts[tuple(index.item() for index in m2n2._select_parents())] += 1
    chi_square(counts.sum(axis=1), fitness / fitness.sum())
    for first in range(3):
        second = reference_attraction(scores, first, alpha) if attraction else fitness
        chi_square(counts[first], second / second.sum())


def test_second_parent_is_the_first_where_nobody_does_better() -> None:
    m2n2 = make_m2n2()
    m2n2.scores.fill_(0.5)
    parents = [m2n2._select_parents() for _ in range(50)]
    assert all(first == second for first, second in parents)
    assert len({first.item() for first, _ in parents}) > 1


@pytest.mark.parametrize("seed", range(10))
def test_crossover(seed: int) -> None:
    m2n2 = make_m2n2(seed=seed)
    m2n2.archive.copy_(torch.randn(m2n2.archive.shape, generator=torch.Generator().manual_seed(seed)))
    twin = torch.Generator()
    twin.set_state(m2n2._generator.get_state())
    w = torch.rand(1, generator=twin).item()
    split = torch.randint(m2n2.archive.shape[1], (1,), generator=twin).item()
    a, b = m2n2.archive[1].double().numpy(), m2n2.archive[2].double().numpy()
    omega = math.acos(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))  # of the whole vectors
    expected = reference_slerp(w, a, b, omega)
    expected[split:] = reference_slerp(1 - w, a, b, omega)[split:]
    child = m2n2._crossover(torch.tensor([1]), torch.tensor([2]))
    np.testing.assert_allclose(child, expected, rtol=1e-4, atol=1e-6)


def test_crossover_ablations() -> None:
    one, two = torch.tensor([1]), torch.tensor([2])
    m2n2 = make_m2n2(use_crossover=False)
    m2n2.archive.normal_()
    assert torch.equal(m2n2._crossover(one, two), m2n2.archive[1])
    m2n2 = make_m2n2(use_split_point=False)
    m2n2.archive.normal_()
    twin = torch.Generator()
    twin.set_state(m2n2._generator.get_state())
    w, (a, b) = torch.rand(1, generator=twin).item(), m2n2.archive[1:3].double().numpy()
    omega = math.acos(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))
    expected = reference_slerp(w, a, b, omega)
    np.testing.assert_allclose(m2n2._crossover(one, two), expected, rtol=1e-4, atol=1e-6)


def test_mutation_follows_its_schedule() -> None:
    m2n2 = make_m2n2(hidden=500, mutation_std=0.2, final_mutation_std=0.1)
    measured, mutate = [], m2n2._mutate
    m2n2._mutate = lambda child: measured.append((mutate(child) - child).std().item()) or mutate(child)
    m2n2.evolve(4)
    m2n2.evolve(4)  # beyond its end: as the second half of eight
    wave = [0.1 + 0.1 * (1 + math.cos(math.pi * t)) / 2 for t in (0, 1 / 4, 2 / 4, 3 / 4, 4 / 8, 5 / 8, 6 / 8, 7 / 8)]
    assert measured == pytest.approx(wave, rel=0.05)


@pytest.mark.parametrize("hidden, parts", [(5, 1), (200_000, 2)])  # wide layers are evaluated in parts
@pytest.mark.parametrize("score", ["correct", "probability"])
def test_scores_are_those_of_the_model(score: str, hidden: int, parts: int) -> None:
    m2n2 = make_m2n2(40, 6, hidden, score=score, temperature=0.5)
    assert len(m2n2._parts) == parts
    params = torch.randn(m2n2.archive.shape[1]) / hidden**0.5
    w1, b1, w2, b2 = (x.double().numpy() for x in params.split([6 * hidden, hidden, 10 * hidden, 10]))
    units = np.maximum(m2n2.train_images.double().numpy() @ w1.reshape(hidden, 6).T + b1, 0)
    logits = units @ w2.reshape(10, hidden).T + b2
    expected = []
    for row, label in zip(logits, m2n2.train_labels.tolist(), strict=True):
        if score == "correct":
            expected.append(float(row.argmax() == label))
        else:
            expected.append(math.exp(row[label] / 0.5) / sum(math.exp(x / 0.5) for x in row))
    m2n2._evaluate(params)
    np.testing.assert_allclose(m2n2._scores[-1], expected, atol=1e-5)


def test_a_tie_for_the_highest_logit_is_wrong() -> None:
    """Or a model whose logits are all equal would be right everywhere."""
    m2n2 = make_m2n2(score="correct")
    m2n2._evaluate(torch.zeros_like(m2n2.archive[0]))
    assert not m2n2._scores[-1].any()


def reference_update(scores: np.ndarray, alpha: float) -> int:
    """Index of the row that goes, the child being the last: of equals the first."""
    fitness = list(reference_fitness(scores, alpha))
    return fitness.index(min(fitness))


@pytest.mark.parametrize(("score", "alpha"), CASES)
def test_archive_update(score: str, alpha: float) -> None:
    m2n2 = make_m2n2(score=score, alpha=alpha)
    gone = set()
    for seed in range(40):
        m2n2._models.normal_()
        m2n2._scores.copy_(random_scores(5, 40, score, seed))
        models, scores = m2n2._models.clone(), m2n2._scores.clone()
        worst = reference_update(scores.double().numpy(), alpha)
        m2n2._update_archive()
        models[worst], scores[worst] = models[4].clone(), scores[4].clone()
        assert torch.equal(m2n2.archive, models[:4]) and torch.equal(m2n2.scores, scores[:4])
        gone.add(worst)
    assert gone == set(range(5))  # the child's loss was seen too


@pytest.mark.parametrize("archive_size", [2, 4, 9, 20])
@pytest.mark.parametrize("examples", [40, 1_437])
def test_of_equals_the_first_member_goes(archive_size: int, examples: int) -> None:
    m2n2 = make_m2n2(examples=examples, archive_size=archive_size)
    m2n2._scores.copy_(torch.rand(examples).expand_as(m2n2._scores))
    m2n2._models.copy_(torch.arange(archive_size + 1.0)[:, None].expand_as(m2n2._models))
    m2n2._update_archive()
    assert m2n2.archive[:, 0].tolist() == [archive_size, *range(1, archive_size)]


@pytest.mark.parametrize("score", ["correct", "probability"])
def test_members_leave_only_as_the_worst(score: str) -> None:
    """Followed from the empty archive on: who goes is the reference's worst of the K + 1."""
    m2n2 = make_m2n2(score=score, archive_size=6)
    filled = [(row != 0).any().item() for row in m2n2.archive]
    assert 1 <= sum(filled) <= 2 and not m2n2.scores[~torch.tensor(filled)].any()
    for _ in range(60):
        before = m2n2._models.clone(), m2n2.scores.clone()
        m2n2._step()
        scores = torch.cat([before[1], m2n2._scores[-1:]])
        fitness = reference_fitness(scores.double().numpy(), 1)
        changed = [i for i in range(6) if not torch.equal(m2n2.archive[i], before[0][i])]
        (gone,) = changed or [6]
        assert fitness[gone] == pytest.approx(fitness.min(), rel=1e-6)  # different scores may sum to the same
    assert all((row != 0).any() for row in m2n2.archive)


def test_the_random_start() -> None:
    m2n2 = make_m2n2(hidden=500, init_std=0.25, archive_size=3)
    norms = m2n2.archive.std(dim=1)
    assert sorted(norms.tolist()) == pytest.approx([0, 0.25, 0.25], rel=0.1)


def test_same_seed_same_bits() -> None:
    one, two, other = make_m2n2(seed=5), make_m2n2(seed=5), make_m2n2(seed=6)
    for m2n2 in (one, two, other):
        m2n2.evolve(100, test_every=30)
    assert torch.equal(one.archive, two.archive) and one.history == two.history
    assert not torch.equal(one.archive, other.archive)
    assert [row["iteration"] for row in one.history] == [30, 60, 90, 100]


def test_evolve_goes_on_where_it_stopped() -> None:
    whole, halves = make_m2n2(), make_m2n2()
    whole.evolve(100, test_every=25)
    halves.evolve(100, test_every=25, after_child=lambda m: m.iteration == 40)
    assert halves.iteration == 40
    resumed = make_m2n2()
    resumed.load_state_dict(halves.state_dict())
    resumed.evolve(60, test_every=25)
    assert torch.equal(whole.archive, resumed.archive) and whole.history == resumed.history
    assert torch.equal(whole.scores, resumed.scores)
    halves.evolve(10)
    assert halves.iteration == 50


def test_empty_slots_stay_empty_in_a_checkpoint() -> None:
    one, two = make_m2n2(archive_size=8), make_m2n2(archive_size=8, seed=2)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.scores, two.scores) and (two.scores.sum(dim=1) == 0).sum() >= 6


def test_history_rows() -> None:
    m2n2 = make_m2n2(score="correct")
    m2n2.evolve(50, test_every=50)
    (row,) = m2n2.history
    accuracy = m2n2.scores.mean(dim=1)  # what 0/1 scores are
    assert row["train_acc"] == pytest.approx(accuracy.max().item())
    assert row["test_acc"] == pytest.approx(row["train_acc"])  # the same data here
    assert row["best_fitness"] == pytest.approx(m2n2._update_fitness().max().item())
    assert row["coverage"] == pytest.approx(m2n2.scores.any(dim=0).float().mean().item())
    assert 0 < row["acceptance"] <= 1
    hits = torch.zeros(4, 10)
    for j, label in enumerate(m2n2.train_labels):
        hits[:, label] += m2n2.scores[:, j]
    assert torch.equal(m2n2.train_hits().float(), hits)


def test_acceptance_is_that_of_the_children_since_the_last_row() -> None:
    m2n2, accepted = make_m2n2(), []
    archive = m2n2.archive.clone()

    def after_child(m2n2: M2N2) -> None:
        accepted.append(not torch.equal(archive, m2n2.archive))
        archive.copy_(m2n2.archive)

    m2n2.evolve(50, 20, after_child)
    m2n2.evolve(30, 20, after_child)  # beyond its end, from a row of half the distance on
    rows = [0, *(row["iteration"] for row in m2n2.history)]
    assert rows == [0, 20, 40, 50, 60, 80]
    shares = [sum(accepted[a:b]) / (b - a) for a, b in pairwise(rows)]
    assert [row["acceptance"] for row in m2n2.history] == pytest.approx(shares)


def test_best_model_is_the_best_member_on_training_data() -> None:
    m2n2 = make_m2n2(score="correct")
    m2n2.evolve(80)
    m2n2.test_labels = (m2n2.test_labels + 1) % 10  # test data steers nothing
    best = m2n2.best_model()
    assert isinstance(best, MLP) and best is not m2n2.model
    assert torch.equal(get_params(best), m2n2.archive[m2n2.scores.mean(dim=1).argmax()])
    predicted = best(m2n2.test_images).argmax(dim=1)
    right = (predicted == m2n2.test_labels).float().mean().item()
    assert m2n2.test_accuracy(get_params(best)[None]) == pytest.approx(right)


def test_ensemble_is_the_mean_of_probabilities() -> None:
    m2n2 = make_m2n2(examples=500, temperature=4.0)
    m2n2.archive.normal_(generator=torch.Generator().manual_seed(0))

    def accuracy(temperature: float) -> float:
        logits = torch.stack([m2n2._logits(params, m2n2.test_images).T for params in m2n2.archive])
        predicted = (logits / temperature).softmax(dim=2).sum(dim=0).argmax(dim=1)
        return (predicted == m2n2.test_labels).float().mean().item()

    assert accuracy(4.0) != accuracy(1.0)  # the temperature matters here
    assert m2n2.test_accuracy(m2n2.archive) == pytest.approx(accuracy(4.0))


@pytest.mark.parametrize("score", ["correct", "probability"])
def test_evolution_learns(score: str) -> None:
    m2n2 = make_m2n2(examples=200, archive_size=10, score=score)
    start = m2n2.train_hits().sum(dim=1).max()
    m2n2.evolve(2_000)
    assert m2n2.history[-1]["train_acc"] > start / 200 + 0.25


def test_initial_models_take_the_place_of_random_ones() -> None:
    models = [MLP(6, 5, 10), MLP(6, 5, 10)]
    m2n2 = make_m2n2(initial_models=models)
    found = {tuple(row.tolist()) for row in m2n2.archive if row.any()}
    assert found == {tuple(get_params(model).tolist()) for model in models}
    m2n2 = make_m2n2(initial_models=models, mutation_std=0.0, final_mutation_std=0.0)
    m2n2.evolve(50)
    basis = torch.stack([get_params(model) for model in models], dim=1).double()
    for row in m2n2.archive.double():  # without mutation each parameter mixes those of the two
        inside = torch.linalg.lstsq(basis, row[:, None]).residuals
        assert row.any() and inside.numel() <= 1


@pytest.mark.parametrize("score", ["correct", "probability"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_overflow_never_enters(score: str, bad: float) -> None:
    m2n2 = make_m2n2(score=score)
    m2n2.evolve(30)
    archive, scores = m2n2.archive.clone(), m2n2.scores.clone()
    m2n2._evaluate(torch.full_like(archive[0], bad))
    m2n2._evaluate(m2n2._models[-1] * torch.randn(archive.shape[1]).sign())
    m2n2._update_archive()
    assert torch.equal(m2n2.archive, archive) and torch.equal(m2n2.scores, scores)
    assert m2n2._update_fitness().isfinite().all()


@pytest.mark.parametrize("score", ["correct", "probability"])
def test_huge_mutations_never_poison(score: str) -> None:
    m2n2 = make_m2n2(score=score, archive_size=6, mutation_std=1e30, final_mutation_std=1e30)
    before = m2n2.archive.clone()
    m2n2.evolve(100)
    assert torch.equal(m2n2.archive, before)  # not even over the empty slots
    assert m2n2._update_fitness().isfinite().all()
    assert math.isfinite(m2n2.history[-1]["best_fitness"])


def test_odd_data() -> None:
    for examples in (1, 3):  # fewer than archive members
        make_m2n2(examples=examples).evolve(30)
    m2n2 = make_m2n2()
    m2n2.train_labels.zero_()  # a single class
    m2n2.evolve(30)
    m2n2.scores.zero_()
    m2n2.evolve(30)
    assert m2n2.archive.isfinite().all()
    constant = make_m2n2(score="correct", init_std=1e-12, mutation_std=0.0, final_mutation_std=0.0)
    constant.train_labels.fill_(9)  # nobody is ever right
    constant.scores.zero_()
    constant.evolve(30)
    assert constant.archive.isfinite().all()


def test_any_model() -> None:
    images, labels = torch.randn(30, 3, 4), torch.arange(30) % 3
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    m2n2 = M2N2(model, images, labels, images, labels, archive_size=3)
    m2n2.evolve(20)
    assert isinstance(m2n2.best_model(), torch.nn.Sequential)


def test_bad_arguments() -> None:
    for bad in ({"archive_size": 1}, {"score": "accuracy"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make_m2n2(**bad)


class NoHostWait(TorchDispatchMode):
    """Fails on the operations that make the host wait for the device's values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "multinomial", "_unique2")
        assert func._opname not in waits, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("score", ["correct", "probability"])
@pytest.mark.parametrize("switch", ["use_crossover", "use_split_point", "use_attraction", "none"])
def test_an_iteration_never_waits_for_the_device(score: str, switch: str) -> None:
    """What makes it fit for capture as a CUDA graph: no host wait, and all state in place."""
    m2n2 = make_m2n2(score=score, **({} if switch == "none" else {switch: False}))
    for mode in (torch.no_grad, torch.inference_mode):  # the check itself works
        with pytest.raises(AssertionError), NoHostWait(), mode():
            m2n2._scores.sum().item()
    state = [value for value in vars(m2n2).values() if isinstance(value, torch.Tensor)]
    state = {t.data_ptr() for t in state if t is not m2n2._shares}
    with NoHostWait():
        for _ in range(3):
            m2n2._step()
    after = [value for value in vars(m2n2).values() if isinstance(value, torch.Tensor)]
    assert {t.data_ptr() for t in after if t is not m2n2._shares} == state


def test_memory_does_not_grow_with_the_iterations() -> None:
    import tracemalloc

    m2n2 = make_m2n2()
    m2n2.evolve(200, test_every=10_000)
    tracemalloc.start()
    m2n2.evolve(1_000, test_every=10_000)
    assert tracemalloc.get_traced_memory()[0] < 50_000
    tracemalloc.stop()
