"""Real processes under torchrun; what several compute is in test_processes.py."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from conftest import ROOT, RUN, SCRIPT, checkpoint, flag_of, rows, small, write_mnist

import m2n2_mnist as script

# A random port, so that tests may run beside each other.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--")


def test_same_end_as_one_process(tmp_path, main, spawn):
    """Of 301 examples; what the first process's file says holds for both; only one prints.

    Not with 0/1 scores: they make ties, which the rounding of another order of sums may decide.
    """
    data = write_mnist(tmp_path / "data", train=301)
    flags = small(data_dir=data, iterations=200, test_every=50)
    text = SCRIPT.read_text(encoding="utf-8")
    text = re.sub("^SEED = .*", "SEED = 42 + int(os.environ['RANK'])", text, flags=re.M)
    Path("edited.py").write_text(text, encoding="utf-8")
    process = spawn(*flags, "--output-dir=two", launcher=TORCHRUN, path="edited.py")
    main(*flags)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert out.count("2 process(es)") == out.count("Evolution finished.") == 1
    assert out.count("Final Test Accuracy") == error.count(" 0/200 [") == 1  # the bar's beginning
    assert os.listdir("two/m2n2_mnist") == ["version_0"]
    folder = "two" / RUN.relative_to("runs")
    assert {*os.listdir(folder)} == {*os.listdir(RUN)}
    archives = [checkpoint(folder)["m2n2"]["archive"] for folder in (folder, RUN)]
    torch.testing.assert_close(*archives)
    for row, expected in zip(rows(folder), rows(RUN), strict=True):
        expected = {name: float(value) for name, value in expected.items()}
        found = {name: float(value) for name, value in row.items()}
        assert found == pytest.approx(expected, rel=1e-5)


def test_torchrun_leaves_every_flag_to_the_script():
    """It looks for its own among all arguments, but not in the commands that are shown to users."""
    flags = [f"{flag_of(name)}=1" for name in vars(script.parse_constants([])[0])]
    shown = (ROOT / "README.md").read_text("utf-8") + script.__doc__
    commands = re.findall(r"^ *(torchrun [^#\n]+)", shown, re.M)
    assert len(commands) > 1
    for line in commands:
        program, *arguments = shlex.split(f"{line} {shlex.join(flags)}", comments=True)
        command = torch.distributed.run.parse_args(arguments)
        assert program == "torchrun" and command.training_script == "m2n2_mnist.py"
        assert command.training_script_args[-len(flags) :] == flags
