"""A killed run goes on to the same bits, a finished one can be extended; what cannot go on is refused."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import RUN, SECOND, at_call, checkpoint, one_line, rows, same_end, small, spawn, wait_for_iteration

import m2n2_mnist as script
from m2n2_mnist import M2N2

pytestmark = pytest.mark.usefixtures("no_figure")


class Killed(BaseException):
    """Ends the script as SIGKILL does: nothing of it runs any more."""


def die() -> None:
    raise Killed


def kill(main: Callable, flags: list[str], owner: object = M2N2, name: str = "_step", call: int = 34) -> None:
    """A run that is killed at that call, by default in its 34th child."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_call(patch, owner, name, call, die)
        main(*flags)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed(kills: int, data_dir: Path, main: Callable) -> None:
    """SIGKILL, then again after 50 more children at least; the survivor must end as one that was never disturbed."""
    flags = small(data_dir=data_dir, iterations=1_000 + 150 * kills, test_every=10)
    way_on, saved = flags, 0
    for _ in range(kills):
        process = spawn(*way_on)
        wait_for_iteration(process, saved + 50)
        process.kill()
        _, error = process.communicate()
        assert "deleted" not in error  # as Lightning says of metrics.csv, which is written anew
        way_on, saved = [f"--resume={RUN}"], checkpoint(RUN)["m2n2"]["iteration"]
    code, _, error = main(*way_on)
    assert code == 0, error
    main(*flags)
    same_end(RUN, SECOND)


