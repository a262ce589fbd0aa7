"""The equations of M2N2 against plain NumPy loops, and what must hold of any run."""

import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import all_scores, child_of, make_m2n2
from settings import GA, digits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from m2n2_mnist import M2N2, MLP, get_params

every_score = pytest.mark.parametrize("score", ["correct", "probability"])
every_fitness = pytest.mark.parametrize(
    ("score", "alpha"), [(score, alpha) for score in ("correct", "probability") for alpha in (0, 0.5, 1)]
)


# --- The reference: the paper's equations, a loop for every sum ---
def reference_fitness(scores: np.ndarray, alpha: float, gains: np.ndarray | None = None) -> np.ndarray:
    """Σ_j s_ij / z_j^α; or, for the attraction, of gains max(s_ij - s_Aj, 0) in place of s_ij."""
    gains, fitness = scores if gains is None else gains, np.zeros(len(scores))
    for j in range(scores.shape[1]):
        z = sum(scores[:, j])
        for i in range(len(scores)):
            if z > 0:
                fitness[i] += gains[i, j] / z**alpha
    return fitness


def reference_crossover(m2n2: M2N2, w: float, split: int) -> np.ndarray:
    """Of the members 1 and 2: SLERP(w) before the split point, SLERP(1 - w) after."""
    a, b = m2n2.archive[1:3].double().numpy()
    omega = math.acos(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))  # of the whole vectors
    weights = [w if i < split else 1 - w for i in range(len(a))]
    weights = [(math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)) for t in weights]
    return np.array([of_a * x + of_b * y for (of_a, of_b), x, y in zip(weights, a, b, strict=True)])


def reference_scores(m2n2: M2N2, params: Tensor, inputs: int, hidden: int) -> list[float]:
    """Softmax probability of the true class, or 1 if its logit is the highest, of an MLP written out."""
    w1, b1, w2, b2 = (x.double().numpy() for x in params.split([inputs * hidden, hidden, 10 * hidden, 10]))
    units = np.maximum(m2n2.train_images.double().numpy() @ w1.reshape(hidden, inputs).T + b1, 0)
    expected = []
    for row, label in zip(units @ w2.reshape(10, hidden).T + b2, m2n2.train_labels.tolist(), strict=True):
        if m2n2.score == "correct":
            expected.append(float(row.argmax() == label))
        else:
            exponentials = [math.exp(x / m2n2.temperature) for x in row]
            expected.append(exponentials[label] / sum(exponentials))
    return expected


def random_scores(rows: int, score: str, seed: int) -> Tensor:
    scores = torch.rand(rows, 40, generator=torch.Generator().manual_seed(seed))
    scores[:, :3] = 0  # examples that nobody covers
    return (scores > 0.6).float() if score == "correct" else scores


def twin(m2n2: M2N2) -> torch.Generator:
    """Draws what the M2N2 will draw."""
    generator = torch.Generator()
    generator.set_state(m2n2._generator.get_state())
    return generator


