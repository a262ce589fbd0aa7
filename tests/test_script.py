"""The script as a user runs it: output, files, constants, interruption and resumption."""

import csv
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_script, small, spawn, write_mnist

import m2n2_mnist as script
from m2n2_mnist import MLP

RUN = Path("runs/m2n2_mnist/version_0")


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same_end(one: Path, two: Path) -> None:
    """Bit for bit the same archive, random state, metrics and best model."""
    first, second = checkpoint(one)["m2n2"], checkpoint(two)["m2n2"]
    assert torch.equal(first["archive"], second["archive"])
    assert torch.equal(first["generator"], second["generator"])
    assert first["history"] == second["history"] and first["iteration"] == second["iteration"]
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()
    models = [torch.load(folder / "best_model.pt", weights_only=True) for folder in (one, two)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


# A whole run


def test_output_and_files(data_dir: Path) -> None:
    run = run_script(*small(data_dir=data_dir), env={**os.environ, "COLUMNS": "80"})
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert "MLP of 490 parameters; 300 + 60 images" in lines[0] and "seed 42" in lines[0]
    assert re.fullmatch(r"Test accuracy of the archive as an ensemble: \d+\.\d\d%", lines[1])
    assert re.fullmatch(r"60 children in \d+\.\d s, [\d.]+ a second", lines[2])
    assert lines[3] == f"Files: {RUN}" and lines[4] == "Evolution finished."
    assert re.fullmatch(r"Final Test Accuracy of the best model: \d+\.\d\d%", lines[5])
    assert len(lines) == 6
    assert re.search(r"Evolving Models: 100%.*best_fitness=[\d.]+, test_acc=[\d.]+%", run.stderr)
    files = {"metrics.csv", "hparams.yaml", "best_model.pt", "checkpoint.pt", "evolution.png"}
    assert set(os.listdir(RUN)) == files

    history = rows(RUN)
    assert [int(row["iteration"]) for row in history] == [20, 40, 60]
    columns = {"iteration", "best_fitness", "train_acc", "test_acc", "coverage", "acceptance"}
    assert columns <= set(history[0])
    assert lines[5].endswith(f"{float(history[-1]['test_acc']):.2%}")

    constants = yaml.safe_load((RUN / "hparams.yaml").read_text())
    assert constants["HIDDEN_DIM"] == 8 and constants["SEED"] == 42
    top = re.findall(r"^([A-Z_]+) = .*#", (ROOT / "m2n2_mnist.py").read_text(), re.M)
    assert set(constants) == set(top) - {"IDX_FILES"}

    model = MLP(49, 8)
    model.load_state_dict(torch.load(RUN / "best_model.pt", weights_only=True))
    data = script.MNISTDataModule(data_dir, 7)
    data.setup()
    right = (model(data.test_images).argmax(dim=1) == data.test_labels).float().mean().item()
    assert right == pytest.approx(float(history[-1]["test_acc"]), abs=0.05)  # evaluated in bf16
    assert (RUN / "evolution.png").read_bytes().startswith(b"\x89PNG")


def test_each_run_has_its_own_folder_and_seed(data_dir: Path, main) -> None:
    code, out, _ = main(*small(data_dir=data_dir, runs=3, seed=7))
    assert code == 0
    accuracies = [float(a) for a in re.findall(r"Final Test Accuracy .*: ([\d.]+)%", out)]
    assert len(accuracies) == 3
    folders = [RUN.with_name(f"version_{number}") for number in range(3)]
    exact = torch.tensor([100 * float(rows(folder)[-1]["test_acc"]) for folder in folders])
    assert accuracies == pytest.approx(exact.tolist(), abs=0.006)
    assert f"Mean Test Accuracy of 3 runs: {exact.mean():.2f} ± {exact.std():.2f}%" in out
    for number, folder in enumerate(folders):
        assert yaml.safe_load((folder / "hparams.yaml").read_text())["SEED"] == 7 + number
        assert len(rows(folder)) == 3
    main(*small(data_dir=data_dir, seed=8))
    same_end(RUN.with_name("version_1"), RUN.with_name("version_3"))


def test_ablations_and_scores(data_dir: Path, main) -> None:
    ends = []
    for flags in (
        {},
        {"use_crossover": "false"},
        {"use_split_point": "False"},
        {"use_attraction": False},
        {"alpha": 0},
        {"score": "correct"},
        {"temperature": 3},
    ):
        code, out, _ = main(*small(data_dir=data_dir, **flags))
        assert code == 0 and "Evolution finished." in out
        folder = RUN.with_name(f"version_{len(ends)}")
        ends.append(checkpoint(folder)["m2n2"]["archive"].sum().item())
    assert len(set(ends)) == 7, ends  # each does something


def test_precision(data_dir: Path, main) -> None:
    fitness = []
    for precision in ("32-true", "bf16-true"):
        main(*small(data_dir=data_dir, precision=precision))
        fitness.append(float(rows(RUN.with_name(f"version_{len(fitness)}"))[0]["best_fitness"]))
    assert fitness[0] != fitness[1] and fitness[0] == pytest.approx(fitness[1], rel=0.02)


def test_specialists(data_dir: Path, main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation, evolve = [], script.M2N2.evolve

    def record(m2n2: script.M2N2, *arguments: object) -> None:
        mutation.extend((m2n2.mutation_std, m2n2.final_mutation_std))
        evolve(m2n2, *arguments)

    monkeypatch.setattr(script.M2N2, "evolve", record)
    data = write_mnist(tmp_path / "more", train=20_000)
    flags = {"start": "specialists", "hidden_dim": 64, "image_size": 14, "test_every": 1}
    code, out, error = main(*small(data_dir=data, **flags))
    assert code == 0 and "Evolution finished." in out
    first = rows(RUN)[0]
    assert float(first["train_acc"]) > 0.45  # a half, each
    assert float(first["coverage"]) > 0.9  # and both together nearly all
    assert "GPU" not in error and "Tip" not in error  # Lightning's chatter
    assert mutation == [0, 0]  # merged, never mutated
    assert not os.path.exists("lightning_logs")


def test_without_matplotlib(data_dir: Path, main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = main(*small(data_dir=data_dir))
    assert code == 0 and "pip install matplotlib" in out and "Evolution finished." in out
    assert not (RUN / "evolution.png").exists()


def test_figure_is_whole_or_not_there(tmp_path: Path) -> None:
    row = {"iteration": 20, "coverage": 0.5, "test_acc": 0.25}
    with pytest.raises(script.UserError, match=r"evolution\.png could not be written"):
        script.plot_evolution([[row]], torch.rand(3, 10), tmp_path / "absent" / "evolution.png")
    script.plot_evolution([[row], [row]], torch.rand(3, 10), tmp_path / "evolution.png")
    assert os.listdir(tmp_path) == ["evolution.png"]


def test_real_mnist_learns(real_mnist: Path, main) -> None:
    """After 1,000 children no broken loop is above 30%: the first random models are at 10%."""
    code, out, _ = main(f"--data-dir={real_mnist}", "--iterations=1000", "--accelerator=cpu")
    assert code == 0
    assert float(re.search(r"best model: ([\d.]+)%", out)[1]) > 35


# Constants


def test_help_explains_every_constant(main) -> None:
    code, out, _ = main("--help")
    assert code == 0
    for flag in ("--iterations", "--seed", "--score", "--use-attraction", "--resume"):
        assert flag in out
    assert "probability | correct" in " ".join(out.split()) and "default: 50000" in out


BAD = """archive-size=1 archive-size=2.5 archive-size=many iterations=0 iterations=-5 score=accuracy
test-every=0 checkpoint-every=0 runs=0 seed=-1 seed=4294967296 hidden-dim=0 image-size=0
image-size=29 alpha=-0.1 alpha=nan alpha=3.1 init-std=0 init-std=nan mutation-std=-1
mutation-std=inf mutation-std=nan final-mutation-std=-0.1 temperature=0 start=middle
use-attraction=2 use-crossover=maybe accelerator=tpu precision=16-true"""


@pytest.mark.parametrize("bad", BAD.split())
def test_bad_constant(bad: str, main) -> None:
    name, value = bad.split("=")
    code, out, error = main(f"--{bad}")
    assert code == 2 and not out and not os.listdir()
    constant = name.upper().replace("-", "_")
    accepted = re.search(rf"{constant} is '{re.escape(value)}', accepted is \[(.+)\]", error)
    assert accepted and "Traceback" not in error


@pytest.mark.parametrize("value", [None, "many", 0, 2.5, True])
def test_bad_constant_in_the_file(value: object, main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ITERATIONS", value)
    code, _, error = main()
    assert code == 2 and "ITERATIONS is" in error and "[1, inf]" in error


def test_unknown_flag(main) -> None:
    code, _, error = main("--iteration=5")
    assert code == 2 and "--iteration=5" in error


def test_constants_are_the_defaults() -> None:
    constants = vars(script.parse_constants([]))
    assert constants == {name: getattr(script, name) for name in constants}
    changed = vars(script.parse_constants(["--alpha", "1", "--use-crossover", "FALSE"]))
    assert changed["ALPHA"] == 1.0 and changed["USE_CROSSOVER"] is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent(data_dir: Path, main) -> None:
    code, _, error = main(*small(data_dir=data_dir, accelerator="cuda"))
    assert code == 1 and "ACCELERATOR is 'cuda'" in error and "'auto' or 'cpu'" in error


def test_unwritable_output(data_dir: Path, main) -> None:
    Path("file").touch()
    code, _, error = main(*small(data_dir=data_dir, output_dir="file"))
    assert code == 1 and "file/m2n2_mnist" in error and "OUTPUT_DIR" in error


# Resume


def test_interrupted_and_resumed(data_dir: Path, main, tmp_path: Path) -> None:
    """SIGTERM to a real process, then the very command it printed."""
    flags = small(data_dir=data_dir, iterations=4_000, seed=3, runs=2)
    process = spawn(*flags)
    wait_for_iteration(process, 30)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    iteration = int(re.search(r"Evolution interrupted at iteration (\d+)\.\n", out)[1])
    assert 30 <= iteration < 4_000 and checkpoint(RUN)["m2n2"]["iteration"] == iteration
    assert re.match(r"Final Test Accuracy of the best model: \d+", out.splitlines()[-1])
    assert {"best_model.pt", "evolution.png"} <= set(os.listdir(RUN))

    command = shlex.split(re.search(r"To go on: (.+)", out)[1])
    assert command[:2] == ["python", str(ROOT / "m2n2_mnist.py")] and f"--resume={RUN}" in command
    code, out, _ = main(*command[2:])
    assert code == 0 and f"{4_000 - iteration:,} children in" in out and "finished." in out
    assert not RUN.with_name("version_1").exists()
    main(*flags)
    same_end(RUN, RUN.with_name("version_1"))


def wait_for_iteration(process: subprocess.Popen, iteration: int) -> None:
    """Until the checkpoint of at least that iteration is there."""
    path, end = RUN / "checkpoint.pt", time.monotonic() + 120
    while not path.exists() or checkpoint(RUN)["m2n2"]["iteration"] < iteration:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    """While the child and the final measurements, seconds long here, are still under way."""
    data = write_mnist(tmp_path / "data", train=20_000)
    process = spawn(*small(data_dir=data, image_size=28, hidden_dim=3_000, checkpoint_every=1))
    wait_for_iteration(process, 1)
    while process.poll() is None:  # two within one long operation count as one
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    out, _ = process.communicate()
    assert process.returncode == -signal.SIGINT and "Final Test Accuracy" not in out
    assert checkpoint(RUN)["m2n2"]["iteration"] >= 1


def test_ctrl_c_exits_with_130(data_dir: Path) -> None:
    """Before the first row of metrics.csv, too."""
    process = spawn(*small(data_dir=data_dir, iterations=10**6, test_every=10**6))
    wait_for_iteration(process, 10)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Evolution interrupted at iteration" in out, error
    assert {"best_model.pt", "evolution.png"} <= set(os.listdir(RUN))


def kill_and_resume(data_dir: Path, kills: int, seed: int) -> None:
    """SIGKILL at random times; the survivor must end as one that was never disturbed."""
    random.seed(seed)
    flags = small(data_dir=data_dir, iterations=3_000, checkpoint_every=7, test_every=10)
    subprocess_kills = 0
    while subprocess_kills < kills:
        resume = [f"--resume={RUN}"] if (RUN / "checkpoint.pt").exists() else []
        process = spawn(*flags, *resume)
        if not resume:
            wait_for_iteration(process, 0)
        else:
            before = (RUN / "checkpoint.pt").stat().st_mtime_ns
            while (RUN / "checkpoint.pt").stat().st_mtime_ns == before:
                assert process.poll() is None
                time.sleep(0.001)
        time.sleep(random.random() * 0.2)
        if process.poll() is not None:
            break  # it got to its end before the kill
        process.kill()
        process.communicate()
        subprocess_kills += 1
        checkpoint(RUN)  # whole
    last = run_script(*flags, f"--resume={RUN}")
    assert last.returncode == 0, last.stderr
    assert "deleted" not in last.stderr  # as Lightning says of metrics.csv, which is written anew
    run_script(*flags, "--output-dir=undisturbed")
    same_end(RUN, "undisturbed" / RUN.relative_to("runs"))
    assert subprocess_kills >= min(kills, 2)


def test_killed_and_resumed(data_dir: Path) -> None:
    kill_and_resume(data_dir, kills=2, seed=0)


@pytest.mark.slow
def test_killed_twenty_times(data_dir: Path) -> None:
    kill_and_resume(data_dir, kills=20, seed=1)


def test_finished_run_resumed_and_extended(data_dir: Path, main) -> None:
    main(*small(data_dir=data_dir))
    before = checkpoint(RUN)["m2n2"]
    code, out, _ = main(*small(data_dir=data_dir, resume=RUN))
    assert code == 0 and "Already finished" in out and "Evolution finished." in out
    assert torch.equal(checkpoint(RUN)["m2n2"]["archive"], before["archive"])
    assert len(rows(RUN)) == 3
    code, _, _ = main(*small(data_dir=data_dir, resume=RUN, iterations=100))
    assert code == 0 and [int(row["iteration"]) for row in rows(RUN)] == [20, 40, 60, 80, 100]


CHANGES = {"hidden_dim": 9, "image_size": 14, "score": "correct", "archive_size": 6, "alpha": 0.5}
CHANGES |= {"mutation_std": 0.5, "seed": 1, "use_attraction": False, "precision": "32-true"}


def test_resume_of_another_experiment(data_dir: Path, main, tmp_path: Path) -> None:
    main(*small(data_dir=data_dir, precision="bf16-true"))
    before = (RUN / "checkpoint.pt").read_bytes()
    for name, value in CHANGES.items():
        flags = {"resume": RUN, "precision": "bf16-true"} | {name: value}
        code, _, error = main(*small(data_dir=data_dir, **flags))
        assert code == 1 and f"{name.upper()} is {value!r}" in error
    other = write_mnist(tmp_path / "other", seed=1)
    for path in (data_dir / "MNIST" / "raw").iterdir():  # other images in the same place
        path.write_bytes((other / "MNIST" / "raw" / path.name).read_bytes())
    code, _, error = main(*small(data_dir=data_dir, resume=RUN, precision="bf16-true"))
    assert code == 1 and "DATA_DIR" in error
    assert (RUN / "checkpoint.pt").read_bytes() == before
    code, _, error = main(*small(data_dir=data_dir, resume=RUN, runs=2))
    assert code == 2 and "RUNS is 2" in error


class Malicious:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("hacked",))


@pytest.mark.parametrize("how", ["absent", "empty", "truncated", "text", "code", "foreign", "list"])
def test_bad_checkpoint(how: str, data_dir: Path, main) -> None:
    RUN.mkdir(parents=True)
    path = RUN / "checkpoint.pt"
    if how == "truncated":
        main(*small(data_dir=data_dir))
        path = RUN.with_name("version_1") / "checkpoint.pt"
        path.write_bytes(path.read_bytes()[:-1_000])
    elif how in ("empty", "text"):
        path.write_text("" if how == "empty" else "no checkpoint")
    elif how != "absent":
        torch.save({"code": Malicious(), "foreign": {"weights": 1}, "list": [1]}[how], path)
    code, _, error = main(*small(data_dir=data_dir, resume=path.parent))
    assert code == 1 and str(path) in error and "Traceback" not in error
    assert "RESUME" in error and not os.path.exists("hacked")


def test_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    script.save_whole(partial(torch.save, {"a": 1}), path)

    def fail(self: Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(script.UserError, match="No space left"):
        script.save_whole(partial(torch.save, {"a": 2}), path)
    assert torch.load(path, weights_only=True) == {"a": 1} and os.listdir(tmp_path) == [path.name]
