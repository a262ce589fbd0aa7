"""evolution.png: the curves with the runs' mean and deviation, the niches, and a file that is whole or not there."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import m2n2_mnist as script

NICHES = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))


def a_row(iteration: int, **values: float) -> dict:
    return {"iteration": iteration, "coverage": 0.9, "test_acc": 0.5, "diversity": 0.1} | values


def drawn(histories: list[list[dict]], niches: Tensor, monkeypatch: pytest.MonkeyPatch) -> list:
    """The axes of the figure that is saved: the curves, the niches, the scale."""
    saved = []
    monkeypatch.setattr(script, "atomic_save", lambda save, path: saved.append(save.func.__self__))
    script.plot_evolution(histories, niches, Path("evolution.png"))
    (figure,) = saved
    return figure.axes


def test_figure_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(script.UserError, match=r"evolution\.png could not be written"):
        script.plot_evolution([[a_row(20)]], NICHES, tmp_path / "absent" / "evolution.png")
    script.plot_evolution([[a_row(20)], [a_row(20)]], NICHES, tmp_path / "evolution.png")
    assert os.listdir(tmp_path) == ["evolution.png"]
    assert (tmp_path / "evolution.png").read_bytes().startswith(b"\x89PNG")


def test_figure_shows_mean_and_deviation_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as all runs have: the last one may have been interrupted."""
    first = [a_row(1_000, coverage=0.7), a_row(2_000, coverage=0.8, test_acc=0.6, diversity=0.3), a_row(3_000)]
    second = [a_row(1_000, coverage=0.5), a_row(2_000, coverage=1.0, test_acc=0.4, diversity=0.2)]
    curves, niches, *_ = drawn([first, second], NICHES, monkeypatch)
    assert all(line.get_xdata() == pytest.approx([1, 2]) for line in curves.lines)
    means = [(60, 90), (50, 50), (10, 25)]  # of coverage, test_acc, diversity
    assert [tuple(line.get_ydata()) for line in curves.lines] == [pytest.approx(mean) for mean in means]
    band = curves.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((60 - 200**0.5, 90 + 200**0.5))  # of 2 runs: divided by 1
    names = [text.get_text() for text in curves.get_legend().get_texts()]
    for name, part in zip(names, ("coverage", "test", "diversity"), strict=True):
        assert part in name
    assert "n = 2" in curves.get_title() and niches.get_title()


def test_figure_of_one_run_and_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted before its first row, a run has niches alone."""
    curves, _, *_ = drawn([[a_row(1_000)]], NICHES, monkeypatch)
    assert [line.get_ydata().tolist() for line in curves.lines] == [pytest.approx([y]) for y in (90, 50, 10)]
    assert curves.collections[0].get_paths()[0].vertices[:, 1] == pytest.approx(90)
    for histories in ([[]], [[a_row(1_000)], []]):
        assert all(len(line.get_ydata()) == 0 for line in drawn(histories, NICHES, monkeypatch)[0].lines)


def test_figure_shows_what_tells_the_members_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    _, axes, *_ = drawn([[a_row(1_000)]], NICHES, monkeypatch)
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), 100 * (NICHES - NICHES.mean(dim=0)), atol=1e-4)
    low, high = image.get_clim()
    assert low == -high and high == pytest.approx(np.abs(image.get_array()).max())  # white is the mean
    _, axes, *_ = drawn([[a_row(1_000)]], torch.full((3, 10), 0.5), monkeypatch)  # members all alike
    assert axes.images[0].get_clim()[1] > 0


def test_a_digit_that_no_training_example_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its column is empty, the others and the scale are as without it."""
    niches = NICHES.clone()
    niches[:, 4] = torch.nan
    (image,) = drawn([[a_row(1_000)]], niches, monkeypatch)[1].images
    others = [digit for digit in range(10) if digit != 4]
    shown = np.ma.filled(image.get_array(), np.nan)
    assert np.isnan(shown[:, 4]).all()
    np.testing.assert_allclose(shown[:, others], 100 * (NICHES - NICHES.mean(dim=0))[:, others], atol=1e-4)
    assert image.get_clim()[1] == pytest.approx(np.abs(shown[:, others]).max())
    _, axes, *_ = drawn([[a_row(1_000)]], torch.full((3, 10), torch.nan), monkeypatch)  # no example at all
    assert axes.images[0].get_clim()[1] > 0
