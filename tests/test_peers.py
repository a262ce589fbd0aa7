"""The methods M2N2 is held against: each keeps to its budget and learns."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import peers
import pytest
import torch
from conftest import all_scores
from peers import OURS, SETTINGS, Evaluator, LogLikelihoodGA, plot, run, search, train_by_adam
from torch import Tensor

from m2n2_mnist import M2N2, MLP

CHILDREN = 1_050  # whole generations, and past the 1,000 after which it is tested


def clouds(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten clouds around the ten axes."""
    labels = torch.arange(examples) % 10
    noise = torch.randn(examples, 10, generator=torch.Generator().manual_seed(seed))
    return 3 * torch.eye(10)[labels] + noise, labels


def on_clouds(kind: type[M2N2] = M2N2, examples: int = 400, **settings: object) -> M2N2:
    return kind(MLP(10, 16), *clouds(examples, 0), *clouds(examples, 1), seed=0, **settings)


@pytest.mark.parametrize("method", SETTINGS)
def test_keeps_to_its_budget_and_learns(method, monkeypatch):
    """On subsets, as far as RESULTS has it on subsets."""
    if method not in (*OURS, "Adam"):
        pytest.importorskip("evotorch", reason="tests/requirements-peers.txt is not installed")
    subset = {"subset_size": 300, "subset_every": 100} if method in (*OURS, "PGPE") else {}
    settings = SETTINGS[method]
    if method in (*OURS, "MAP-Elites"):
        settings = settings | {"mutation_std": 0.05}
    own = subset | settings if method in OURS else subset
    m2n2 = on_clouds(OURS.get(method, M2N2), **own)
    images, logits = 0, m2n2.logits

    def counted(params: Tensor, whole: Tensor) -> Tensor:
        nonlocal images
        images += len(whole) * (whole is not m2n2.test_images)
        return logits(params, whole)

    monkeypatch.setattr(m2n2, "logits", counted)
    monkeypatch.setattr("peers.MILESTONES", (20, 101))
    row = run(method, m2n2, seed=0, children=CHILDREN, **({} if method in OURS else settings))
    assert row["test"] > 30  # chance is 10
    point = row["rows"][0]
    if method != "Adam":
        assert list(row["milestones"]) == [20] and 0 < row["milestones"][20] <= row["seconds"]
        assert round(point["children"], -2) == 1_000
        if method != "MAP-Elites":  # on all images, whatever the subset
            # Whole generations; what is measured, and rescored for a subset, on top.
            cost = peers.passes(m2n2, CHILDREN, m2n2.archive_size if method in OURS else 1) * 400
            assert 0.9 * cost <= images <= 1.1 * cost + 400 * (10 + 5 * m2n2.archive_size)


def test_log_likelihood_decides_who_stays():
    m2n2 = on_clouds(LogLikelihoodGA, 3, archive_size=3, use_attraction=False)
    m2n2.scores.copy_(torch.tensor([[0.4, 0.4, 0.4], [0.9, 0.9, 0.001], [0.3, 0.3, 0.3]]))
    fitness, _ = m2n2._update_fitness(m2n2.scores)
    assert fitness.tolist() == pytest.approx([0.4, 0.00081 ** (1 / 3), 0.3])
    for child, gone in (([0.8, 0.8, 0.0], 3), ([0.5, 0.5, torch.nan], 3), ([0.2, 0.2, 0.2], 1)):
        before = all_scores(m2n2).clone()
        all_scores(m2n2)[-1].copy_(torch.tensor(child))
        m2n2._update_archive()
        changed = [row for row in range(3) if not torch.equal(m2n2.scores[row], before[row])]
        # The second has the highest sum of scores, but not of their logarithms.
        assert changed == [gone] * (gone < 3)