# --- Fitness, parents, crossover, mutation, scores, update: an iteration's order ---
@every_fitness
def test_fitness(score: str, alpha: float) -> None:
    """It sums to the covered examples where α is 1."""
    m2n2 = make_m2n2(score=score, alpha=alpha)
    for seed in range(5):
        all_scores(m2n2).copy_(random_scores(5, score, seed))
        for scores in (m2n2.scores, all_scores(m2n2)):
            found = m2n2._update_fitness(scores)[0]
            np.testing.assert_allclose(found, reference_fitness(scores.double().numpy(), alpha), rtol=1e-5)
            if alpha == 1:
                assert found.sum().item() == pytest.approx(scores.any(dim=0).sum().item(), rel=1e-5)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """At most the 99.99th percentile of chi-square, by the Wilson-Hilferty approximation."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = counts.sum() * probabilities[possible]
    statistic, free = ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1
    assert statistic < free * (1 - 2 / (9 * free) + 3.72 * math.sqrt(2 / (9 * free))) ** 3


@every_fitness
@pytest.mark.parametrize("attraction", [True, False])
def test_parents_are_drawn_by_fitness_and_attraction(score: str, alpha: float, attraction: bool) -> None:
    m2n2 = make_m2n2(score=score, alpha=alpha, use_attraction=attraction)
    m2n2.scores.copy_(random_scores(4, score, seed=3))
    m2n2.scores[3] = 0  # never the first parent, never attractive
    scores = m2n2.scores.double().numpy()
    fitness = reference_fitness(scores, alpha)
    counts = np.zeros((4, 4))
    for _ in range(6_000):
        counts[tuple(index.item() for index in m2n2._select_parents())] += 1
    chi_square(counts.sum(axis=1), fitness / fitness.sum())
    for first in range(3):
        gains = np.maximum(scores - scores[first], 0) if attraction else scores
        second = reference_fitness(scores, alpha, gains)
        chi_square(counts[first], second / second.sum())


def test_second_parent_is_the_first_where_nobody_does_better() -> None:
    m2n2 = make_m2n2()
    m2n2.scores.fill_(0.5)
    parents = [m2n2._select_parents() for _ in range(50)]
    assert all(first == second for first, second in parents)
    assert len({first.item() for first, _ in parents}) > 1


@pytest.mark.parametrize("ablation", ["none", "use_split_point", "use_crossover"])
@pytest.mark.parametrize("seed", range(5))
def test_crossover(seed: int, ablation: str) -> None:
    m2n2 = make_m2n2(seed=seed, **({} if ablation == "none" else {ablation: False}))
    m2n2.archive.copy_(torch.randn(m2n2.archive.shape, generator=torch.Generator().manual_seed(seed)))
    draws, params = twin(m2n2), m2n2.archive.shape[1]
    w = torch.rand(1, generator=draws).item()
    split = params if ablation == "use_split_point" else torch.randint(params, (1,), generator=draws).item()
    child = m2n2._crossover(torch.tensor([1]), torch.tensor([2]))
    if ablation == "use_crossover":
        assert torch.equal(child, m2n2.archive[1])
    else:
        np.testing.assert_allclose(child, reference_crossover(m2n2, w, split), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("sigma", "prior"), [(0.1, 0.0), (0.1, 0.2), (0.2, 0.2), (0.3, 0.2), (0.0, 0.2), (0.0, 0.0)])
def test_mutation(sigma: float, prior: float) -> None:
    """child + σ N(0, 1); with a prior child · √(1 - (σ / prior)²) + σ N(0, 1), where σ beyond the prior leaves none."""
    m2n2 = make_m2n2(prior_std=prior, mutation_std=sigma, final_mutation_std=sigma, use_mirroring=False)
    m2n2.evolve(1)  # which sets σ
    child = torch.linspace(-1, 1, m2n2.archive.shape[1])
    noise = torch.randn(len(child), generator=twin(m2n2)).double().numpy()
    kept = math.sqrt(max(0, 1 - (sigma / prior) ** 2)) if prior else 1
    expected = kept * child.double().numpy() + sigma * noise
    np.testing.assert_allclose(m2n2._mutate(child), expected, rtol=1e-5, atol=1e-6)


def test_mutation_follows_its_schedule() -> None:
    """Half a cosine over the first `evolve`, or over the schedule, and constant beyond its end."""
    wave = [0.1 + 0.1 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    for given, pieces, expected in ((0, (8, 2), [*wave, 0.1, 0.1]), (8, (3, 1), wave[:4])):
        m2n2, sigmas = make_m2n2(mutation_std=0.2, final_mutation_std=0.1, schedule=given), []
        for iterations in pieces:
            m2n2.evolve(iterations, 100, lambda m2n2, sigmas=sigmas: sigmas.append(m2n2._sigma.item()))
        assert m2n2.schedule == 8 and sigmas == pytest.approx(expected)


@pytest.mark.parametrize("mirroring", [True, False])
@pytest.mark.parametrize("prior", [0.0, 0.2])
def test_mirrored_mutation(prior: float, mirroring: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that lost is tried again with the opposite noise, once; one that won, or without mirroring, is not."""
    m2n2 = make_m2n2(archive_size=3, prior_std=prior, final_mutation_std=0.1, use_mirroring=mirroring)
    m2n2.evolve(1)  # which sets σ
    m2n2._retry.zero_()
    bases, crossover, tried_again, seen = [], m2n2._crossover, None, set()
    monkeypatch.setattr(m2n2, "_crossover", lambda a, b: bases.append(crossover(a, b)) or bases[-1])
    for _ in range(200):
        archive = m2n2.archive.clone()
        m2n2._step()
        lost, child = torch.equal(archive, m2n2.archive), child_of(m2n2)[0].clone()
        seen.add((tried_again is not None, lost))
        if tried_again is None:  # something new: near its own crossover
            base = bases[-1] * (math.sqrt(1 - (0.1 / prior) ** 2) if prior else 1)
            assert (child - base).std().item() == pytest.approx(0.1, rel=0.3)
            tried_again = 2 * base - child if lost and mirroring else None
        else:
            torch.testing.assert_close(child, tried_again, atol=1e-6, rtol=1e-5)
            tried_again = None
    assert seen == {(again, lost) for again in {False, mirroring} for lost in (False, True)}


