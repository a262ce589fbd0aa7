"""A killed run goes on to the same bits, a finished one can be extended; what cannot go on is refused."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    RUN,
    SECOND,
    at_call,
    at_iteration,
    checkpoint,
    rows,
    same_end,
    small,
    spawn,
    wait_for_iteration,
    write_mnist,
)

import m2n2_mnist as script

pytestmark = pytest.mark.usefixtures("no_figure")


class Killed(BaseException):
    """Ends the script as SIGKILL does: nothing of it runs any more."""


def die() -> None:
    raise Killed


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hparams(folder: Path) -> dict:
    return yaml.safe_load((folder / "hparams.yaml").read_text())


def one_line(error: str, *parts: str) -> bool:
    return error.endswith("\n") and error.count("\n") == 1 and all(part in error for part in parts)


def kill_and_resume(data_dir: Path, main: Callable, kills: int) -> None:
    """SIGKILL, then again after 50 more children at least; the survivor must end as one that was never disturbed."""
    flags = small(data_dir=data_dir, iterations=1_000 + 150 * kills, test_every=10)
    for kill in range(kills):
        process = spawn(*([f"--resume={RUN}"] if kill else flags))
        wait_for_iteration(process, (checkpoint(RUN)["m2n2"]["iteration"] if kill else 0) + 50)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, _, error = main(f"--resume={RUN}")
    assert code == 0, error
    assert "deleted" not in error  # as Lightning says of metrics.csv, which is written anew
    main(*flags, "--output-dir=undisturbed")
    same_end(RUN, "undisturbed" / RUN.relative_to("runs"))


def test_killed_and_resumed(data_dir: Path, main: Callable) -> None:
    kill_and_resume(data_dir, main, kills=2)


@pytest.mark.slow
def test_killed_twenty_times(data_dir: Path, main: Callable) -> None:
    kill_and_resume(data_dir, main, kills=20)


MOMENTS = {  # where a run is killed, and the iteration of the checkpoint that is left
    "in a child": (partial(at_call, owner=script.M2N2, name="_mutate", call=33), 20),
    "at a measurement": (partial(at_call, owner=script.M2N2, name="_measure", call=2), 20),
    "before the checkpoint": (partial(at_call, owner=script, name="atomic_save", call=3), 20),
    "in the checkpoint": (partial(at_call, owner=os, name="replace", call=3), 20),
    "before the first child": (partial(at_call, owner=script.M2N2, name="evolve", call=1), 0),
    "at the end": (partial(at_call, owner=script, name="report", call=1), 60),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_moment(moment: str, data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at, saved = MOMENTS[moment]
    with monkeypatch.context() as patch:
        kill_at(patch, act=die)
        with pytest.raises(Killed):
            main(*small(data_dir=data_dir))
    assert checkpoint(RUN)["m2n2"]["iteration"] == saved and not (RUN / "best_model.pt").exists()
    (RUN / "metrics.csv").unlink(missing_ok=True)  # the checkpoint has all of it
    code, _, error = main(f"--resume={RUN}")
    assert code == 0, error
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


def test_killed_in_the_second_of_several_runs(data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder alone goes on with it: that seed, that run, no other."""
    with monkeypatch.context() as patch:
        at_iteration(patch, 33, die, run=2)
        with pytest.raises(Killed):
            main(*small(data_dir=data_dir, runs=3, seed=7))
    assert checkpoint(SECOND)["m2n2"]["iteration"] == 20
    for flags in ([], ["--runs=1"]):
        code, out, error = main(f"--resume={SECOND}", *flags)
        assert code == 0 and "seed 8\n" in out and out.count("Evolution finished.") == 1, error
        assert "Mean Test Accuracy" not in out and len(os.listdir(RUN.parent)) == 2
    assert hparams(SECOND)["SEED"] == 8
    main(*small(data_dir=data_dir, seed=8, output_dir="undisturbed"))
    same_end(SECOND, "undisturbed" / RUN.relative_to("runs"))


def test_a_finished_run_is_extended(data_dir: Path, main: Callable) -> None:
    main(*small(data_dir=data_dir))
    before = checkpoint(RUN)["m2n2"]
    code, out, _ = main(f"--resume={RUN}")
    assert code == 0 and "children in" not in out and "Evolution finished." in out
    assert torch.equal(checkpoint(RUN)["m2n2"]["archive"], before["archive"]) and len(rows(RUN)) == 3
    code, out, _ = main(f"--resume={RUN}", "--iterations=100")
    assert code == 0 and "40 children in" in out and hparams(RUN)["ITERATIONS"] == 100
    assert [int(row["iteration"]) for row in rows(RUN)] == [20, 40, 60, 80, 100]
    code, out, _ = main(f"--resume={RUN}")  # with what it was extended to
    assert code == 0 and "children in" not in out and len(rows(RUN)) == 5


