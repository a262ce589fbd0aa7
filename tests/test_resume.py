"""A run that was killed or interrupted goes on to the same bits, a finished one is extended."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    RUN,
    SECOND,
    at,
    checkpoint,
    flag_of,
    one_line,
    rows,
    same_end,
    small,
    wait_for_iteration,
)

import m2n2_mnist as script
from m2n2_mnist import ACCEPTED, M2N2

pytestmark = pytest.mark.usefixtures("no_figure")

MOMENTS = {  # what is called then, after how many children, for which file; the checkpoint left
    "before the first child": (M2N2, "evolve", 0, "", 0),
    "in a child": (M2N2, "_mutate", 33, "", 20),
    "as a subset is chosen": (M2N2, "_choose_subset", 25, "", 20),
    "at a measurement": (M2N2, "_measure", 40, "", 20),
    "in metrics.csv": (os, "replace", 40, "metrics.csv", 20),
    "in the best model": (os, "replace", 40, "best_model.pt", 40),
    "in the checkpoint": (os, "replace", 40, "checkpoint.pt", 20),
    "at the last measurement": (M2N2, "test_accuracy", 60, "", 40),
}
AT_THE_END = {"at the end": (script, "plot_evolution", 60, "", 60)}


class Killed(BaseException):
    """Ends the script as SIGKILL does: nothing of it runs any more."""


def die() -> None:
    raise Killed


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def kill(main: Callable, flags: list[str], moment: tuple = MOMENTS["in a child"]) -> None:
    owner, name, iteration, file, _ = moment
    with pytest.raises(Killed), at(owner, name, die, iteration, file=file):
        main(*flags)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- What ends a run ---
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed(kills, data_dir, main, spawn):
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


@pytest.mark.parametrize("moment", MOMENTS | AT_THE_END)
def test_killed_at_a_moment(moment, data_dir, main):
    """The last row's checkpoint is all that it needs."""
    moment = (MOMENTS | AT_THE_END)[moment]
    kill(main, small(data_dir=data_dir), moment)
    assert checkpoint(RUN)["m2n2"]["iteration"] == moment[-1]
    for path in RUN.iterdir():
        if path.name not in ("checkpoint.pt", "m2n2_mnist.py"):
            path.unlink()
    code, _, error = main(f"--resume={RUN}")
    assert code == 0, error
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c(moment, data_dir, main):
    """In the second of three runs, which alone goes on; the flags that it prints do."""
    owner, name, iteration, file, saved = MOMENTS[moment]
    with at(owner, name, ctrl_c, iteration, seed=8, file=file):
        code, out, error = main(*small(data_dir=data_dir, runs=3, seed=7))
    assert code == 130 and out.count("Evolution finished.") == 1 and "Mean" not in out, error
    (flags,) = re.findall(r"^Interrupted\. To go on .*, give no flag but (.+)$", out, re.M)
    assert out.endswith(f"{flags}\n") and "Traceback" not in error
    assert checkpoint(SECOND)["m2n2"]["iteration"] == saved
    assert not list(SECOND.glob("*.tmp"))
    code, out, error = main(*flags.split())
    assert code == 0 and f" {saved}/60 " in error.split("\r")[1], error  # where the bar starts
    assert "seed 8\n" in out and out.count("Evolution finished.") == 1 and "Mean" not in out
    main(*small(data_dir=data_dir, seed=8))
    same_end(SECOND, RUN.with_name("version_2"))


def test_a_launcher_that_ignores_ctrl_c_is_obeyed(data_dir, spawn):
    """As nohup's or a shell's background process; SIGTERM then ends it at once, files whole."""
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    process = spawn(*small(data_dir=data_dir, iterations=10**8), **ignored)
    wait_for_iteration(process, 20)
    process.send_signal(signal.SIGINT)
    wait_for_iteration(process, checkpoint(RUN)["m2n2"]["iteration"] + 40)
    process.terminate()
    out, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and "Interrupted" not in out + error
    assert checkpoint(RUN)["m2n2"]["iteration"] % 20 == 0 and (RUN / "best_model.pt").exists()