MOMENTS = {  # where a run is killed, at which call of it, and the iteration of the checkpoint that is left
    "in a child": (M2N2, "_mutate", 33, 20),
    "at a measurement": (M2N2, "_measure", 2, 20),
    "before the checkpoint": (script, "atomic_save", 3, 20),
    "in the checkpoint": (os, "replace", 3, 20),
    "before the first child": (M2N2, "evolve", 1, 0),
    "at the end": (script, "report", 1, 60),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_moment(moment: str, data_dir: Path, main: Callable) -> None:
    *place, saved = MOMENTS[moment]
    kill(main, small(data_dir=data_dir), *place)
    assert checkpoint(RUN)["m2n2"]["iteration"] == saved and not (RUN / "best_model.pt").exists()
    (RUN / "metrics.csv").unlink(missing_ok=True)  # the checkpoint has all of it
    code, _, error = main(f"--resume={RUN}")
    assert code == 0, error
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


def test_killed_in_the_second_of_several_runs(data_dir: Path, main: Callable) -> None:
    """Its folder alone goes on with it: that seed, that run, no other."""
    kill(main, small(data_dir=data_dir, runs=3, seed=7), call=60 + 34)
    assert checkpoint(SECOND)["m2n2"]["iteration"] == 20
    code, out, error = main(f"--resume={SECOND}")
    assert code == 0 and "seed 8\n" in out and out.count("Evolution finished.") == 1, error
    assert "Mean Test Accuracy" not in out and len(os.listdir(RUN.parent)) == 2
    main(*small(data_dir=data_dir, seed=8))
    same_end(SECOND, RUN.with_name("version_2"))


def test_goes_on_as_it_was(data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RESUME set in the file, beside another experiment's constants, elsewhere than its data's relative path."""
    kill(main, small(data_dir=data_dir.name))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    edits = {"RESUME": f"../{RUN}", "SEED": 1, "RUNS": 5, "ITERATIONS": 10, "ALPHA": 0.5, "HIDDEN_DIM": 9}
    with monkeypatch.context() as patch:
        for name, value in (edits | {"DATA_DIR": "none"}).items():
            patch.setattr(script, name, value)
        code, out, error = main()
    assert code == 0 and "40 children in" in out and not os.listdir(), error
    monkeypatch.chdir("..")
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


def test_a_finished_run_is_extended(data_dir: Path, main: Callable, tmp_path: Path) -> None:
    """Flags may say how far, where the same images are, where outputs go, and what is as it was."""
    main(*small(data_dir=data_dir, seed=5))
    archive = checkpoint(RUN)["m2n2"]["archive"]
    code, out, _ = main(f"--resume={RUN}")
    assert code == 0 and "children in" not in out and "Evolution finished." in out
    assert torch.equal(checkpoint(RUN)["m2n2"]["archive"], archive) and len(rows(RUN)) == 3
    moved = data_dir.rename(tmp_path / "moved")
    flags = ["--iterations=100", f"--data-dir={moved}", "--output-dir=elsewhere"]
    flags += ["--hidden-dim=8", "--alpha=1", "--seed=5", "--runs=1", "--score=PROBABILITY", "--deskew=false"]
    code, out, error = main(f"--resume={RUN}", *flags)
    assert code == 0 and "40 children in" in out, error
    assert [int(row["iteration"]) for row in rows(RUN)] == [20, 40, 60, 80, 100]
    constants = yaml.safe_load((RUN / "hparams.yaml").read_text())
    assert constants["ITERATIONS"] == 100 and constants["DATA_DIR"] == str(moved)
    code, out, error = main(f"--resume={RUN}")  # with what it was given last
    assert code == 0 and "children in" not in out and len(rows(RUN)) == 5, error
    assert os.listdir(RUN.parent) == ["version_0"] and not os.path.exists("elsewhere")


CHANGES = {"hidden_dim": 9, "image_size": 14, "crop_size": 20, "deskew": True, "dataset": "KMNIST", "seed": 1}
CHANGES |= {"archive_size": 6, "score": "correct", "temperature": 2.0, "alpha": 0.5, "runs": 2, "test_every": 10}
CHANGES |= {"init_std": 0.5, "mutation_std": 0.5, "final_mutation_std": 0.5, "prior_std": 0.5}
CHANGES |= {"use_attraction": False, "use_crossover": False, "use_split_point": False, "use_mirroring": False}
CHANGES |= {"iterations": 59, "accelerator": "cuda"}


def test_what_differs_is_refused(data_dir: Path, main: Callable) -> None:
    """A flag by one line that names it and both values, each of the four files of images; the folder stays as it is."""
    main(*small(data_dir=data_dir))
    before, constants = contents(Path("runs")), checkpoint(RUN)["constants"]
    assert constants.keys() == {name.upper() for name in CHANGES} | {"RESUME", "DATA_DIR", "OUTPUT_DIR"}
    for name, value in CHANGES.items():
        code, out, error = main(f"--resume={RUN}", f"--{name.replace('_', '-')}={value}")
        was = constants[name.upper()]
        assert code == 1 and not out and one_line(error, f"{name.upper()} is {value!r}, but {was!r}", "RESUME"), error
    for path in (data_dir / "MNIST" / "raw").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for flags in ([], [f"--data-dir={data_dir}"]):
            code, out, error = main(f"--resume={RUN}", *flags)
            assert code == 1 and not out and one_line(error, "images", "DATA_DIR"), path
        path.write_bytes(content)
    assert contents(Path("runs")) == before
    assert main(f"--resume={RUN}")[0] == 0


def test_bad_checkpoints(data_dir: Path, main: Callable) -> None:
    """In a folder of another name, in which the whole one is taken."""
    main(*small(data_dir=data_dir))
    whole, state, path = (RUN / "checkpoint.pt").read_bytes(), checkpoint(RUN), Path("bad", "checkpoint.pt")
    constants = state["constants"]
    bad = {
        "absent": None,
        "truncated": whole[:-1_000],
        "code": b"cos\nmkdir\n(S'hacked'\ntR.",  # a pickle that makes a folder
        "list": [1],
        "without a constant": state | {"constants": {name: constants[name] for name in constants if name != "DESKEW"}},
        "with a bad value": state | {"constants": constants | {"ALPHA": -1}},
    }
    path.parent.mkdir()
    for how, content in bad.items():
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        before = contents(path.parent)
        code, out, error = main(f"--resume={path.parent}")
        assert code == 1 and not out and one_line(error, str(path), "RESUME"), (how, error)
        assert not os.path.exists("hacked") and contents(path.parent) == before, how
    del state["m2n2"]["retry"]
    torch.save(state, path)
    assert "is of another model: 'retry'" in main("--resume=bad")[2] and os.listdir("bad") == ["checkpoint.pt"]
    path.write_bytes(whole)
    assert main("--resume=bad")[0] == 0
