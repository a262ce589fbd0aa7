"""Several processes end with the archive of one; `test_distributed` has torchrun itself."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from conftest import make_m2n2

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
    """In what they evolve, choose and measure; each scores a part.

    Not with 0/1 scores: they make ties, which the rounding of another order of sums may decide.
    """
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
