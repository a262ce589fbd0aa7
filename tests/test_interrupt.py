"""Ctrl-C and SIGTERM at every moment of a run: all is saved and the way on is printed; the second one ends at once."""

import contextlib
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RUN, SECOND, at_call, checkpoint, ctrl_c, same_end, small, spawn, wait_for_iteration

import m2n2_mnist as script
from m2n2_mnist import M2N2

GO_ON = "To go on, give no flag but "
OTHERS = "For the other runs, add "


def printed_flags(words: str, out: str) -> list[str]:
    """What the line with these words tells to add, if there is one."""
    lines = re.findall(rf"{words}(.+)$", out, re.M)
    assert len(lines) < 2
    return " ".join(lines).split()


def test_terminated_and_resumed(data_dir: Path, main: Callable) -> None:
    """SIGTERM to a real process, then the very flags that it printed."""
    flags = small(data_dir=data_dir, iterations=2_000, test_every=100, seed=3, runs=2)
    process = spawn(*flags)
    wait_for_iteration(process, 100)
    process.terminate()
    out, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    iteration = int(re.search(r"^Evolution interrupted at iteration (\d+)\.", out, re.M)[1])
    assert 100 <= iteration < 2_000 and checkpoint(RUN)["m2n2"]["iteration"] == iteration
    assert re.search(r"^Final Test Accuracy of the best model: \d+", out, re.M)
    assert {"best_model.pt", "evolution.png"} <= set(os.listdir(RUN)) and not SECOND.exists()

    assert printed_flags(GO_ON, out) == ["--resume", str(RUN)]
    code, again, error = main(*printed_flags(GO_ON, out))
    assert code == 0 and f"{2_000 - iteration:,} children in" in again and "Evolution finished." in again, error
    assert not SECOND.exists() and GO_ON not in again and OTHERS not in again
    assert printed_flags(OTHERS, out) == ["--seed", "4", "--runs", "1"]
    assert main(*flags, *printed_flags(OTHERS, out))[0] == 0
    main(*flags, "--output-dir=undisturbed")
    for folder in (RUN, SECOND):
        same_end(folder, "undisturbed" / folder.relative_to("runs"))
    assert len(os.listdir(RUN.parent)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once(data_dir: Path, number: int) -> None:
    """Here where the best model is written, which a pipe without a reader makes last for ever."""
    as_in_a_terminal = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # CI may ignore it
    process = spawn(*small(data_dir=data_dir, iterations=10**8), launcher=("-u",), **as_in_a_terminal)
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
@pytest.mark.parametrize(("name", "call", "saved"), [("_step", 33, 20), ("best_model", 1, 60)])
def test_in_an_interpreter_that_lives_on(name: str, call: int, saved: int, data_dir: Path, main: Callable) -> None:
    """A notebook's two interrupts, the second before the first is acted on: KeyboardInterrupt, not the kernel's end."""

    def twice() -> None:
        ctrl_c()
        ctrl_c()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_call(patch, M2N2, name, call, twice)
        main(*small(data_dir=data_dir))
    assert checkpoint(RUN)["m2n2"]["iteration"] == saved  # whole
    assert main(*small(data_dir=data_dir))[0] == 0  # nothing is left that ends it
    assert main(f"--resume={RUN}")[0] == 0
    same_end(RUN, SECOND)


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("end", ["finished", "interrupted", "error"])
def test_handlers_are_as_before(end: str, data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*_: object) -> None: ...

    before = {number: signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)}
    acts = {"finished": lambda: None, "interrupted": ctrl_c, "error": lambda: 1 / 0}
    at_call(monkeypatch, script, "report", 1, acts[end])
    with contextlib.suppress(ZeroDivisionError):
        main(*small(data_dir=data_dir, iterations=2))
    assert [signal.signal(number, handler) for number, handler in before.items()] == [mine, mine]


def test_ctrl_c_while_the_data_are_read(data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to save yet: Python's own KeyboardInterrupt."""
    at_call(monkeypatch, script.MNISTDataModule, "setup", 1, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        main(*small(data_dir=data_dir))
    assert os.listdir() == ["data"]


MOMENTS = {  # of three runs: where, at which call of it, the runs finished then, the iteration of one that is not
    "before the first row": (M2N2, "_step", 5, 0, 5),
    "last measurement": (M2N2, "_measure", 3, 1, 0),
    "last checkpoint": (script, "atomic_save", 5, 1, 0),
    "best model": (M2N2, "best_model", 1, 1, 0),
    "figure": (script, "plot_evolution", 1, 1, 0),
    "ensemble": (M2N2, "test_accuracy", 5, 1, 0),
    "next folder": (script, "new_folder", 2, 1, 1),  # a run that is begun makes a child
    "next log": (script, "CSVLogger", 2, 1, 1),
    "next archive": (M2N2, "_fill_archive", 2, 1, 1),
    "last run": (M2N2, "_step", 153, 2, 33),
    "very end": (M2N2, "best_model", 3, 3, 0),
}


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_ends_the_experiment(
    moment: str, data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that was begun is saved, the way on with it and with the others is printed, and no mean of unequal runs."""
    *place, finished, iteration = MOMENTS[moment]
    at_call(monkeypatch, *place, ctrl_c)
    code, out, error = main(*small(data_dir=data_dir, runs=3, seed=7))
    assert code == 130 and out.count("Evolution finished.") == finished and "Mean" not in out, error
    folders = sorted(RUN.parent.iterdir())
    begun = finished + (iteration > 0)
    assert len(folders) == out.count("Final Test Accuracy") == begun
    assert all((folder / "best_model.pt").exists() for folder in folders)
    assert printed_flags(GO_ON, out) == (["--resume", str(folders[-1])] if iteration else [])
    assert printed_flags(OTHERS, out) == (["--seed", str(7 + begun), "--runs", str(3 - begun)] if begun < 3 else [])
    if iteration:
        assert checkpoint(folders[-1])["m2n2"]["iteration"] == iteration
        assert main(*printed_flags(GO_ON, out))[0] == 0
        main(*small(data_dir=data_dir, seed=7 + finished))
        same_end(folders[-1], RUN.with_name(f"version_{begun}"))