@pytest.mark.parametrize("eval_batch_size", [0, 1, 7, 39, 41])
@every_score
def test_scores_are_those_of_the_model(score: str, eval_batch_size: int) -> None:
    m2n2 = make_m2n2(score=score, temperature=0.5, eval_batch_size=eval_batch_size)
    params = torch.randn(m2n2.archive.shape[1], generator=torch.Generator().manual_seed(0))
    m2n2._evaluate(params)
    child, scores = child_of(m2n2)
    expected = reference_scores(m2n2, params, 6, 5)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert torch.equal(child, params)
    m2n2.archive[2] = params  # measured in the same batches
    if score == "correct":
        assert m2n2._right()[2].float().tolist() == expected


def test_a_tie_for_the_highest_logit_is_wrong() -> None:
    """Or a model whose logits are all equal would be right everywhere."""
    m2n2 = make_m2n2(score="correct")
    m2n2._evaluate(torch.zeros_like(m2n2.archive[0]))
    assert not child_of(m2n2)[1].any()


@every_fitness
def test_archive_update(score: str, alpha: float) -> None:
    """Of the K + 1 the worst goes, of equals the first."""
    m2n2, gone = make_m2n2(score=score, alpha=alpha), set()
    for seed in range(40):
        m2n2._rows.normal_()
        all_scores(m2n2).copy_(random_scores(5, score, seed))
        expected = m2n2._rows.clone()
        fitness = reference_fitness(all_scores(m2n2).double().numpy(), alpha).tolist()
        worst = fitness.index(min(fitness))
        m2n2._update_archive()
        expected[worst] = expected[4].clone()
        assert torch.equal(m2n2._rows[:4], expected[:4])
        gone.add(worst)
    assert gone == set(range(5))  # the child's loss was seen too


@pytest.mark.parametrize("archive_size", [2, 4, 9, 20])
@pytest.mark.parametrize("examples", [40, 1_437])
def test_of_equals_the_first_member_goes(archive_size: int, examples: int) -> None:
    m2n2 = make_m2n2(examples=examples, archive_size=archive_size)
    m2n2._rows[:] = torch.arange(archive_size + 1.0)[:, None]
    all_scores(m2n2)[:] = torch.rand(examples)
    m2n2._update_archive()
    assert m2n2.archive[:, 0].tolist() == [archive_size, *range(1, archive_size)]


# --- The start ---
def test_the_random_start() -> None:
    m2n2 = make_m2n2(hidden=500, init_std=0.25, archive_size=3)
    assert sorted(m2n2.archive.std(dim=1).tolist()) == pytest.approx([0, 0.25, 0.25], rel=0.1)


def test_initial_models_take_the_place_of_random_ones() -> None:
    models = [MLP(6, 5, 10), MLP(6, 5, 10)]
    for model in models:
        model.output.bias.data.zero_()
    still = {"mutation_std": 0.0, "final_mutation_std": 0.0, "use_mirroring": False}
    m2n2 = make_m2n2(initial_models=(model for model in models), **still)
    found = {tuple(row.tolist()) for row in m2n2.archive if row.any()}
    assert found == {tuple(get_params(model).tolist()) for model in models}
    m2n2.evolve(50)
    assert m2n2.archive.any(dim=1).all() and len({tuple(row.tolist()) for row in m2n2.archive}) == 4
    assert not m2n2.archive[:, -10:].any()  # what both have as zero stays zero: merged, never mutated


# --- Runs ---
def test_same_seed_same_bits_in_one_or_in_pieces() -> None:
    one, two, pieces, other = make_m2n2(seed=5), make_m2n2(seed=5), make_m2n2(seed=5, schedule=100), make_m2n2(seed=6)
    for m2n2 in (one, two, other):
        m2n2.evolve(100, test_every=30)
    for iterations in (30, 1, 29, 30, 10):
        pieces.evolve(iterations, test_every=30)
    assert torch.equal(one.archive, two.archive) and one.history == two.history
    assert torch.equal(one.archive, pieces.archive) and not torch.equal(one.archive, other.archive)
    assert [row["iteration"] for row in one.history] == [30, 60, 90, 100]
    assert [row["iteration"] for row in pieces.history] == [30, 31, 60, 90, 100]  # a row at the end of each


