"""It holds where people run scripts: launchers, side by side, odd consoles, notebooks."""

import io
import os
import sys
from pathlib import Path

import pytest
from conftest import RUN, SCRIPT, at, full, rows, small

import m2n2_mnist as script
from m2n2_mnist import M2N2

FAST = {"iterations": 6, "test_every": 3}
ENVIRONMENTS = {  # what launchers leave behind
    "srun": "SLURM_JOB_ID=1 SLURM_JOB_NAME=x SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_LOCALID=1 "
    "SLURM_NODEID=0 SLURM_NTASKS_PER_NODE=2 SLURM_JOB_NUM_NODES=1",
    "mpirun": "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 PMI_RANK=1 PMI_SIZE=2 "
    # and all of torchrun's but its own, TORCHELASTIC_RUN_ID
    "RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 NODE_RANK=1 GROUP_RANK=1 "
    "MASTER_ADDR=127.0.0.1 MASTER_PORT=29555",
}


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("launcher", ENVIRONMENTS)
def test_an_environment_that_names_a_rank(launcher, data_dir, main, monkeypatch):
    """One process writes its files and waits for nobody."""
    for variable in ENVIRONMENTS[launcher].split():
        monkeypatch.setenv(*variable.split("="))
    code, out, error = main(*small(data_dir=data_dir, **FAST))
    assert code == 0 and "1 process(es)" in out and "Evolving Models" in error, error
    assert len(rows(RUN)) == 2


def test_jobs_started_together_have_folders_of_their_own(monkeypatch):
    """Another makes each folder but the last an instant before this one does."""
    mkdir = os.mkdir

    def beaten(path, *mode):
        if Path(path).name != "version_1" and not os.path.exists(path):
            mkdir(path, *mode)
        mkdir(path, *mode)

    monkeypatch.setattr(os, "mkdir", beaten)
    folder = script.new_folder("runs")
    assert folder == RUN.with_name("version_1") and not os.listdir(RUN)


# --- Consoles ---
def test_help_where_a_sign_cannot_be_shown(monkeypatch):
    """A Windows console's default, in which there is no σ."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "cp1252", write_through=True))
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = shown.getvalue().decode("cp1252")
    assert "σ" not in text and "?, standard deviation" in text and "--data-dir" in text


class Bare:
    """A stream as some notebooks and loggers have it, without isatty and reconfigure."""

    def __init__(self) -> None:
        stream = io.StringIO()
        self.write, self.flush, self.getvalue = stream.write, stream.flush, stream.getvalue


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("kind", [Bare, io.StringIO, lambda: None])
def test_other_streams(kind, data_dir, monkeypatch):
    """Or none, where it was closed; a row that cannot be written needs them too."""
    streams = [kind(), kind()]
    moment = at(M2N2, "_measure", lambda: full("metrics.csv"), iteration=40)
    with monkeypatch.context() as patch, moment:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        script.main(small(data_dir=data_dir))
    assert len(rows(RUN)) == 3
    for stream, words in zip(streams, ("Evolution finished.", "60/60"), strict=True):
        assert stream is None or words in stream.getvalue()


# --- The script without a file ---
WITHOUT_A_FILE = {  # what Python then says of the file, and the arguments
    "pasted into a notebook": ({}, "/usr/lib/colab_kernel_launcher.py -f /root/kernel-1.json"),
    "from standard input": ({"__file__": "<stdin>"}, "- --test-every=3"),
}


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("how", WITHOUT_A_FILE)
def test_the_script_without_a_file(how, data_dir, monkeypatch):
    """It runs, and is not given a kernel's own arguments; as under -OO."""
    file, argv = WITHOUT_A_FILE[how]
    monkeypatch.setattr(sys, "argv", argv.split())
    edits = "ITERATIONS, TEST_EVERY, ACCELERATOR, IMAGE_SIZE = 6, 2, 'cpu', 7"
    text = SCRIPT.read_text(encoding="utf-8").replace("\n\n\n", f"\n{edits}\n\n\n", 1)
    cell = {"__name__": "__main__", "__doc__": None, **file}
    exec(compile(text, "", "exec", optimize=2), cell)
    assert len(rows(RUN)) == (2 if file else 3)
    assert not (RUN / SCRIPT.name).exists()  # there is none to copy
    with pytest.raises(SystemExit, match="0"):
        cell["main"]("--help")
