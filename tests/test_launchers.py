"""It holds where people run scripts: under launchers, side by side, in odd consoles, in a notebook, in a thread."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import RUN, SCRIPT, SECOND, checkpoint, rows, run_script, same_end, small

import m2n2_mnist as script

FAST = {"iterations": 6, "test_every": 3}
ENVIRONMENTS = {  # what launchers leave behind; torchrun's own is TORCHELASTIC_RUN_ID
    "a rank": "RANK=1",
    "a world": "WORLD_SIZE=2",
    "srun": "SLURM_JOB_ID=1 SLURM_JOB_NAME=x SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NODEID=1 "
    "SLURM_NTASKS_PER_NODE=1 SLURM_JOB_NUM_NODES=2",
    "mpirun, and all of torchrun's but its own": "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 PMI_RANK=1 PMI_SIZE=2 "
    "RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 NODE_RANK=1 GROUP_RANK=1 MASTER_ADDR=127.0.0.1 "
    "MASTER_PORT=29555",
}


@pytest.mark.parametrize("launcher", ENVIRONMENTS)
def test_an_environment_that_names_a_rank(launcher: str, data_dir: Path) -> None:
    """One process is one run, which writes its files and waits for nobody."""
    variables = dict(pair.split("=") for pair in ENVIRONMENTS[launcher].split())
    run = run_script(*small(data_dir=data_dir, **FAST), env={**os.environ, **variables})
    assert run.returncode == 0 and "1 process(es)" in run.stdout and "Evolution finished." in run.stdout, run.stderr
    assert len(rows(RUN)) == 2 and checkpoint(RUN)["m2n2"]["iteration"] == 6 and (RUN / "best_model.pt").exists()
    assert "Evolving Models" in run.stderr and os.listdir(RUN.parent) == ["version_0"]


def test_jobs_started_together_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them come to make the first folder, and the one around it, at the same instant."""
    barrier, mkdir, waited = threading.Barrier(3), os.mkdir, set()

    def together(path: str, *mode: int) -> None:
        first = (threading.get_ident(), Path(path).name)
        if first not in waited and first[1] in ("m2n2_mnist", "version_0"):
            waited.add(first)
            barrier.wait(60)
        mkdir(path, *mode)

    monkeypatch.setattr(os, "mkdir", together)
    with ThreadPoolExecutor(3) as jobs:
        folders = list(jobs.map(script.new_folder, ["runs"] * 3))
    assert sorted(folders) == [str(RUN.with_name(f"version_{number}")) for number in range(3)]
    assert all(Path(folder, SCRIPT.name).read_bytes() == SCRIPT.read_bytes() for folder in folders)


def test_help_where_a_sign_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Windows console's default, in which there is no σ."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "cp1252", write_through=True))
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = shown.getvalue().decode("cp1252")
    assert "σ" not in text and "?, standard deviation" in text
    assert all(f"--{name.lower().replace('_', '-')}" in text for name in script.CONSTANTS)


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
CONSOLES = {"in ASCII, without assertions": (("-OO",), ASCII), "warnings": ((), {"PYTHONWARNINGS": "error"})}


@pytest.mark.parametrize("console", CONSOLES)
def test_an_odd_console(console: str, data_dir: Path) -> None:
    """Two runs, for the ± of their mean."""
    options, environment = CONSOLES[console]
    run = run_script(*small(data_dir=data_dir, runs=2, **FAST), launcher=options, env={**os.environ, **environment})
    assert run.returncode == 0 and run.stdout.count("Evolution finished.") == 2, run.stderr
    assert "Mean Test Accuracy of 2 runs" in run.stdout and "Traceback" not in run.stderr


def test_without_a_terminal(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a bar, and one that says nothing at all."""
    flags = small(data_dir=data_dir, **FAST)
    command = ["sh", "-c", '"$@" 2>&-', "sh", sys.executable, str(SCRIPT), *flags]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300)
    assert run.returncode == 0 and "Evolution finished." in run.stdout
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert script.main(flags) == 0
    same_end(RUN, SECOND)


@pytest.mark.usefixtures("no_figure")
def test_in_a_thread(data_dir: Path, main: Callable) -> None:
    """A run without handlers of signals, which only the main thread can have."""
    flags = small(data_dir=data_dir, **FAST)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(script.main, flags).result() == 0
    main(*flags)
    same_end(RUN, SECOND)


@pytest.mark.usefixtures("no_figure")
def test_in_a_notebook(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """main() takes what it is given, not the kernel's own arguments; its streams have no encoding to set."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/root/kernel-1.json"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    constants = {"ITERATIONS": 6, "TEST_EVERY": 3, "ACCELERATOR": "cpu", "IMAGE_SIZE": 7, "HIDDEN_DIM": 8}
    for name, value in constants.items():
        monkeypatch.setattr(script, name, value)
    assert script.main() == 0
    assert "Evolution finished." in sys.stdout.getvalue() and "6/6" in sys.stderr.getvalue() and len(rows(RUN)) == 2
