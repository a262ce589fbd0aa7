"""A run as a user starts it: what it prints, the files it leaves, and what it says where it cannot go on."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import RUN, SCRIPT, SECOND, as_module, at_call, checkpoint, rows, run_script, same_end, small, write_mnist

import m2n2_mnist as script
from m2n2_mnist import MLP

LEARNS = {"init_std": 0.3, "mutation_std": 0.1, "prior_std": 0}  # so much in 60 children that accuracies differ
FILES = {"metrics.csv", "hparams.yaml", "best_model.pt", "checkpoint.pt", "evolution.png", "m2n2_mnist.py"}


def accuracy_of_file(folder: Path, data_dir: Path) -> float:
    """Test accuracy in % of best_model.pt, as a reader of the file would work it out."""
    data = script.MNISTDataModule(data_dir, deskew=False, crop_size=28, image_size=7)
    data.setup()
    model = MLP(49, 8)
    model.load_state_dict(torch.load(folder / "best_model.pt", weights_only=True))
    predictions = [model(image[None]).argmax().item() for image in data.test_images]
    return 100 * np.mean(predictions == data.test_labels.numpy())


def test_output_and_files(data_dir: Path) -> None:
    run = run_script(*small(data_dir=data_dir, **LEARNS))
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "M2N2 on cpu, 1 process(es); 300 + 60 images of MNIST; seed 42"
    assert re.fullmatch(r"60 children in \d+\.\d s, [\d.]+ a second", lines[1])
    assert re.fullmatch(r"Test accuracy of the archive as an ensemble: \d+\.\d\d%", lines[2])
    assert lines[3:5] == [f"Files: {RUN}", "Evolution finished."]
    assert lines[5:] == [f"Final Test Accuracy of the best model: {accuracy_of_file(RUN, data_dir):.2f}%"]

    history, measured = rows(RUN), checkpoint(RUN)["m2n2"]["history"]
    bars = [bar for bar in re.split(r"[\r\n]", run.stderr) if bar.strip()]
    assert all(bar.startswith("Evolving Models:") for bar in bars)
    assert "  0%" in bars[0] and "100%" in bars[-1] and "60/60" in bars[-1]
    assert f"best_fitness={measured[-1]['best_fitness']:.0f}" in bars[-1]
    assert all(f"{name}={measured[-1][name]:.2%}" in bars[-1] for name in ("train_acc", "test_acc"))

    assert set(os.listdir(RUN)) == FILES and (RUN / "evolution.png").read_bytes().startswith(b"\x89PNG")
    columns = {"iteration", "best_fitness", "train_acc", "test_acc", "coverage", "diversity", "acceptance"}
    assert set(history[0]) == columns | {"step"}  # which Lightning adds
    assert [row["iteration"] for row in measured] == [20, 40, 60]
    for row, expected in zip(history, measured, strict=True):
        assert {name: float(row[name]) for name in columns} == pytest.approx(expected)
    constants = yaml.safe_load((RUN / "hparams.yaml").read_text())
    assert set(constants) == set(script.CONSTANTS) and constants["SEED"] == 42
    given = (flag[2:].split("=") for flag in small(data_dir=data_dir))
    assert all(str(constants[name.replace("-", "_").upper()]) == value for name, value in given)


@pytest.mark.usefixtures("no_figure")
def test_each_run_has_its_own_folder_and_seed(data_dir: Path, main: Callable) -> None:
    code, out, error = main(*small(data_dir=data_dir, runs=3, seed=7, **LEARNS))
    assert code == 0, error
    folders = [RUN.with_name(f"version_{number}") for number in range(3)]
    exact = np.array([accuracy_of_file(folder, data_dir) for folder in folders])
    assert re.findall(r"Final Test Accuracy .*: ([\d.]+)%", out) == [f"{accuracy:.2f}" for accuracy in exact]
    assert len(set(exact)) > 1  # or this test shows little
    assert out.endswith(f"Mean Test Accuracy of 3 runs: {exact.mean():.2f} ± {exact.std(ddof=1):.2f}%\n")
    for number, folder in enumerate(folders):
        assert yaml.safe_load((folder / "hparams.yaml").read_text())["SEED"] == 7 + number
        assert len(rows(folder)) == 3
    main(*small(data_dir=data_dir, seed=8, **LEARNS))
    same_end(SECOND, RUN.with_name("version_3"))


def test_the_copy_is_of_the_script_as_it_ran(data_dir: Path, main: Callable) -> None:
    """Its bytes when it was read, though it is edited before the run's folder is made."""
    text = SCRIPT.read_bytes().replace(b"SEED = 42", b"SEED = 43\r")
    module, path = as_module(text), Path("edited.py")
    module.plot_evolution = lambda *_: path.write_text("# edited")  # and before the second run's
    path.write_text("# edited")
    code, out, error = main(*small(data_dir=data_dir, runs=2, iterations=4), module=module)
    assert code == 0 and "seed 43\n" in out, error
    assert all((folder / path).read_bytes() == text for folder in (RUN, SECOND))


@pytest.mark.usefixtures("no_figure")
def test_two_threads_give_the_same_bits_twice(tmp_path: Path, main: Callable) -> None:
    """On data large enough for PyTorch to split each operation over them."""
    data = write_mnist(tmp_path / "data", train=6_000)
    torch.set_num_threads(2)
    codes = [main(*small(data_dir=data, image_size=14, hidden_dim=64, iterations=40))[0] for _ in range(2)]
    torch.set_num_threads(1)
    assert codes == [0, 0]
    same_end(RUN, SECOND)


def test_without_matplotlib(data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, error = main(*small(data_dir=data_dir))
    assert code == 0 and "pip install matplotlib" in out and "Evolution finished." in out, error
    assert set(os.listdir(RUN)) == FILES - {"evolution.png"}


def test_real_mnist_learns(real_mnist: Path, main: Callable) -> None:
    """62 %, 61 with seeds 43 and 44; 55 without mirroring, 9 without mutation."""
    code, out, error = main(f"--data-dir={real_mnist}", "--iterations=1000", "--accelerator=cpu")
    assert code == 0 and "60,000 + 10,000 images of MNIST" in out, error
    assert float(re.search(r"best model: ([\d.]+)%", out)[1]) > 58


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent(data_dir: Path, main: Callable) -> None:
    code, out, error = main(*small(data_dir=data_dir, accelerator="cuda"))
    assert code == 1 and not out and "ACCELERATOR is 'cuda'" in error and "'auto' or 'cpu'" in error


def test_unwritable_output(data_dir: Path, main: Callable) -> None:
    Path("file").touch()
    code, _, error = main(*small(data_dir=data_dir, output_dir="file"))
    assert code == 1 and "file/m2n2_mnist" in error and "OUTPUT_DIR" in error and "Traceback" not in error


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("file", ["checkpoint.tmp", "metrics.csv"])
def test_a_disk_that_fills_up(file: str, data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last whole checkpoint stays, and the run goes on from it once there is room."""

    def fill_up() -> None:
        (RUN / file).unlink(missing_ok=True)
        (RUN / file).symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        at_call(patch, script.M2N2, "_mutate", 30, fill_up)
        code, out, error = main(*small(data_dir=data_dir))
    assert code == 1 and "No space left on device" in error and "Evolution finished." not in out
    assert checkpoint(RUN)["m2n2"]["iteration"] == 20
    assert str(RUN) in error and "RESUME" in error
    (RUN / file).unlink(missing_ok=True)
    assert main(f"--resume={RUN}")[0] == 0
    main(*small(data_dir=data_dir))
    same_end(RUN, SECOND)
