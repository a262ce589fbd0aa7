"""Real processes under torchrun against one process, interrupted and resumed ones, and a process that dies."""

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from conftest import ROOT, RUN, SCRIPT, checkpoint, rows, small, spawn, wait_for_iteration, write_mnist

import m2n2_mnist as script

# Random ports, so that tests may run beside each other.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def start(processes: int, *flags: str, path: Path = SCRIPT) -> subprocess.Popen:
    return spawn(*flags, launcher=(*TORCHRUN, str(processes), "--"), path=path)


def workers(process: subprocess.Popen) -> list[int]:
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    return [int(pid) for pid in Path(children).read_text().split()]


def test_same_archive_as_one_process(tmp_path: Path, main: Callable) -> None:
    """2 and 3 processes, 301 examples, 300 children; what the first one's file says holds for all.

    Not with 0/1 scores: they make ties, which the rounding of another order of sums may decide.
    """
    flags = small(data_dir=write_mnist(tmp_path / "data", train=301), iterations=300, test_every=100)
    main(*flags)
    one, history = checkpoint(RUN)["m2n2"], rows(RUN)
    edited = re.sub("^SEED = .*", "SEED = 42 + int(os.environ['RANK'])", SCRIPT.read_text(encoding="utf-8"), flags=re.M)
    Path("edited.py").write_text(edited, encoding="utf-8")
    for processes in (2, 3):
        process = start(processes, *flags, f"--output-dir=runs-{processes}", path=Path("edited.py"))
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert out.count("Evolution finished.") == out.count(f"{processes} process(es)") == 1  # only one prints
        assert len(re.findall(r"Evolving Models: +0%", error)) == 1
        assert os.listdir(f"runs-{processes}/m2n2_mnist") == ["version_0"]
        folder = f"runs-{processes}" / RUN.relative_to("runs")
        torch.testing.assert_close(checkpoint(folder)["m2n2"]["archive"], one["archive"])
        for row, expected in zip(rows(folder), history, strict=True):
            expected = {name: float(value) for name, value in expected.items()}
            assert {name: float(value) for name, value in row.items()} == pytest.approx(expected, rel=1e-5)


def test_interrupted_and_resumed(data_dir: Path, main: Callable) -> None:
    """One process gets the signal, or torchrun itself: all stop at the same child, and one process can go on too."""
    flags, least = small(data_dir=data_dir, iterations=10**7, test_every=100, runs=2), 100
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(2, *flags)
        wait_for_iteration(process, least)
        first = number == signal.SIGTERM
        os.kill(workers(process)[-1] if first else process.pid, number)  # not the one that prints
        out, error = process.communicate(timeout=300)
        reached = checkpoint(RUN)["m2n2"]["iteration"]
        assert process.returncode != 0 and reached % 50 == 0 and reached >= least, error
        assert f"Evolution interrupted at iteration {reached}. To go on, give no flag but --resume {RUN}\n" in out
        assert ("For the other runs, add --seed 43 --runs 1\n" in out) == first and "Final Test Accuracy" in out
        flags, least = [f"--resume={RUN}"], reached + 100

    # The rest would take hours: make it end here.
    state = checkpoint(RUN)
    state["constants"]["ITERATIONS"] = reached
    torch.save(state, RUN / "checkpoint.pt")
    code, out, error = main(f"--resume={RUN}", f"--iterations={reached + 50}")
    assert code == 0 and "\n50 children in" in out and "Evolution finished." in out, error


def test_a_process_that_dies_ends_the_run(data_dir: Path) -> None:
    process = start(2, *small(data_dir=data_dir, iterations=10**7))
    wait_for_iteration(process, 100)
    pids = workers(process)
    os.kill(pids[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGKILL" in error
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert checkpoint(RUN)["m2n2"]["iteration"] >= 100  # whole


def test_torchrun_leaves_every_flag_to_the_script() -> None:
    """It looks at all arguments for its own ones, and for what begins two; so do the commands that are shown not."""
    flags = [f"--{name.lower().replace('_', '-')}=1" for name in vars(script.parse_constants([])[0])]
    shown = re.findall(r"^ *(torchrun [^#\n]+)", (ROOT / "README.md").read_text("utf-8") + script.__doc__, re.M)
    assert len(shown) > 1
    for line in shown:
        program, *arguments = shlex.split(f"{line} {shlex.join(flags)}", comments=True)
        command = torch.distributed.run.parse_args(arguments)
        assert program == "torchrun" and command.training_script == "m2n2_mnist.py"
        assert command.training_script_args[-len(flags) :] == flags