def test_pgpes_learning_rate_falls_to_its_end():
    """From 0 to 0 its centre stays where it is; to 0.1 it moves, more and more."""
    pytest.importorskip("evotorch", reason="tests/requirements-peers.txt is not installed")
    evaluator, start, steps = Evaluator(on_clouds(examples=40)), torch.zeros(346), {}
    for end in (0.0, 0.1):
        centres, evaluator.children = [start], 0
        rates = {"center_learning_rate": 0.0, "final_center_learning_rate": end}
        after = partial(lambda seen, centre: seen.append(centre.clone()), centres)
        search("PGPE", evaluator, start, 3_000, 0, True, after, **SETTINGS["PGPE"] | rates)
        steps[end] = [float((b - a).norm()) for a, b in pairwise(centres)]
    assert steps[0.0] == [0, 0, 0] and 0 < steps[0.1][0] < steps[0.1][1]


def test_adam_starts_from_its_seed():
    """Whatever model it is given, and whatever was drawn before."""
    found = []
    for _ in range(2):
        m2n2 = on_clouds(examples=40)
        torch.manual_seed(5)
        found.append(train_by_adam(m2n2, epochs=1))
    assert torch.equal(*found)


def test_the_objectives_are_those_of_the_training_examples():
    m2n2 = on_clouds(examples=50)
    evaluator, params, labels = Evaluator(m2n2), m2n2.archive[0], m2n2.train_labels
    logits = m2n2.logits(params, m2n2.train_images).T
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert evaluator.loss(params) == pytest.approx(loss)
    right = logits.argmax(dim=1) == labels
    odd, even = right[labels % 2 == 1].float().mean(), right[labels % 2 == 0].float().mean()
    assert evaluator.accuracy(params) == pytest.approx(right.float().mean().item())
    assert evaluator.by_cell(params)[1:] == [min(9, int(10 * odd)), min(9, int(10 * even))]
    assert evaluator.children == 3


def test_the_figure_has_a_line_and_a_label_for_each_method(tmp_path):
    """Means over the seeds, against passes; Adam's is a level."""
    for name, last in (("M2N2-42", 97), ("M2N2-43", 98), ("PGPE-42", 96), ("Adam-42", 98.5)):
        rows = ["children,passes,seconds,test_acc", f"2000,900,2.0,{last}"]
        if name != "Adam-42":
            rows.insert(1, "1000,450,1.0,85")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    axes = plot(tmp_path, str(tmp_path / "peers.png"))
    assert (tmp_path / "peers.png").exists()
    m2n2, pgpe, adam = axes.lines
    assert m2n2.get_xdata().tolist() == [0.45, 0.9] and m2n2.get_ydata().tolist() == [85, 97.5]
    assert pgpe.get_ydata().tolist() == [85, 96] and set(adam.get_ydata()) == {98.5}
    labels = [text.get_text() for text in axes.texts]
    expected = ["Adam, by gradient: 98.50 % (n = 1)", "M2N2: 97.50 % (n = 2)"]
    assert labels == [*expected, "PGPE: 96.00 % (n = 1)"]


def test_the_command_line(monkeypatch, capsys):
    """Settings by --set, M2N2's checked as the script's; a CSV for each run."""
    argv = ["peers.py", "--methods=GA", "--children=1000", "--set", "alpha=0.5"]
    monkeypatch.setattr("peers.mnist", lambda folder: [*clouds(400, 0), *clouds(400, 1)])
    monkeypatch.setattr("sys.argv", [*argv, "archive_size=3"])
    peers.main()
    out = capsys.readouterr().out
    assert "'archive_size': 3" in out and "'alpha': 0.5" in out and "'use_attraction': False" in out
    (row,) = Path("runs/peers/GA-42.csv").read_text().splitlines()[1:]
    assert row.startswith("1000,1000.0,") and float(row.split(",")[3]) > 20
    monkeypatch.setattr("sys.argv", [*argv, "archive_size=1"])
    with pytest.raises(ValueError, match="ARCHIVE_SIZE is 1"):
        peers.main()
