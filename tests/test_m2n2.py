"""The equations of M2N2 against plain NumPy loops, and what must hold of any run."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import all_models, all_scores, make_m2n2
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from m2n2_mnist import M2N2, MLP, get_params, set_params

STILL = {"mutation_std": 0.0, "final_mutation_std": 0.0}
SCORES = ("correct", "probability")
every_score = pytest.mark.parametrize("score", SCORES)
every_fitness = pytest.mark.parametrize(
    ("score", "alpha"), [(score, alpha) for score in SCORES for alpha in (0, 0.5, 1)]
)
# What a run has before and within a period of a subset of 15 of the 40 examples.
every_subset = pytest.mark.parametrize(
    "subset", [{}, {"subset_size": 15, "subset_every": 30}], ids=["all", "subset"]
)


# --- The reference: the paper's equations, a loop for every sum ---
def reference_fitness(
    scores: np.ndarray, alpha: float, gains: np.ndarray | None = None
) -> np.ndarray:
    """Σ_j s_ij / z_j^α; or, for the attraction, of gains max(s_ij - s_Aj, 0) in place of s_ij."""
    gains, fitness = scores if gains is None else gains, np.zeros(len(scores))
    for j in range(scores.shape[1]):
        z = sum(scores[:, j])
        for i in range(len(scores)):
            if z > 0:
                fitness[i] += gains[i, j] / z**alpha
    return fitness


def reference_crossover(m2n2: M2N2, w: float, split: int) -> list[float]:
    """Of the members 1 and 2: SLERP(w) before the split point, SLERP(1 - w) after."""
    a, b = m2n2.archive[1:3].double().numpy()
    omega = math.acos(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))  # of the whole vectors
    child = []
    for i in range(len(a)):
        t = w if i < split else 1 - w
        child.append(math.sin((1 - t) * omega) / math.sin(omega) * a[i])
        child[i] += math.sin(t * omega) / math.sin(omega) * b[i]
    return child


def reference_scores(m2n2: M2N2, params: Tensor, score: str) -> np.ndarray:
    """Softmax probability of the true class, or 1 if its logit is the highest; all examples."""
    w1, b1, w2, b2 = (x.double().numpy() for x in params.split([30, 5, 50, 10]))
    images, labels = m2n2.train_images.double().numpy(), m2n2.train_labels.tolist()
    units = np.maximum(images @ w1.reshape(5, 6).T + b1, 0)
    expected = []
    for row, label in zip(units @ w2.reshape(10, 5).T + b2, labels, strict=True):
        exponentials = [math.exp(x / m2n2.temperature) for x in row]
        s = exponentials[label] / sum(exponentials)
        expected.append(float(row.argmax() == label) if score == "correct" else s)
    return np.array(expected)


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
def test_fitness(score, alpha):
    m2n2 = make_m2n2(score=score, alpha=alpha)
    for seed in range(5):
        all_scores(m2n2).copy_(random_scores(5, score, seed))
        for scores in (m2n2.scores, all_scores(m2n2)):
            expected = reference_fitness(scores.double().numpy(), alpha)
            np.testing.assert_allclose(m2n2._update_fitness(scores)[0], expected, rtol=1e-5)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """At most the 99.99th percentile of chi-square, by the Wilson-Hilferty approximation."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = counts.sum() * probabilities[possible]
    statistic, free = ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1
    assert statistic < free * (1 - 2 / (9 * free) + 3.72 * math.sqrt(2 / (9 * free))) ** 3


@every_fitness
@pytest.mark.parametrize("attraction", [True, False])
def test_parents_are_drawn_by_fitness_and_attraction(score, alpha, attraction):
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


def test_second_parent_is_the_first_where_nobody_does_better():
    m2n2 = make_m2n2()
    m2n2.scores.fill_(0.5)
    parents = [m2n2._select_parents() for _ in range(50)]
    assert all(first == second for first, second in parents)
    assert len({first.item() for first, _ in parents}) > 1


