"""evolution.png: the curves with the runs' mean and deviation, the niches."""

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


def test_figure_shows_mean_and_deviation_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as all runs have: the last one may have been interrupted."""
    first = [a_row(1_000, coverage=0.7), a_row(2_000, coverage=0.8, test_acc=0.6, diversity=0.3), a_row(3_000)]
    second = [a_row(1_000, coverage=0.5), a_row(2_000, coverage=1.0, test_acc=0.4, diversity=0.2)]
    curves, niches, _ = drawn([first, second], NICHES, monkeypatch)
    assert all(line.get_xdata() == pytest.approx([1, 2]) for line in curves.lines)
    means = [(60, 90), (50, 50), (10, 25)]  # of coverage, test_acc, diversity
    assert [tuple(line.get_ydata()) for line in curves.lines] == [pytest.approx(mean) for mean in means]
    band = curves.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((60 - 200**0.5, 90 + 200**0.5))  # of 2 runs: divided by 1
    names = [text.get_text() for text in curves.get_legend().get_texts()]
    assert names == ["training coverage", "test accuracy", "training diversity"]
    assert "n = 2" in curves.get_title() and niches.get_title()


def test_figure_of_one_run_and_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted before its first row, a run has niches alone."""
    curves, *_ = drawn([[a_row(1_000)]], NICHES, monkeypatch)
    assert [line.get_ydata().tolist() for line in curves.lines] == [pytest.approx([y]) for y in (90, 50, 10)]
    assert curves.collections[0].get_paths()[0].vertices[:, 1] == pytest.approx(90)
    for histories in ([[]], [[a_row(1_000)], []]):
        assert all(len(line.get_ydata()) == 0 for line in drawn(histories, NICHES, monkeypatch)[0].lines)


@pytest.mark.parametrize("absent", [[], [4], range(10)])
def test_figure_shows_what_tells_the_members_apart(absent: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """White is their mean; the column of a digit that no training example shows is empty, the others as without it."""
    niches = NICHES.clone()
    niches[:, absent] = torch.nan
    (image,) = drawn([[a_row(1_000)]], niches, monkeypatch)[1].images
    expected = 100 * (niches - NICHES.mean(dim=0)).numpy()
    np.testing.assert_allclose(np.ma.filled(image.get_array(), np.nan), expected, atol=1e-4)
    largest = 0.1 if len(absent) == 10 else np.nanmax(np.abs(expected))
    assert image.get_clim() == pytest.approx((-largest, largest))
