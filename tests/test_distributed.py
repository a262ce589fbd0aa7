"""Real processes under torchrun against one process, and a process that dies."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run
from conftest import ROOT, SCRIPT, small, spawn, write_mnist
from test_constants import edited
from test_script import RUN, checkpoint, rows

import m2n2_mnist as script

# Random ports, so that tests may run beside each other.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def run_processes(processes: int, *flags: str, path: Path = SCRIPT) -> tuple[int, str, str]:
    process = spawn(*flags, launcher=(*TORCHRUN, str(processes), "--"), path=path)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def test_same_archive_as_one_process(tmp_path: Path, main: Callable) -> None:
    """2 and 3 processes, 301 examples, 300 children; what the first one's file says holds for all.

    Not with 0/1 scores: they make ties, which the rounding of another order of sums may decide.
    """
    data = write_mnist(tmp_path / "data", train=301)
    flags = small(data_dir=data, iterations=300, test_every=100)
    main(*flags)
    one, history = checkpoint(RUN)["m2n2"], rows(RUN)
    Path("edited.py").write_text(edited(SEED="SEED = 42 + int(os.environ['RANK'])"))
    for processes, path in ((2, SCRIPT), (3, Path("edited.py"))):
        code, out, error = run_processes(processes, *flags, f"--output-dir=runs-{processes}", path=path)
        assert code == 0, error
        assert out.count("Evolution finished.") == 1  # only one process prints
        assert len(re.findall(r"Evolving Models: +0%", error)) == 1
        assert f"{processes} process(es)" in out
        assert os.listdir(f"runs-{processes}/m2n2_mnist") == ["version_0"]
        folder = f"runs-{processes}" / RUN.relative_to("runs")
        torch.testing.assert_close(checkpoint(folder)["m2n2"]["archive"], one["archive"])
        for row, expected in zip(rows(folder), history, strict=True):
            assert {k: float(v) for k, v in row.items()} == pytest.approx(
                {k: float(v) for k, v in expected.items()}, rel=1e-5
            )


def test_specialists(tmp_path: Path, main: Callable) -> None:
    """All processes merge the same two models, those of one process."""
    data = write_mnist(tmp_path / "data", train=2_001)
    flags = small(data_dir=data, start="specialists", test_every=1)
    code, _, error = main(*flags)
    assert code == 0, error
    one, history = checkpoint(RUN)["m2n2"], rows(RUN)
    code, out, error = run_processes(2, *flags, "--output-dir=runs-2")
    assert code == 0 and out.count("Evolution finished.") == 1, error
    assert "2 process(es)" in out and len(re.findall(r"Evolving Models: +0%", error)) == 1
    assert "GPU" not in out + error and not os.path.exists("lightning_logs")  # Lightning's chatter
    folder = "runs-2" / RUN.relative_to("runs")
    assert os.listdir(folder.parent) == ["version_0"]
    torch.testing.assert_close(checkpoint(folder)["m2n2"]["archive"], one["archive"])
    assert [row["train_acc"] for row in rows(folder)] == [row["train_acc"] for row in history]


def torchrun_command(line: str) -> argparse.Namespace:
    """The command as torchrun takes it, which looks at all arguments for its own ones, and for what begins two."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "torchrun"
    return torch.distributed.run.parse_args(arguments)


def test_torchrun_leaves_every_flag_to_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the commands that are printed as in those that the README and the file itself show."""
    flags = [f"--{name.lower().replace('_', '-')}=1" for name in vars(script.parse_constants([])[0])]
    monkeypatch.setattr("sys.argv", ["m2n2_mnist.py"])
    shown = re.findall(r"^ *(torchrun [^#\n]+)", (ROOT / "README.md").read_text() + script.__doc__, re.M)
    assert len(shown) > 1
    for line in (script.command(SimpleNamespace(world_size=2)), *shown):
        command = torchrun_command(f"{line} {shlex.join(flags)}")
        assert command.training_script == "m2n2_mnist.py" and command.training_script_args[-len(flags) :] == flags


def test_interrupted_and_resumed(data_dir: Path, main: Callable) -> None:
    """One process gets the signal, all stop at the same child; the printed command goes on, and so can one process."""
    flags = small(data_dir=data_dir, iterations=3_000, test_every=100, runs=2)
    process = spawn(*flags, launcher=(*TORCHRUN, "2"))
    wait_for_checkpoint(process)
    os.kill(workers(process)[-1], signal.SIGTERM)  # not the one that prints
    out, error = process.communicate(timeout=300)
    assert process.returncode != 0 and "Evolution interrupted at iteration" in out, error
    iteration = checkpoint(RUN)["m2n2"]["iteration"]
    assert iteration % 50 == 0 and 100 <= iteration < 3_000

    lines = (re.search(r"^To go on: (.+)$", out, re.M)[1], re.search(r"^The other runs: (.+)$", error, re.M)[1])
    go_on, others = map(torchrun_command, lines)
    for command in (go_on, others):
        assert command.nproc_per_node == "2" and command.training_script == str(SCRIPT)
    assert others.training_script_args == [*flags, "--seed=43", "--runs=1"]
    flags = go_on.training_script_args
    assert flags == [f"--resume={RUN}"]
    code, out, error = run_processes(2, *flags)
    assert code == 0 and f"{3_000 - iteration:,} children in" in out and out.count("Evolution finished.") == 1, error
    code, out, error = main(*flags, "--iterations=3_050")
    assert code == 0 and "50 children in" in out, error


def test_a_process_that_dies_ends_the_run(data_dir: Path) -> None:
    process = spawn(*small(data_dir=data_dir, iterations=10**7), launcher=(*TORCHRUN, "2"))
    wait_for_checkpoint(process)
    pids = workers(process)
    os.kill(pids[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in error
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert checkpoint(RUN)["m2n2"]["iteration"] >= 0  # whole


def workers(process: subprocess.Popen) -> list[int]:
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    return [int(pid) for pid in Path(children).read_text().split()]


def wait_for_checkpoint(process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not (RUN / "checkpoint.pt").exists() or checkpoint(RUN)["m2n2"]["iteration"] < 100:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