# --- How a run goes on ---
@pytest.mark.parametrize("file", ["metrics.csv", "checkpoint.pt"])
def test_resumed_twice_at_once(file, data_dir, main, monkeypatch):
    """The second process makes its whole run in the midst of a file of the first."""
    other = []

    def second() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 10**9)
            other.append(main(f"--resume={RUN}")[0])

    kill(main, small(data_dir=data_dir))
    with at(os, "replace", second, iteration=40, file=file):
        code, out, error = main(f"--resume={RUN}")
    assert [code, *other] == [0, 0] and "could not be written" not in out + error
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


def test_goes_on_as_it_was(data_dir, main, monkeypatch):
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


def test_a_finished_run_is_extended(data_dir, main, tmp_path):
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
def another(name: str, value: object) -> object:
    """A value that the constant may have, below this one if it can be."""
    kind, *accepted = ACCEPTED[name]
    if kind in (bool, str):
        return next(choice for choice in accepted if choice != value)
    low, _ = accepted
    return low if low < value else low + 1


def test_a_flag_that_differs_is_refused(data_dir, main):
    """By one line that names it and both values; the folder stays as it is."""
    main(*small(data_dir=data_dir))
    before, constants = contents(Path("runs")), checkpoint(RUN)["constants"]
    assert constants.keys() == ACCEPTED.keys()
    for name in ACCEPTED.keys() - {"RESUME", "OUTPUT_DIR", "DATA_DIR"}:
        value = another(name, constants[name])
        code, out, error = main(f"--resume={RUN}", f"{flag_of(name)}={value}")
        words = f"Error: {name} is {value!r}, but {constants[name]!r} in the run"
        assert code == 1 and not out and one_line(error, words, "RESUME"), error
    assert contents(Path("runs")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_run_made_on_cuda_cannot_go_on_without(data_dir, main):
    main(*small(data_dir=data_dir))
    state = checkpoint(RUN)
    state["constants"]["ACCELERATOR"] = "cuda"
    torch.save(state, RUN / "checkpoint.pt")
    before = contents(RUN)
    code, out, error = main(f"--resume={RUN}")
    says = ("Error: ACCELERATOR is 'cuda'", "new run on 'cpu'", "cannot go on", "best_model.pt")
    assert code == 1 and not out and one_line(error, *says)
    code, out, error = main(f"--resume={RUN}", "--accelerator=cpu")
    assert code == 1 and not out and one_line(error, "but 'cuda' in the run")
    assert contents(RUN) == before


NO_WHOLE, OTHER = "checkpoint.pt is no whole checkpoint of this script", "is of another model"
BAD_FILES = {  # what becomes of the file
    "absent": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1_000]),
    # A pickle that makes a folder.
    "code": lambda path: path.write_bytes(b"cos\nmkdir\n(S'hacked'\ntR."),
    "a list": lambda path: torch.save([1], path),
}
BAD_STATES = {  # what becomes of its content, and what is said then
    "without a state": (lambda state: state.pop("m2n2"), NO_WHOLE),
    "without a constant": (lambda state: state["constants"].pop("DESKEW"), NO_WHOLE),
    "with a bad value": (lambda state: state["constants"].update(ALPHA=-1), NO_WHOLE),
    "without its archive": (lambda state: state["m2n2"].pop("archive"), OTHER),
    "with another": (lambda state: state["m2n2"].update(archive=torch.zeros(5, 3)), OTHER),
}


@pytest.mark.parametrize("how", BAD_FILES | BAD_STATES)
def test_a_bad_checkpoint(how, data_dir, main):
    """One line, and the folder stays as it is."""
    main(*small(data_dir=data_dir))
    path, words = RUN / "checkpoint.pt", NO_WHOLE
    if how in BAD_FILES:
        BAD_FILES[how](path)
    else:
        state = checkpoint(RUN)
        change, words = BAD_STATES[how]
        change(state)
        torch.save(state, path)
    before = contents(RUN)
    code, _, error = main(f"--resume={RUN}")
    assert code == 1 and one_line(error, f"Error: {RUN}", words, "RESUME"), error
    assert contents(RUN) == before and not os.path.exists("hacked")
