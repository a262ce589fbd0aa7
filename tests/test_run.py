"""A run as a user starts it: what it prints, the files it leaves, and what stops it."""

import errno
import json
import os
import re
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    RUN,
    SCRIPT,
    SECOND,
    as_module,
    at,
    checkpoint,
    full,
    one_line,
    rows,
    same_end,
    small,
)

import m2n2_mnist as script
from m2n2_mnist import M2N2, MLP

# So much is learnt in 60 children that accuracies differ.
LEARNS = {"init_std": 0.3, "mutation_std": 0.1, "prior_std": 0.0}
FILES = {"metrics.csv", "constants.json", "best_model.pt", "checkpoint.pt"}
FILES |= {"evolution.png", "m2n2_mnist.py"}


def accuracy_of_file(folder: Path, data_dir: Path) -> float:
    """Test accuracy in % of best_model.pt, as a reader of the file would work it out."""
    data = script.MNISTDataModule(data_dir, deskew=False, crop_size=28, image_size=7)
    data.setup()
    model = MLP(49, 8)
    model.load_state_dict(torch.load(folder / "best_model.pt", weights_only=True))
    predictions = [model(image[None]).argmax().item() for image in data.test_images]
    return 100 * np.mean(predictions == data.test_labels.numpy())


# A console that knows ASCII alone, where each warning is an error.
ODD = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONWARNINGS": "error"}


def test_output_and_files(data_dir, spawn):
    process = spawn(*small(data_dir=data_dir, **LEARNS), env=os.environ | ODD)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    lines = out.splitlines()
    assert lines[0] == "M2N2 on cpu, 1 process(es); 300 + 60 images of MNIST; seed 42"
    assert re.fullmatch(r"Test accuracy of the archive as an ensemble: \d+\.\d\d%", lines[1])
    assert lines[2:4] == [f"Files: {RUN}", "Evolution finished."]
    accuracy = f"{accuracy_of_file(RUN, data_dir):.2f}%"
    assert lines[4:] == [f"Final Test Accuracy of the best model: {accuracy}"]

    history = checkpoint(RUN)["m2n2"]["history"]
    bars = [bar for bar in re.split(r"[\r\n]", error) if bar.strip()]
    assert all(bar.startswith("Evolving Models:") for bar in bars)
    assert "  0%" in bars[0] and "100%" in bars[-1] and "60/60" in bars[-1]
    assert f"best_fitness={history[-1]['best_fitness']:.0f}" in bars[-1]
    assert f"test_acc={history[-1]['test_acc']:.2%}" in bars[-1]

    assert set(os.listdir(RUN)) == FILES
    assert (RUN / "evolution.png").read_bytes().startswith(b"\x89PNG")
    assert [row["iteration"] for row in history] == [20, 40, 60]
    read = [{name: float(value) for name, value in row.items()} for row in rows(RUN)]
    assert read == history  # exactly, and no other columns
    constants = json.loads((RUN / "constants.json").read_text())
    assert constants == checkpoint(RUN)["constants"]
    given = dict(flag[2:].split("=") for flag in small(data_dir=data_dir, **LEARNS))
    assert all(str(constants[name.upper().replace("-", "_")]) == given[name] for name in given)
    assert constants["SEED"] == 42 and len(constants) == len(vars(script.parse_constants([])[0]))


def test_each_run_has_its_own_folder_and_seed(data_dir, main, monkeypatch):
    """And a figure of the runs so far."""
    drawn = []
    monkeypatch.setattr(
        script, "plot_evolution", lambda runs, path: drawn.append((len(runs), path))
    )
    code, out, error = main(*small(data_dir=data_dir, runs=3, seed=7, **LEARNS))
    assert code == 0, error
    folders = [RUN.with_name(f"version_{number}") for number in range(3)]
    assert drawn == [(1 + n, folder / "evolution.png") for n, folder in enumerate(folders)]
    exact = np.array([accuracy_of_file(folder, data_dir) for folder in folders])
    shown = re.findall(r"Final Test Accuracy .*: ([\d.]+)%", out)
    assert shown == [f"{accuracy:.2f}" for accuracy in exact]
    assert len(set(exact)) > 1  # or this test shows little
    mean = f"{exact.mean():.2f} ± {exact.std(ddof=1):.2f}%"
    assert out.endswith(f"Mean Test Accuracy of 3 runs: {mean}\n")
    for number, folder in enumerate(folders):
        assert checkpoint(folder)["constants"]["SEED"] == 7 + number and len(rows(folder)) == 3
    main(*small(data_dir=data_dir, seed=8, **LEARNS))
    same_end(SECOND, RUN.with_name("version_3"))