def test_evolve_goes_on_where_it_stopped() -> None:
    """By a state, which is a copy, is no view of a larger buffer, and leaves another schedule as it is."""
    whole, stopped, resumed, longer = make_m2n2(), make_m2n2(), make_m2n2(seed=9), make_m2n2(schedule=500)
    whole.evolve(100, test_every=25)
    stopped.evolve(100, test_every=25, after_child=lambda m2n2: m2n2.iteration == 40)
    state = stopped.state_dict()
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    assert len(tensors) == 6 and all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    stopped.evolve(10)
    assert stopped.iteration == 50
    for m2n2 in (resumed, longer):
        m2n2.load_state_dict(state)
        assert m2n2.iteration == 40 and len(m2n2.history) == 1
        m2n2.evolve(60, test_every=25)
    assert torch.equal(whole.archive, resumed.archive) and torch.equal(whole.scores, resumed.scores)
    assert whole.history == resumed.history and (resumed.schedule, longer.schedule) == (100, 500)
    with pytest.raises(ValueError, match=r"\(4, 95\), accepted is \(3, 95\)"):
        make_m2n2(archive_size=3).load_state_dict(state)


def test_competition_beats_the_genetic_algorithm() -> None:
    """2,000 children on scikit-learn's digits: 86 to 87 % with competition and attraction, 65 to 67 without."""
    pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    train, train_labels, test, test_labels = digits()
    images, labels = torch.cat([train, test]), torch.cat([train_labels, test_labels])
    images = (images - images.mean(dim=0)) / images.std()
    settings = {"archive_size": 10, "score": "probability", "temperature": 0.67, "init_std": 0.01, "prior_std": 0.0}
    settings |= {"mutation_std": 0.03, "final_mutation_std": 0.0075, "use_mirroring": False}
    accuracy = {}
    for method, ablation in (("M2N2", {}), ("GA", GA)):
        m2n2 = M2N2(MLP(64, 16), images, labels, images, labels, seed=0, **settings | ablation)
        m2n2.evolve(2_000)
        accuracy[method] = m2n2.history[-1]["train_acc"]
    assert accuracy["M2N2"] > 0.8 and 0.4 < accuracy["GA"] < 0.72


# --- What is measured ---
def test_history_rows_class_accuracies_and_the_best_model() -> None:
    m2n2 = make_m2n2(score="correct")
    m2n2.test_labels = (m2n2.test_labels + 1) % 10  # test data steers nothing
    m2n2.evolve(50, test_every=50)
    (row,), best = m2n2.history, m2n2.best_model()
    accuracy = m2n2.scores.mean(dim=1)  # what 0/1 scores are
    assert torch.equal(get_params(best), m2n2.archive[accuracy.argmax()])
    assert row["train_acc"] == pytest.approx(accuracy.max().item())
    predicted = best(m2n2.test_images).argmax(dim=1)
    assert row["test_acc"] == pytest.approx((predicted == m2n2.test_labels).float().mean().item())
    assert row["best_fitness"] == pytest.approx(m2n2._update_fitness(m2n2.scores)[0].max().item())
    assert row["coverage"] == pytest.approx(m2n2.scores.any(dim=0).float().mean().item())
    right, pairs = m2n2.scores.bool().tolist(), [(a, b) for a in range(4) for b in range(a)]
    disagree = sum(x != y for a, b in pairs for x, y in zip(right[a], right[b], strict=True))
    assert row["diversity"] == pytest.approx(disagree / len(pairs) / 40) and disagree > 0
    found, labels = m2n2.class_accuracies(), m2n2.train_labels.tolist()
    for member in range(4):
        for label in range(found.shape[1]):
            of_class = [right[member][j] for j in range(40) if labels[j] == label]
            expected = sum(of_class) / len(of_class) if of_class else math.nan
            assert found[member, label].item() == pytest.approx(expected, nan_ok=True)


