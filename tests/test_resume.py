"""A killed run goes on to the same bits, a finished one can be extended; the rest is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    RUN,
    SECOND,
    at,
    checkpoint,
    one_line,
    rows,
    same_end,
    small,
    wait_for_iteration,
)

import m2n2_mnist as script
from m2n2_mnist import CHOICES, FOLDERS, M2N2, RANGES

pytestmark = pytest.mark.usefixtures("no_figure")


class Killed(BaseException):
    """Ends the script as SIGKILL does: nothing of it runs any more."""


def die() -> None:
    raise Killed


def kill(
    main: Callable, flags: list[str], owner: object = M2N2, name: str = "_step", **moment: object
) -> None:
    """A run that is killed at that moment, by default in its 34th child."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at(patch, owner, name, die, **({"iteration": 33} | moment))
        main(*flags)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed(kills: int, data_dir: Path, main: Callable, spawn: Callable) -> None:
    """By SIGKILL, some rows later again; the end is that of a run that was never disturbed."""
    flags = small(data_dir=data_dir, iterations=300 + 150 * kills, test_every=10)
    way_on, reached = flags, 0
    for _ in range(kills):
        process = spawn(*way_on)
        wait_for_iteration(process, reached + 50)
        process.kill()
        process.wait()
        way_on, reached = [f"--resume={RUN}"], checkpoint(RUN)["m2n2"]["iteration"]
    for path in RUN.glob("*.tmp"):  # what was being written
        path.unlink()
    code, _, error = main(*way_on)
    assert code == 0, error
    main(*flags)
    same_end(RUN, SECOND)