def test_resumed_from_another_folder(data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in a/ with the data's relative path, it goes on from b/ with that data, into its own folder."""
    Path("a").mkdir()
    Path("b").mkdir()
    data_dir.rename("a/data")
    monkeypatch.chdir("a")
    with monkeypatch.context() as patch:
        at_iteration(patch, 33, die)
        with pytest.raises(Killed):
            main(*small(data_dir="data"))
    monkeypatch.chdir("../b")
    folder = Path("../a") / RUN
    code, _, error = main(f"--resume={folder}")
    assert code == 0 and os.listdir() == [], error
    monkeypatch.chdir("../a")
    main(*small(data_dir="data"))
    same_end(RUN, SECOND)


def test_what_may_be_given_at_a_resumption(data_dir: Path, main: Callable, tmp_path: Path) -> None:
    """How far, where the same images are, where outputs go; and what is as it was."""
    main(*small(data_dir=data_dir, seed=5))
    moved = data_dir.rename(tmp_path / "moved")
    same = ["--hidden-dim=8", "--alpha=1", "--seed=5", "--runs=1", "--score=PROBABILITY", "--deskew=false"]
    flags = [f"--data-dir={moved}", "--output-dir=elsewhere", "--iterations=80"]
    code, _, error = main(f"--resume={RUN}", *flags, *same)
    assert code == 0, error
    constants = hparams(RUN)
    assert constants["ITERATIONS"] == 80 and constants["DATA_DIR"] == str(moved)
    assert main(f"--resume={RUN}")[0] == 0  # and it is there that the data are from now on
    assert os.listdir(RUN.parent) == ["version_0"] and not os.path.exists("elsewhere")


CHANGES = {"hidden_dim": 9, "image_size": 14, "crop_size": 20, "deskew": True, "dataset": "KMNIST", "seed": 1}
CHANGES |= {"archive_size": 6, "score": "correct", "temperature": 2.0, "alpha": 0.5, "runs": 2, "test_every": 10}
CHANGES |= {"init_std": 0.5, "mutation_std": 0.5, "final_mutation_std": 0.5, "prior_std": 0.5}
CHANGES |= {"use_attraction": False, "use_crossover": False, "use_split_point": False, "use_mirroring": False}
CHANGES |= {"iterations": 59, "accelerator": "cuda"}


def test_a_flag_that_differs_is_refused(data_dir: Path, main: Callable) -> None:
    """By one line that names it and both values; the run's folder stays as it is."""
    main(*small(data_dir=data_dir))
    before, constants = contents(Path("runs")), checkpoint(RUN)["constants"]
    assert constants.keys() == {name.upper() for name in CHANGES} | {"RESUME", "DATA_DIR", "OUTPUT_DIR"}
    for name, value in CHANGES.items():
        code, out, error = main(f"--resume={RUN}", f"--{name.replace('_', '-')}={value}")
        was = constants[name.upper()]
        assert code == 1 and not out and one_line(error, f"{name.upper()} is {value!r}, but {was!r}", "RESUME"), error
    assert contents(Path("runs")) == before


def test_a_constant_edited_since_does_not_count(
    data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on as it was, here with RESUME set in the file, beside another experiment's constants."""
    with monkeypatch.context() as patch:
        at_iteration(patch, 33, die)
        with pytest.raises(Killed):
            main(*small(data_dir=data_dir))
    edits = {"RESUME": RUN, "SEED": 1, "RUNS": 5, "ITERATIONS": 10, "ALPHA": 0.5, "HIDDEN_DIM": 9, "DATA_DIR": "none"}
    with monkeypatch.context() as patch:
        for name, value in edits.items():
            patch.setattr(script, name, value)
        code, out, error = main()
    assert code == 0 and "40 children in" in out, error
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


def test_other_images_at_a_resumption(data_dir: Path, main: Callable, tmp_path: Path) -> None:
    """Each of the four files counts; the message is about images, not about the folder's name."""
    main(*small(data_dir=data_dir))
    before, raw = contents(Path("runs")), data_dir / "MNIST" / "raw"
    for path in raw.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        code, out, error = main(f"--resume={RUN}")
        assert code == 1 and not out and one_line(error, "images", "DATA_DIR"), path
        path.write_bytes(content)
    other = write_mnist(tmp_path / "other", seed=1)
    code, _, error = main(f"--resume={RUN}", f"--data-dir={other}")
    assert code == 1 and one_line(error, "images")
    assert contents(Path("runs")) == before
    assert main(f"--resume={RUN}")[0] == 0


class Malicious:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("hacked",))


def without(section: str, name: str) -> dict:
    """The checkpoint of the run less one entry, as another version of the script may have it."""
    state = checkpoint(RUN)
    del state[section][name]
    return state


def test_bad_checkpoints(data_dir: Path, main: Callable) -> None:
    main(*small(data_dir=data_dir))
    whole, bad = (RUN / "checkpoint.pt").read_bytes(), Path("bad")
    contents_of = {
        "absent": None,
        "empty": b"",
        "text": b"no checkpoint",
        "truncated": whole[:-1_000],
        "code": Malicious(),
        "foreign": {"weights": torch.ones(1)},
        "list": [1],
        "of another script": {"constants": {}, "m2n2": {"weights": torch.ones(1)}},
        "without a constant": without("constants", "DESKEW"),
        "with a bad value": checkpoint(RUN) | {"constants": checkpoint(RUN)["constants"] | {"ALPHA": -1}},
    }
    bad.mkdir()
    for how, content in contents_of.items():
        if isinstance(content, bytes):
            (bad / "checkpoint.pt").write_bytes(content)
        elif content is not None:
            torch.save(content, bad / "checkpoint.pt")
        before = contents(bad)
        code, out, error = main(f"--resume={bad}")
        assert code == 1 and not out and one_line(error, str(bad / "checkpoint.pt"), "RESUME"), (how, error)
        assert not os.path.exists("hacked") and contents(bad) == before, how
    torch.save(without("m2n2", "retry"), bad / "checkpoint.pt")
    assert "is of another model: 'retry'" in main(f"--resume={bad}")[2] and os.listdir(bad) == ["checkpoint.pt"]
    (bad / "checkpoint.pt").write_bytes(whole)
    assert main(f"--resume={bad}")[0] == 0  # in a folder that was renamed