def test_the_copy_is_of_the_script_as_it_ran(data_dir, main):
    """Its bytes when it was read, though it is edited before the run's folder is made."""
    text = SCRIPT.read_bytes().replace(b"SEED = 42", b"SEED = 43\r")
    module, path = as_module(text), Path("edited.py")
    module.plot_evolution = lambda *_: path.write_text("# edited")  # before the second run's folder
    path.write_text("# edited")
    code, out, error = main(*small(data_dir=data_dir, runs=2, iterations=4), module=module)
    assert code == 0 and "seed 43\n" in out, error
    assert all((folder / SCRIPT.name).read_bytes() == text for folder in (RUN, SECOND))


def test_without_matplotlib(data_dir, main, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, error = main(*small(data_dir=data_dir))
    assert code == 0 and "pip install matplotlib" in out and "Evolution finished." in out, error
    assert set(os.listdir(RUN)) == FILES - {"evolution.png"}


def test_real_mnist_learns(real_mnist, main):
    """78 %, 82 and 81 with seeds 43 and 44; 70 without deskewing, 61 without crossover.

    50 without competition, 8 without mutation. The default σ is for runs 60 times as long.
    """
    flags = ["--iterations=1500", "--mutation-std=0.02", "--subset-size=2000", "--subset-every=200"]
    code, out, error = main(*flags, f"--data-dir={real_mnist}", "--accelerator=cpu")
    assert code == 0 and "60,000 + 10,000 images of MNIST" in out, error
    assert float(re.search(r"best model: ([\d.]+)%", out)[1]) > 74


# --- What stops a run, and what does not ---
def test_an_output_folder_that_cannot_be_made(data_dir, main):
    Path("file").touch()
    code, _, error = main(*small(data_dir=data_dir, output_dir="file"))
    assert code == 1 and one_line(error, "file/m2n2_mnist", "OUTPUT_DIR")


REMEDIES = {
    "held": "Permission denied. See that you may write there and that no other program holds",
    "full": "No space left on device. Make room.",
}


def spoiled(how: str, file: str, iteration: int) -> AbstractContextManager:
    """After so many children the file cannot be written, once."""

    def held() -> None:  # as by a virus scanner or a spreadsheet
        raise PermissionError(errno.EACCES, "Permission denied")

    if how == "held":
        return at(os, "replace", held, iteration, file=f"{RUN}/{file}")
    return at(M2N2, "_measure", lambda: full(file), iteration)


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("how", REMEDIES)
@pytest.mark.parametrize("file", ["metrics.csv", "best_model.pt", "checkpoint.pt"])
def test_a_row_that_cannot_be_written(file, how, data_dir, main):
    """It is said once, and the next row makes it good."""
    with spoiled(how, file, iteration=40):
        code, out, error = main(*small(data_dir=data_dir))
    assert code == 0 and "Evolution finished." in out, error
    (line,) = [line for line in (out + error).splitlines() if "could not be written" in line]
    assert line.startswith(f"{RUN}/{file} could not be written: {REMEDIES[how]}")
    assert main(*small(data_dir=data_dir))[0] == 0
    same_end(RUN, SECOND)


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("how", REMEDIES)
def test_an_end_that_cannot_be_written(how, data_dir, main):
    """One message with what helps; the row before stays whole, and the run can go on from it."""
    with spoiled(how, "checkpoint.pt", iteration=60):
        code, out, error = main(*small(data_dir=data_dir))
    assert code == 1 and "Evolution finished." not in out and "Traceback" not in error
    message = error[error.index("Error: ") :]
    assert one_line(message, f"{RUN}/checkpoint.pt could not be written: {REMEDIES[how]}")
    assert not list(RUN.glob("*.tmp")) and checkpoint(RUN)["m2n2"]["iteration"] == 40
    assert main(f"--resume={RUN}")[0] == 0
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)


def test_a_disk_that_became_read_only(monkeypatch, tmp_path):
    """Its message keeps its remedy, though what was begun cannot be removed either."""

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    says = r"metrics\.csv could not be written: Read-only file system\. See that you may write"
    with pytest.raises(OSError, match=says):
        script.write_whole(tmp_path / "metrics.csv", b"")