MOMENTS = {  # what is called then, after how many children, for which file; the checkpoint left
    "before the first child": ((M2N2, "evolve", 0, ""), 0),
    "in a child": ((M2N2, "_mutate", 33, ""), 20),
    "as a subset is chosen": ((M2N2, "_choose_subset", 25, ""), 20),
    "at a measurement": ((M2N2, "_measure", 40, ""), 20),
    "in metrics.csv": ((os, "replace", 40, "metrics.csv"), 20),
    "in the best model": ((os, "replace", 40, "best_model.pt"), 20),
    "in the checkpoint": ((os, "replace", 40, "checkpoint.pt"), 20),
    "at the end": ((script, "plot_evolution", 60, ""), 60),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_moment(moment: str, data_dir: Path, main: Callable) -> None:
    """The last row's checkpoint is all that it needs."""
    (owner, name, iteration, file), saved = MOMENTS[moment]
    kill(main, small(data_dir=data_dir), owner, name, iteration=iteration, file=file)
    assert checkpoint(RUN)["m2n2"]["iteration"] == saved
    for path in RUN.iterdir():
        if path.name not in ("checkpoint.pt", "m2n2_mnist.py"):
            path.unlink()
    code, _, error = main(f"--resume={RUN}")
    assert code == 0, error
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


@pytest.mark.parametrize("file", ["metrics.csv", "checkpoint.pt"])
def test_resumed_twice_at_once(
    file: str, data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process makes its whole run in the midst of a file of the first."""
    other = []

    def second() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 10**9)
            other.append(main(f"--resume={RUN}")[0])

    kill(main, small(data_dir=data_dir))
    with monkeypatch.context() as patch:
        at(patch, os, "replace", second, iteration=40, file=file)
        code, out, error = main(f"--resume={RUN}")
    assert [code, *other] == [0, 0] and "could not be written" not in out + error
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


def test_killed_in_the_second_of_several_runs(data_dir: Path, main: Callable) -> None:
    """Its folder alone goes on with it: that seed, that run, no other."""
    kill(main, small(data_dir=data_dir, runs=3, seed=7), seed=8)
    assert checkpoint(SECOND)["m2n2"]["iteration"] == 20
    code, out, error = main(f"--resume={SECOND}")
    assert code == 0 and "seed 8\n" in out and out.count("Evolution finished.") == 1, error
    assert "Mean Test Accuracy" not in out and len(os.listdir(RUN.parent)) == 2
    main(*small(data_dir=data_dir, seed=8))
    same_end(SECOND, RUN.with_name("version_2"))


def test_goes_on_as_it_was(data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RESUME in the file, beside another experiment's constants, in another folder."""
    kill(main, small(data_dir=data_dir.name))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    edits = {"RESUME": f"../{RUN}", "SEED": 1, "RUNS": 5, "ITERATIONS": 10, "ALPHA": 0.5}
    with monkeypatch.context() as patch:
        for name, value in (edits | {"HIDDEN_DIM": 9, "DATA_DIR": "none"}).items():
            patch.setattr(script, name, value)
        code, _, error = main()
    assert code == 0 and " 20/60 " in error and not os.listdir(), error
    monkeypatch.chdir("..")
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


def test_a_finished_run_is_extended(data_dir: Path, main: Callable, tmp_path: Path) -> None:
    """Flags may say how far, where the data are, and what is as it was."""
    main(*small(data_dir=data_dir, seed=5))
    before = checkpoint(RUN)["m2n2"]
    code, out, _ = main(f"--resume={RUN}")
    assert code == 0 and "Evolution finished." in out
    torch.testing.assert_close(checkpoint(RUN)["m2n2"], before, rtol=0, atol=0)
    moved = data_dir.rename(tmp_path / "moved")
    flags = ["--iterations=100", f"--data-dir={moved}"]
    flags += ["--hidden-dim=8", "--alpha=1", "--seed=5", "--runs=1", "--deskew=false"]
    code, out, error = main(f"--resume={RUN}", *flags)
    assert code == 0 and " 60/100 " in error, error
    assert [int(row["iteration"]) for row in rows(RUN)] == [20, 40, 60, 80, 100]
    constants = json.loads((RUN / "constants.json").read_text())
    assert constants["ITERATIONS"] == 100 and constants["DATA_DIR"] == str(moved)
    assert os.listdir(RUN.parent) == ["version_0"]
    renamed = RUN.rename("renamed")
    code, out, error = main(f"--resume={renamed}")  # with what it was given last
    assert code == 0 and len(rows(renamed)) == 5 and not RUN.exists(), error


# --- What cannot go on ---
CHANGES = {"seed": 1, "runs": 2, "iterations": 59, "test_every": 10, "accelerator": "cuda"}
CHANGES |= {"dataset": "KMNIST", "deskew": True, "crop_size": 20, "image_size": 14, "hidden_dim": 9}
CHANGES |= {"archive_size": 6, "subset_size": 0, "subset_every": 9, "score": "correct"}
CHANGES |= {"temperature": 2.0, "alpha": 0.5, "init_std": 0.5, "mutation_std": 0.1}
CHANGES |= {"final_mutation_std": 0.1, "prior_std": 0.5, "use_crossover": False}
CHANGES |= {"use_split_point": False, "use_attraction": False}


def test_a_flag_that_differs_is_refused(data_dir: Path, main: Callable) -> None:
    """By one line that names it and both values; the folder stays as it is."""
    main(*small(data_dir=data_dir))
    before, constants = contents(Path("runs")), checkpoint(RUN)["constants"]
    assert {name.upper() for name in CHANGES} == {*RANGES, *CHOICES}
    assert constants.keys() == {*RANGES, *CHOICES, *FOLDERS}
    for name, value in CHANGES.items():
        code, out, error = main(f"--resume={RUN}", f"--{name.replace('_', '-')}={value}")
        words = f"Error: {name.upper()} is {value!r}, but {constants[name.upper()]!r} in the run"
        assert code == 1 and not out and one_line(error, words, "RESUME"), error
    assert contents(Path("runs")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_run_made_on_cuda_cannot_go_on_without(data_dir: Path, main: Callable) -> None:
    """One answer, once, and what can be done."""
    main(*small(data_dir=data_dir))
    state = checkpoint(RUN)
    state["constants"]["ACCELERATOR"] = "cuda"
    torch.save(state, RUN / "checkpoint.pt")
    before = contents(RUN)
    code, out, error = main(f"--resume={RUN}")
    assert code == 1 and not out and one_line(error, "Error: ", "cannot go on", "best model")
    code, out, error = main(f"--resume={RUN}", "--accelerator=cpu")
    assert code == 1 and not out and one_line(error, "but 'cuda' in the run")
    assert contents(RUN) == before


def with_part(part: str, **changes: object) -> Callable[[bytes, dict], dict]:
    """A checkpoint with other constants or another state; None takes one away."""

    def made(whole: bytes, state: dict) -> dict:
        values = (state[part] | changes).items()
        return state | {part: {name: value for name, value in values if value is not None}}

    return made


NO_WHOLE, OTHER = "checkpoint.pt is no whole checkpoint of this script", "is of another model"
BAD = {  # what a checkpoint is made to, and what is said then
    "absent": (lambda whole, state: None, NO_WHOLE),
    "empty": (lambda whole, state: b"", NO_WHOLE),
    "truncated": (lambda whole, state: whole[:-1_000], NO_WHOLE),
    # A pickle that makes a folder.
    "code": (lambda whole, state: b"cos\nmkdir\n(S'hacked'\ntR.", NO_WHOLE),
    "a list": (lambda whole, state: [1], NO_WHOLE),
    "without a state": (lambda whole, state: {"constants": state["constants"]}, NO_WHOLE),
    "without a constant": (with_part("constants", DESKEW=None), NO_WHOLE),
    "with a bad value": (with_part("constants", ALPHA=-1), NO_WHOLE),
    "without its archive": (with_part("m2n2", archive=None), OTHER),
    "with another archive": (with_part("m2n2", archive=torch.zeros(5, 3)), OTHER),
    "with another subset": (with_part("m2n2", subset=torch.arange(3)), OTHER),
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_checkpoint(how: str, data_dir: Path, main: Callable) -> None:
    """One line, and the folder stays as it is."""
    main(*small(data_dir=data_dir))
    path, (change, words) = RUN / "checkpoint.pt", BAD[how]
    content = change(path.read_bytes(), checkpoint(RUN))
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    before = contents(RUN)
    code, _, error = main(f"--resume={RUN}")
    assert code == 1 and one_line(error, f"Error: {RUN}", words, "RESUME"), error
    assert contents(RUN) == before and not os.path.exists("hacked")
