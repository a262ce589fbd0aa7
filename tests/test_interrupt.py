"""Ctrl-C ends with the way on from the last row; other signals end the process as any other."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    RUN,
    SECOND,
    at,
    checkpoint,
    ctrl_c,
    rows,
    same_end,
    small,
    wait_for_iteration,
)

import m2n2_mnist as script
from m2n2_mnist import M2N2

pytestmark = pytest.mark.usefixtures("no_figure")

MOMENTS = {  # what is called then, after how many children, for which file; the checkpoint left
    "before the first child": ((M2N2, "evolve", 0, ""), 0),
    "in a child": ((M2N2, "_step", 33, ""), 20),
    "as a subset is chosen": ((M2N2, "_choose_subset", 25, ""), 20),
    "at a measurement": ((M2N2, "test_accuracy", 40, ""), 20),
    "in metrics.csv": ((os, "replace", 40, "metrics.csv"), 20),
    "in the checkpoint": ((os, "replace", 40, "checkpoint.pt"), 20),
    "at the last measurement": ((M2N2, "_measure", 60, ""), 40),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c(moment: str, data_dir: Path, main: Callable) -> None:
    """In the second of three runs, in an interpreter that lives on: the flags that it prints do."""
    (owner, name, iteration, file), saved = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch:
        at(patch, owner, name, ctrl_c, iteration, seed=8, file=file)
        code, out, error = main(*small(data_dir=data_dir, runs=3, seed=7))
    assert code == 130 and out.count("Evolution finished.") == 1 and "Mean" not in out, error
    (flags,) = re.findall(r"^Interrupted\. To go on .*, give no flag but (.+)$", out, re.M)
    assert out.endswith(f"{flags}\n") and "Traceback" not in error
    assert checkpoint(SECOND)["m2n2"]["iteration"] == saved
    assert not list(SECOND.glob("*.tmp"))
    code, out, error = main(*flags.split())
    assert code == 0 and f" {saved}/60 " in error.split("\r")[1], error  # where the bar starts
    main(*small(data_dir=data_dir, seed=8))
    same_end(SECOND, RUN.with_name("version_2"))


@pytest.mark.parametrize("name", ["new_folder", "plot_evolution"])
def test_ctrl_c_beside_the_evolution(name: str, data_dir: Path, main: Callable) -> None:
    """Python's own KeyboardInterrupt; what was written is whole."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at(patch, script, name, ctrl_c, 0 if name == "new_folder" else 60, seed=8)
        main(*small(data_dir=data_dir, runs=2, seed=7))
    last = RUN if name == "new_folder" else SECOND
    assert sorted(os.listdir(RUN.parent))[-1] == last.name and len(rows(last)) == 3
    assert main(f"--resume={last}")[0] == 0


def test_ctrl_c_while_the_data_are_read(
    data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.MNISTDataModule, "setup", lambda data: ctrl_c())
    with pytest.raises(KeyboardInterrupt):
        main(*small(data_dir=data_dir))
    assert os.listdir() == ["data"]


def test_a_launcher_that_ignores_ctrl_c_is_obeyed(data_dir: Path, spawn: Callable) -> None:
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
