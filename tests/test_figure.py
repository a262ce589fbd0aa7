"""evolution.png: one panel of errors and diversity, as mean and deviation of the runs."""

import warnings
from pathlib import Path

import matplotlib.figure
import pytest

from m2n2_mnist import plot_evolution


def a_row(iteration: int, **values: float) -> dict[str, float]:
    row = {"test_acc": 0.5, "train_acc": 0.75, "coverage": 0.875, "diversity": 0.03}
    return {"iteration": iteration} | row | values


def drawn(histories: list[list[dict]], monkeypatch: pytest.MonkeyPatch) -> matplotlib.axes.Axes:
    """The one panel of the figure that is saved."""
    figures, savefig = [], matplotlib.figure.Figure.savefig

    def watched(figure: matplotlib.figure.Figure, *arguments: object, **named: object) -> None:
        figures.append(figure)
        savefig(figure, *arguments, **named)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", watched)
    plot_evolution(histories, Path("evolution.png"))
    assert Path("evolution.png").read_bytes().startswith(b"\x89PNG")
    ((axes,),) = (figure.axes for figure in figures)
    return axes


def test_mean_and_deviation_of_the_runs(monkeypatch):
    """The deviation is that of a sample, divided by 2 - 1."""
    first = [a_row(1_000, test_acc=0.7), a_row(2_000, coverage=0.8, diversity=0.05)]
    second = [a_row(1_000, test_acc=0.5), a_row(2_000, train_acc=0.65)]
    axes = drawn([first, second], monkeypatch)
    assert all(line.get_xdata() == pytest.approx([1_000, 2_000]) for line in axes.lines)
    means = {
        "test error of the best": (40, 50),
        "training error of the best": (25, 30),
        "training examples that no member knows": (12.5, 16.25),
        "diversity": (3, 4),
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(means)
    for line, expected in zip(axes.lines, means.values(), strict=True):
        assert line.get_ydata() == pytest.approx(expected)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((40 - 200**0.5, 40 + 200**0.5))
    assert axes.get_yscale() == "log" and "%" in axes.get_ylabel() and axes.get_xlabel()


def test_a_single_run_has_no_deviation(monkeypatch):
    axes = drawn([[a_row(1_000)]], monkeypatch)
    assert axes.collections[0].get_paths()[0].vertices[:, 1] == pytest.approx(50)


def test_what_is_zero_cannot_be_shown_but_does_no_harm(monkeypatch):
    """Where every example is known, and where the deviation is larger than the mean."""
    first = [a_row(1_000, test_acc=1.0, coverage=1.0, diversity=0.0), a_row(2_000, coverage=1.0)]
    second = [a_row(1_000, test_acc=0.9, coverage=1.0, diversity=0.0), a_row(2_000, coverage=1.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn([first, second], monkeypatch)
