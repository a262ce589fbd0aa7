"""Ctrl-C and SIGTERM at every moment of a run: all is saved and the way on is printed; the second one ends at once."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import RUN, SECOND, at_call, at_iteration, checkpoint, ctrl_c, same_end, small, spawn, wait_for_iteration

import m2n2_mnist as script
from m2n2_mnist import M2N2

GO_ON = "To go on, add nothing but "
OTHERS = "For the other runs, add "


def printed_flags(words: str, out: str) -> list[str]:
    """What the one line with these words tells to add."""
    (flags,) = re.findall(rf"{words}(.+)$", out, re.M)
    return flags.split()


def test_terminated_and_resumed(data_dir: Path, main: Callable) -> None:
    """SIGTERM to a real process, then the very flags that it printed."""
    flags = small(data_dir=data_dir, iterations=2_000, test_every=100, seed=3, runs=2)
    process = spawn(*flags)
    wait_for_iteration(process, 100)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    iteration = int(re.search(r"^Evolution interrupted at iteration (\d+)\.", out, re.M)[1])
    assert 100 <= iteration < 2_000 and checkpoint(RUN)["m2n2"]["iteration"] == iteration
    assert "\nFor the other runs, add --seed 4 --runs 1\n" in out and not SECOND.exists()
    assert re.search(r"^Final Test Accuracy of the best model: \d+", out, re.M)
    assert {"best_model.pt", "evolution.png"} <= set(os.listdir(RUN))

    assert printed_flags(GO_ON, out) == ["--resume", str(RUN)]
    code, again, error = main(*printed_flags(GO_ON, out))
    assert code == 0 and f"{2_000 - iteration:,} children in" in again and "Evolution finished." in again, error
    assert not SECOND.exists() and GO_ON not in again and OTHERS not in again
    assert main(*flags, *printed_flags(OTHERS, out))[0] == 0
    main(*flags, "--output-dir=undisturbed")
    for folder in (RUN, SECOND):
        same_end(folder, "undisturbed" / folder.relative_to("runs"))
    assert len(os.listdir(RUN.parent)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once(data_dir: Path, number: int) -> None:
    """Here where the best model is written, which a pipe without a reader makes last for ever."""
    process = spawn(*small(data_dir=data_dir, iterations=10**8), launcher=("-u",))
    wait_for_iteration(process, 20)
    os.mkfifo(RUN / "best_model.tmp")
    process.send_signal(number)
    while "children in" not in (line := process.stdout.readline()):  # after which nothing but saving is left
        assert line, process.communicate()
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == -number and "Final Test Accuracy" not in out, error
    assert checkpoint(RUN)["m2n2"]["iteration"] >= 20 and not (RUN / "best_model.pt").exists()


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("moment", ["evolution", "best model"])
def test_in_an_interpreter_that_lives_on(
    moment: str, data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook's two interrupts, the second before the first is acted on: KeyboardInterrupt, not the kernel's end."""

    def twice() -> None:
        ctrl_c()
        ctrl_c()

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_iteration(patch, 33, twice) if moment == "evolution" else at_call(patch, M2N2, "best_model", 1, twice)
        with pytest.raises(KeyboardInterrupt):
            main(*small(data_dir=data_dir))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert checkpoint(RUN)["m2n2"]["iteration"] == (20 if moment == "evolution" else 60)  # whole
    assert main(*small(data_dir=data_dir))[0] == 0  # nothing is left that ends it
    assert main(f"--resume={RUN}")[0] == 0
    same_end(RUN, SECOND)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_handlers_are_as_before_after_an_error(data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*_: object) -> None: ...

    before = {number: signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(script, "report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(*small(data_dir=data_dir, iterations=2))
    assert [signal.signal(number, handler) for number, handler in before.items()] == [mine, mine]


def test_ctrl_c_before_the_first_row(data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files but metrics.csv are there, and what was printed goes on with the run."""
    with monkeypatch.context() as patch:
        at_iteration(patch, 5, ctrl_c)
        code, out, error = main(*small(data_dir=data_dir))
    assert code == 130 and "Evolution interrupted at iteration 5. To go on" in out, error
    assert {"best_model.pt", "checkpoint.pt", "evolution.png", "hparams.yaml"} <= set(os.listdir(RUN))
    assert OTHERS not in out
    code, _, error = main(*printed_flags(GO_ON, out))
    assert code == 0, error
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


def test_ctrl_c_while_the_data_are_read(data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to save yet: Python's own KeyboardInterrupt."""
    at_call(monkeypatch, script.MNISTDataModule, "setup", 1, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        main(*small(data_dir=data_dir))
    assert os.listdir() == ["data"]


MOMENTS = {  # of the first of three runs: where, and at which call, in it
    "last measurement": (M2N2, "_measure", 3),
    "last checkpoint": (script, "atomic_save", 5),
    "best model": (M2N2, "best_model", 1),
    "figure": (script, "plot_evolution", 1),
    "ensemble": (M2N2, "test_accuracy", 5),
}


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_the_end_of_a_run_ends_the_experiment(
    moment: str, data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That run is whole; the others are those of the printed flags."""
    at_call(monkeypatch, *MOMENTS[moment], ctrl_c)
    flags = small(data_dir=data_dir, runs=3, seed=7)
    code, out, error = main(*flags)
    assert code == 130 and out.count("Evolution finished.") == out.count("Final Test Accuracy") == 1, error
    assert os.listdir(RUN.parent) == ["version_0"] and (RUN / "best_model.pt").exists()
    assert GO_ON not in out and "Mean" not in out
    assert printed_flags(OTHERS, out) == ["--seed", "8", "--runs", "2"]
    if moment == "figure":  # once is enough
        code, out, error = main(*flags, *printed_flags(OTHERS, out))
        assert code == 0 and out.count("Evolution finished.") == 2, error
        seeds = [yaml.safe_load(path.read_text())["SEED"] for path in sorted(RUN.parent.rglob("hparams.yaml"))]
        assert seeds == [7, 8, 9]


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("name", ["new_folder", "CSVLogger", "M2N2"])
def test_ctrl_c_while_the_next_run_is_prepared(
    name: str, data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes a child, and none of the runs is lost."""
    at_call(monkeypatch, script, name, 2, ctrl_c) if name != "M2N2" else at_call(
        monkeypatch, M2N2, "_fill_archive", 2, ctrl_c
    )
    code, out, error = main(*small(data_dir=data_dir, runs=3, seed=7))
    assert code == 130 and out.count("Evolution finished.") == 1, error
    assert "Mean" not in out and not RUN.with_name("version_2").exists()
    assert checkpoint(SECOND)["m2n2"]["iteration"] == 1
    assert printed_flags(GO_ON, out) == ["--resume", str(SECOND)]
    assert printed_flags(OTHERS, out) == ["--seed", "9", "--runs", "1"]


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("end", [False, True])
def test_ctrl_c_in_the_last_run(end: bool, data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of runs of which one was not finished would be none; at the very end it is Ctrl-C's exit code too."""
    at_call(monkeypatch, M2N2, "best_model", 2, ctrl_c) if end else at_iteration(monkeypatch, 33, ctrl_c, run=2)
    code, out, error = main(*small(data_dir=data_dir, runs=2))
    assert code == 130 and "Mean" not in out and OTHERS not in out, error
    assert out.count("Evolution finished.") == 1 + end
    assert end or printed_flags(GO_ON, out) == ["--resume", str(SECOND)]