@pytest.mark.parametrize("ablation", ["none", "use_split_point", "use_crossover"])
@pytest.mark.parametrize("seed", range(5))
def test_crossover(seed, ablation):
    m2n2 = make_m2n2(seed=seed, **({} if ablation == "none" else {ablation: False}))
    m2n2.archive.normal_(generator=torch.Generator().manual_seed(seed))
    draws, split = twin(m2n2), m2n2.archive.shape[1]
    w = torch.rand(1, generator=draws).item()
    if ablation == "none":
        split = torch.randint(split, (1,), generator=draws).item()
    child = m2n2._crossover(torch.tensor([1]), torch.tensor([2]))
    if ablation == "use_crossover":
        assert torch.equal(child, m2n2.archive[1])
    else:
        np.testing.assert_allclose(child, reference_crossover(m2n2, w, split), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prior", [0.0, 0.22])
@pytest.mark.parametrize(("given", "pieces"), [(0, (8, 2)), (8, (3, 1, 4, 2))])
def test_mutation(given, pieces, prior):
    """child + σ N(0, 1), or with a prior child · √(1 - (σ / prior)²) + σ N(0, 1).

    σ falls by half a cosine over the first `evolve`, or over the schedule, and is constant then.
    """
    settings = {"mutation_std": 0.2, "final_mutation_std": 0.1, "prior_std": prior}
    m2n2 = make_m2n2(**settings, schedule=given)
    child = torch.linspace(-1, 1, m2n2.archive.shape[1])

    def after_row(row: dict[str, float]) -> None:
        t = min(row["iteration"] - 1, 8)
        sigma = 0.1 + 0.1 * (1 + math.cos(math.pi * t / 8)) / 2
        noise = torch.randn(len(child), generator=twin(m2n2)).double().numpy()
        kept = math.sqrt(1 - (sigma / prior) ** 2) if prior else 1
        expected = kept * child.double().numpy() + sigma * noise
        np.testing.assert_allclose(m2n2._mutate(child), expected, rtol=1e-5, atol=1e-6)

    for iterations in pieces:
        m2n2.evolve(iterations, 1, after_row)
    assert m2n2.schedule == 8 and m2n2.iteration == 10


@pytest.mark.parametrize("eval_batch_size", [0, 1, 7, 39, 41])
@every_score
def test_scores_are_those_of_the_model(score, eval_batch_size):
    m2n2 = make_m2n2(score=score, temperature=0.5, eval_batch_size=eval_batch_size)
    params = torch.randn(m2n2.archive.shape[1], generator=torch.Generator().manual_seed(0))
    m2n2._evaluate(params)
    expected = reference_scores(m2n2, params, score)
    np.testing.assert_allclose(all_scores(m2n2)[-1], expected, atol=1e-5)
    assert torch.equal(all_models(m2n2)[-1], params)


@every_score
def test_a_tie_for_the_highest_logit_is_wrong(score):
    """Or a model whose logits are all equal would be right everywhere, for scores and accuracy."""
    tied = MLP(6, 5)
    set_params(tied, torch.cat([torch.zeros(85), torch.ones(10)]))
    m2n2 = make_m2n2(score=score, initial_models=[tied, tied], **STILL)
    m2n2.evolve(3)
    (row,) = m2n2.history
    assert row["train_acc"] == row["test_acc"] == row["coverage"] == row["diversity"] == 0
    assert torch.allclose(all_scores(m2n2)[-1], torch.tensor(0.1 * (score == "probability")))


@every_fitness
def test_archive_update(score, alpha):
    """Of the K + 1 the worst goes, of equals the first."""
    m2n2, gone = make_m2n2(score=score, alpha=alpha), set()
    for seed in range(40):
        all_models(m2n2).normal_()
        all_scores(m2n2).copy_(random_scores(5, score, seed))
        models, scores = all_models(m2n2).clone(), all_scores(m2n2).clone()
        fitness = reference_fitness(scores.double().numpy(), alpha).tolist()
        worst = fitness.index(min(fitness))
        m2n2._update_archive()
        for rows in (models, scores):
            rows[worst] = rows[4].clone()
        assert torch.equal(m2n2.archive, models[:4]) and torch.equal(m2n2.scores, scores[:4])
        gone.add(worst)
    assert gone == set(range(5))  # the child's loss was seen too


@pytest.mark.parametrize("archive_size", [2, 4, 9, 20])
@pytest.mark.parametrize("examples", [40, 1_437])
def test_of_equals_the_first_member_goes(archive_size, examples):
    m2n2 = make_m2n2(examples=examples, archive_size=archive_size)
    all_models(m2n2)[:] = torch.arange(archive_size + 1.0)[:, None]
    all_scores(m2n2)[:] = torch.rand(examples)
    m2n2._update_archive()
    assert m2n2.archive[:, 0].tolist() == [archive_size, *range(1, archive_size)]


# --- The start ---
def test_the_random_start():
    m2n2 = make_m2n2(hidden=500, init_std=0.25, archive_size=3)
    assert sorted(m2n2.archive.std(dim=1).tolist()) == pytest.approx([0, 0.25, 0.25], rel=0.1)


def test_initial_models_take_the_place_of_random_ones():
    models = [MLP(6, 5), MLP(6, 5)]
    for model in models:
        model.output.bias.data.zero_()
    m2n2 = make_m2n2(initial_models=(model for model in models), **STILL)
    found = {tuple(row.tolist()) for row in m2n2.archive if row.any()}
    assert found == {tuple(get_params(model).tolist()) for model in models}
    m2n2.evolve(50)
    assert len({tuple(row.tolist()) for row in m2n2.archive}) == 4
    # What both have as zero stays zero: merged, never mutated.
    assert m2n2.archive.any(dim=1).all() and not m2n2.archive[:, -10:].any()
    more = make_m2n2(archive_size=2, initial_models=[*models, MLP(6, 5)])
    assert more.archive.any(dim=1).all()


# --- Runs ---
@every_subset
def test_same_seed_same_bits_in_one_or_in_pieces(subset):
    one, two, other = (make_m2n2(seed=seed, **subset) for seed in (5, 5, 6))
    pieces = make_m2n2(seed=5, schedule=100, **subset)
    for m2n2 in (one, two, other):
        m2n2.evolve(100, test_every=30)
    for iterations in (30, 1, 29, 30, 10):
        pieces.evolve(iterations, test_every=30)
    assert torch.equal(one.archive, two.archive) and one.history == two.history
    assert torch.equal(one.archive, pieces.archive) and not torch.equal(one.archive, other.archive)
    assert [row["iteration"] for row in one.history] == [30, 60, 90, 100]
    assert [row["iteration"] for row in pieces.history] == [30, 31, 60, 90, 100]


@pytest.mark.parametrize("iteration", [25, 30, 50])
@every_subset
def test_evolve_goes_on_where_it_stopped(subset, iteration):
    """At the start or in the middle of a subset's period; another schedule stays as it is."""
    whole, resumed, states = make_m2n2(**subset), make_m2n2(seed=9, **subset), {}
    longer = make_m2n2(schedule=500, **subset)
    whole.evolve(100, 5, lambda row: states.update({row["iteration"]: whole.state_dict()}))
    state = states[iteration]
    for value in state.values():
        if isinstance(value, Tensor):  # is no view of a larger buffer
            assert value.untyped_storage().nbytes() == value.nbytes
    for m2n2 in (resumed, longer):
        m2n2.load_state_dict(state)
        assert m2n2.iteration == iteration and len(m2n2.history) == iteration // 5
        best = reference_scores(m2n2, m2n2.best, "correct").mean()
        assert best == pytest.approx(m2n2.history[-1]["train_acc"])
        m2n2.evolve(20, test_every=5)
        m2n2.evolve(80 - iteration, test_every=5)
    assert torch.equal(whole.archive, resumed.archive) and torch.equal(whole.scores, resumed.scores)
    assert torch.equal(whole.subset, resumed.subset) and torch.equal(whole.best, resumed.best)
    assert whole.history == resumed.history
    assert (resumed.schedule, longer.schedule) == (100, 500)


def test_the_state_of_another_evolution_is_refused():
    state = make_m2n2().state_dict()
    for settings in ({"archive_size": 3}, {"subset_size": 15}):
        with pytest.raises(RuntimeError, match="size of tensor"):
            make_m2n2(**settings).load_state_dict(state)


@every_subset
def test_evolve_fills_the_tensors_of_the_state_and_replaces_none(subset):
    """A CUDA graph goes on with those that it was captured with."""
    m2n2 = make_m2n2(prior_std=0.2, **subset)
    state = m2n2.state_dict()

    def tensors() -> dict[str, tuple[int, int]]:
        values = {name: value for name, value in vars(m2n2).items() if isinstance(value, Tensor)}
        return {name: (id(value), value.data_ptr()) for name, value in values.items()}

    before = tensors()
    m2n2.evolve(70, test_every=20)
    assert tensors() == before
    m2n2.load_state_dict(state)
    assert tensors() == before


# --- What is measured ---
@pytest.mark.parametrize("iterations", [1, 20])  # with an empty slot, and without
@every_subset
def test_a_row_of_history_and_the_best_model(subset, iterations):
    """Over all training examples; test data steers nothing."""
    m2n2 = make_m2n2(mutation_std=0.3, final_mutation_std=0.3, **subset)  # which keeps them apart
    with pytest.raises(ValueError, match="no best model before the first row"):
        m2n2.best_model()
    m2n2.test_labels = (m2n2.test_labels + 1) % 10
    m2n2.evolve(iterations)
    (row,), best = m2n2.history, m2n2.best_model()
    members = [params for params in m2n2.archive if params.any()]
    right = [reference_scores(m2n2, params, "correct").tolist() for params in members]
    assert (len(members) < 4) == (iterations == 1)
    accuracy = [np.mean(answers) for answers in right]
    assert torch.equal(m2n2.best, members[np.argmax(accuracy)])
    assert torch.equal(m2n2.best, get_params(best))
    assert row["train_acc"] == pytest.approx(max(accuracy))
    predicted = best(m2n2.test_images).argmax(dim=1)
    assert row["test_acc"] == pytest.approx((predicted == m2n2.test_labels).float().mean().item())
    scores = m2n2.scores.double().numpy()
    assert row["best_fitness"] == pytest.approx(reference_fitness(scores, 1).max())
    assert row["coverage"] == pytest.approx(np.any(right, axis=0).mean())
    pairs = [(a, b) for a in range(len(members)) for b in range(a)]
    disagree = sum(x != y for a, b in pairs for x, y in zip(right[a], right[b], strict=True))
    assert row["diversity"] == pytest.approx(disagree / len(pairs) / 40) and disagree > 0


def test_acceptance_is_that_of_the_children_since_the_last_row():
    m2n2, each, accepted = make_m2n2(schedule=80), make_m2n2(schedule=80), []
    archive = each.archive.clone()

    def after_row(row: dict[str, float]) -> None:
        accepted.append(not torch.equal(archive, each.archive))
        assert row["acceptance"] == accepted[-1]
        archive.copy_(each.archive)

    each.evolve(80, 1, after_row)
    m2n2.evolve(50, 20)
    m2n2.evolve(30, 20)  # from a row of half the distance on
    rows = [0, *(row["iteration"] for row in m2n2.history)]
    assert rows == [0, 20, 40, 50, 60, 80]
    shares = [sum(accepted[a:b]) / (b - a) for a, b in pairwise(rows)]
    assert [row["acceptance"] for row in m2n2.history] == pytest.approx(shares)
    assert 0 < sum(accepted) < 80 and len(set(shares)) > 1


def test_ensemble_is_the_mean_of_probabilities():
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
def test_overflow_never_enters(score, bad):
    """Neither empty slots nor a full archive."""
    m2n2 = make_m2n2(score=score)
    signs = torch.randn(m2n2.archive.shape[1], generator=torch.Generator().manual_seed(0)).sign()
    for full in (False, True):
        archive, scores = m2n2.archive.clone(), m2n2.scores.clone()
        assert archive.any(dim=1).all() == full
        for child in (torch.full_like(signs, bad), bad * signs):
            m2n2._evaluate(child)
            m2n2._update_archive()
            assert torch.equal(m2n2.archive, archive) and torch.equal(m2n2.scores, scores)
            assert m2n2._update_fitness(m2n2.scores)[0].isfinite().all()
        m2n2.evolve(30)


@every_score
def test_an_archive_that_stays_empty(score):
    """All overflow, the two at the start too: what is measured is 0, not NaN."""
    m2n2 = make_m2n2(score=score, init_std=1e30, mutation_std=1e30, final_mutation_std=1e30)
    m2n2.evolve(100)
    assert not m2n2.archive.any() and math.isfinite(m2n2.history[-1].pop("best_fitness"))
    assert m2n2.history == [dict.fromkeys(m2n2.history[-1], 0) | {"iteration": 100}]


WRONG = [("score", "accuracy"), ("archive_size", 1), ("prior_std", 0.05), ("prior_std", 0.1)]
WRONG += [("temperature", 0.0), ("temperature", math.nan), ("alpha", -0.1), ("alpha", math.nan)]


@pytest.mark.parametrize(("setting", "value"), WRONG)
def test_a_setting_that_would_go_wrong_in_silence(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} is '?{value}'?, accepted"):
        make_m2n2(**{setting: value})


# --- Interrupts ---
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


def test_evolution_goes_on_after_an_interrupt():
    """At whatever operation of a child. One member may be mixed then; it is whole in the state."""
    m2n2, operation, done = make_m2n2(), 0, False
    while not done:
        try:
            with InterruptAt(operation):
                m2n2._step()
            done = True
        except KeyboardInterrupt:
            operation += 1
        scores = m2n2.scores.clone()
        m2n2.load_state_dict(m2n2.state_dict())
        assert (scores != m2n2.scores).any(dim=1).sum() <= 1
        assert all(isinstance(parameter, nn.Parameter) for parameter in m2n2.model.parameters())
    assert operation > 30
    m2n2.evolve(10)
    assert m2n2.iteration == 10