def test_a_class_without_training_examples_has_no_accuracy() -> None:
    images, labels = torch.randn(30, 6), torch.arange(30) % 4
    labels[labels == 2] = 1
    m2n2 = M2N2(MLP(6, 5), images, labels, images, labels + 1)  # the last class is in the test data alone
    m2n2.evolve(5)
    assert m2n2.class_accuracies().isnan().all(dim=0).tolist() == [False, False, True, False, True]


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
    assert min(shares) > 0 and len(set(shares)) > 1


def test_ensemble_is_the_mean_of_probabilities() -> None:
    m2n2 = make_m2n2(examples=500, temperature=4.0)
    m2n2.archive.normal_(generator=torch.Generator().manual_seed(0))

    def accuracy(temperature: float) -> float:
        logits = torch.stack([m2n2.logits(params, m2n2.test_images).T for params in m2n2.archive])
        predicted = (logits / temperature).softmax(dim=2).sum(dim=0).argmax(dim=1)
        return (predicted == m2n2.test_labels).float().mean().item()

    assert accuracy(4.0) != accuracy(1.0)  # the temperature matters here
    assert m2n2.test_accuracy(m2n2.archive) == pytest.approx(accuracy(4.0))


# --- Odd values ---
@every_score
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_overflow_never_enters(score: str, bad: float) -> None:
    """Neither empty slots nor a full archive."""
    m2n2 = make_m2n2(score=score)
    signs = torch.randn(m2n2.archive.shape[1], generator=torch.Generator().manual_seed(0)).sign()
    for full in (False, True):
        before = m2n2._rows[:-1].clone()
        assert m2n2.archive.any(dim=1).all() == full
        for child in (torch.full_like(signs, bad), bad * signs):
            m2n2._evaluate(child)
            m2n2._update_archive()
            assert torch.equal(m2n2._rows[:-1], before)
            assert m2n2._update_fitness(m2n2.scores)[0].isfinite().all()
        m2n2.evolve(30)


@every_score
def test_an_archive_that_stays_empty(score: str) -> None:
    """All overflow, the two at the start too: what is measured is 0, not NaN."""
    m2n2 = make_m2n2(score=score, init_std=1e30, mutation_std=1e30, final_mutation_std=1e30)
    m2n2.evolve(100)
    assert not m2n2.archive.any() and math.isfinite(m2n2.history[-1].pop("best_fitness"))
    assert m2n2.history == [dict.fromkeys(m2n2.history[-1], 0) | {"iteration": 100}]


@every_score
def test_odd_data(score: str) -> None:
    """Fewer examples than members; one class only; nobody ever right."""
    images, labels = torch.randn(40, 6), torch.zeros(40, dtype=torch.long)
    one_class = M2N2(MLP(6, 5), images, labels, images, labels, score=score)
    constant = make_m2n2(score=score, init_std=1e-12, mutation_std=0.0, final_mutation_std=0.0)
    constant.scores.zero_()
    for m2n2 in (make_m2n2(1, score=score), make_m2n2(3, score=score), one_class, constant):
        m2n2.evolve(30)
        assert m2n2.archive.isfinite().all()
    assert one_class.class_accuracies().shape == (4, 1)


# --- Interrupts, memory ---
class InterruptAt(TorchDispatchMode):
    """Ctrl-C after the n-th operation."""

    def __init__(self, operation: int) -> None:
        super().__init__()
        self.left = operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return func(*args, **kwargs or {})


def test_an_interrupt_leaves_no_mixed_row() -> None:
    """At whatever operation of a child it comes, each member's scores are its own, and evolution can go on."""
    m2n2, operation, done = make_m2n2(), 0, False
    while not done:
        try:
            with InterruptAt(operation):
                m2n2._step()
            done = True
        except KeyboardInterrupt:
            operation += 1
        for params, scores in zip(m2n2.archive.clone(), m2n2.scores.clone(), strict=True):
            m2n2._evaluate(params)
            torch.testing.assert_close(child_of(m2n2)[1] * params.any(), scores)
        assert all(isinstance(parameter, nn.Parameter) for parameter in m2n2.model.parameters())
    assert operation > 30
    m2n2.evolve(10)
    assert m2n2.iteration == 10


def test_memory_does_not_grow_with_the_iterations() -> None:
    m2n2 = make_m2n2()
    m2n2.evolve(200, test_every=10_000)
    tracemalloc.start()
    m2n2.evolve(1_000, test_every=10_000)
    assert tracemalloc.get_traced_memory()[0] < 50_000
    tracemalloc.stop()
