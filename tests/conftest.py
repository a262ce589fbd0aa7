"""Data like MNIST but small, the real one, the script as a user runs it, and what a run left."""

import csv
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "m2n2_mnist.py"
sys.path.insert(0, str(ROOT))

import m2n2_mnist as script  # noqa: E402
from m2n2_mnist import M2N2, MLP  # noqa: E402

torch.set_num_threads(1)  # the small tensors here gain nothing from more
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background process ignores
os.environ["OMP_NUM_THREADS"] = "1"  # in processes of their own too

RUN = Path("runs/m2n2_mnist/version_0")
SECOND = RUN.with_name("version_1")


# --- Data ---
def idx(array: np.ndarray) -> bytes:
    """The array as an IDX file: magic number, big-endian sizes, bytes."""
    header = (0x0800 + array.ndim).to_bytes(4, "big")
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(folder: Path, train: int = 300, test: int = 60, dataset: str = "MNIST") -> Path:
    """Learnable stand-ins for the four files: digit d is a bright bar in row 2 d + 4, and noise."""
    random, raw = np.random.default_rng(0), folder / dataset / "raw"
    raw.mkdir(parents=True)
    for split, examples in (("train", train), ("t10k", test)):
        labels = (np.arange(examples) % 10).astype(np.uint8)
        images = random.integers(0, 64, (examples, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4 : 2 * label + 6] = 255
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_mnist(tmp_path / "data")


@pytest.fixture(scope="session")
def real_mnist() -> Path:
    """The folder with the real MNIST, unpacked as the README says."""
    folder = Path(os.environ.get("MNIST_DIR", ROOT / "data"))
    if not (folder / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        pytest.skip(f"the real MNIST is not unpacked in {folder}; MNIST_DIR may say where it is")
    return folder.absolute()


SMALL = {"archive_size": 4, "init_std": 0.5, "mutation_std": 0.1, "prior_std": 0.0, "seed": 1}


def make_m2n2(
    examples: int = 40, hidden: int = 5, dtype: torch.dtype = torch.float32, **settings: object
) -> M2N2:
    """An M2N2 on small random data that is learnable: 6 values, of 10 classes."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(examples, 6, generator=random)
    labels = (images @ torch.randn(6, 10, generator=random)).argmax(dim=1)
    images = images.to(dtype)
    return M2N2(MLP(6, hidden), images, labels, images[::2], labels[::2], **SMALL | settings)


def all_models(m2n2: M2N2) -> torch.Tensor:
    """The parameters of the archive and, in the last row, of the child: the state itself."""
    return m2n2._models


def all_scores(m2n2: M2N2) -> torch.Tensor:
    """Their scores likewise."""
    return m2n2._scores


# --- The script as a user runs it ---
@pytest.fixture(autouse=True)
def _own_folder_and_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(1)  # again, where a test set another


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of many runs: it takes five times as long as the rest of a short one."""
    monkeypatch.setattr(script, "plot_evolution", lambda *_: None)


def flag_of(name: str) -> str:
    return f"--{name.lower().replace('_', '-')}"


def small(**settings: object) -> list[str]:
    """Flags of a run of a second on `write_mnist`'s data, with rows in the midst of a subset."""
    defaults = {"iterations": 60, "test_every": 20, "subset_size": 100, "subset_every": 25}
    defaults |= {"image_size": 7, "crop_size": 28, "deskew": False, "hidden_dim": 8}
    defaults |= {"archive_size": 5, "accelerator": "cpu"}
    return [f"{flag_of(name)}={value}" for name, value in (defaults | settings).items()]


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen]]:
    """The script in a process of its own, in the current folder; the test's end is its end too."""
    processes = []

    def start(
        *flags: str, launcher: Sequence[str] = (), path: Path = SCRIPT, **options: object
    ) -> subprocess.Popen:
        command = [sys.executable, *launcher, path, *flags]
        options |= dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen(command, text=True, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.terminate()  # torchrun ends its own processes then; SIGKILL would leave them
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def as_module(text: bytes) -> ModuleType:
    """An edited copy of the script as a module, of edited.py in the current folder."""
    path = Path("edited.py")
    path.write_bytes(text)
    module = ModuleType("edited")
    module.__file__ = str(path)
    exec(compile(text, path, "exec"), vars(module))
    return module


@pytest.fixture
def main(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """The script's `main` in this process: returns exit code, standard output and error."""

    def call(*flags: str, module: ModuleType = script) -> tuple[int, str, str]:
        capsys.readouterr()  # what a call before left, which ended otherwise
        try:
            code = module.main(flags) or 0
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # Python prints it and makes it a 1
                print(code, file=sys.stderr)
                code = 1
        return (code, *capsys.readouterr())

    return call


def one_line(error: str, *parts: str) -> bool:
    """Whether the message is a single line with these parts."""
    return error.endswith("\n") and error.count("\n") == 1 and all(part in error for part in parts)


# --- What a run left ---
def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same_end(one: Path, two: Path) -> None:
    """Bit for bit the same state, metrics and best model, and no other files."""
    states = [checkpoint(folder)["m2n2"] for folder in (one, two)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()
    models = [torch.load(folder / "best_model.pt", weights_only=True) for folder in (one, two)]
    torch.testing.assert_close(*models, rtol=0, atol=0)
    assert set(os.listdir(one)) == set(os.listdir(two))


# --- Moments of a run ---
@contextmanager
def at(
    owner: object,
    name: str,
    act: Callable[[], None],
    iteration: int,
    seed: int = 42,
    file: str = "",
) -> Iterator[None]:
    """`act` once: where this is called, for this file, in that run with that many children."""
    function, m2n2_of, runs, done = getattr(owner, name), script.m2n2_of, [], []

    def begun(constants: Namespace, examples: Sequence[torch.Tensor]) -> M2N2:
        runs.append((constants.SEED, m2n2_of(constants, examples)))
        return runs[-1][1]

    def watched(*arguments: object, **named: object) -> object:
        now = [(run_seed, m2n2.iteration) for run_seed, m2n2 in runs[-1:]]
        if now == [(seed, iteration)] and file in str(arguments) and not done:
            done.append(name)
            act()
        return function(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "m2n2_of", begun)
        patch.setattr(owner, name, watched)
        yield


def full(name: str) -> None:
    """Leave no room on the disk for what the run writes next to this file."""
    (RUN / f"{name}.{os.getpid()}.tmp").symlink_to("/dev/full")


def wait_for_iteration(process: subprocess.Popen, iteration: int) -> None:
    """Until the checkpoint of at least that iteration is there."""
    path, end = RUN / "checkpoint.pt", time.monotonic() + 300
    while not path.exists() or checkpoint(RUN)["m2n2"]["iteration"] < iteration:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end  # or the process hangs
        time.sleep(0.01)
