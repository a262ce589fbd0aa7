"""Several processes end with the archive of one, over gloo alone and under torchrun."""

import multiprocessing
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
from conftest import ROOT, RUN, SCRIPT, checkpoint, flag_of, make_m2n2, rows, small, write_mnist

import m2n2_mnist as script

# Not with 0/1 scores: they make ties, which the rounding of another order of sums may decide.
SUBSETS = {
    "all": {},
    "subset": {"subset_size": 100, "subset_every": 25},
    "of fewer than there are processes": {"subset_size": 2, "subset_every": 25},
}


def evolved(rank: int, processes: int, store: Path, settings: dict) -> dict:
    """The state and the history of one process; arrays, as its tensors would end with it."""
    if processes > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=processes)
    m2n2 = make_m2n2(examples=301, **settings)
    m2n2.evolve(60, test_every=3)
    width = m2n2.scores.shape[1]
    if processes > 1:
        dist.destroy_process_group()
    state = {name: getattr(m2n2, name).numpy() for name in ("archive", "best", "subset")}
    return state | {"history": m2n2.history, "width": width}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_are_one(processes, subset, tmp_path):
    """In what they evolve, choose and measure; each scores a part."""
    settings = SUBSETS[subset]
    one = evolved(0, 1, tmp_path, settings)
    jobs = [(rank, processes, tmp_path / "store", settings) for rank in range(processes)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        found = pool.starmap_async(evolved, jobs, chunksize=1).get(timeout=100)
    assert sum(state["width"] for state in found) == one["width"] > max(s["width"] for s in found)
    for state in found:
        for name in ("archive", "best", "subset"):
            np.testing.assert_array_equal(state[name], found[0][name])
        assert state["history"] == found[0]["history"]
    np.testing.assert_array_equal(np.sort(found[0]["subset"]), np.sort(one["subset"]))
    np.testing.assert_allclose(found[0]["archive"], one["archive"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[0]["best"], one["best"], rtol=1e-4, atol=1e-6)
    for row, expected in zip(found[0]["history"], one["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert len({tuple(row.items()) for row in one["history"]}) > 10


# --- torchrun ---
# A random port, so that tests may run beside each other.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--")


def test_same_end_as_one_process(tmp_path, main, spawn):
    """Of 301 examples; what the first process's file says holds for both; only one prints."""
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
