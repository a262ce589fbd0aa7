"""The data module: its tensors, deskewing, the data sets of MNIST's family, and files that cannot be had or read."""

import contextlib
import gzip
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, at_call, idx, small, write_mnist
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torchvision import datasets
from torchvision.datasets import MNIST

from m2n2_mnist import MLP, MNISTDataModule, UserError, deskew

RAW = Path("MNIST", "raw")
NAMES = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for dataset in ("MNIST", "FashionMNIST", "KMNIST"):
        monkeypatch.setattr(getattr(datasets, dataset), "mirrors", ["http://127.0.0.1:9/"])  # refused at once


@contextlib.contextmanager
def as_nobody(tmp_path: Path) -> Iterator[None]:
    """Root may read and write everything."""
    root = os.geteuid() == 0
    if root:
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def load(folder: Path, **settings: object) -> MNISTDataModule:
    data = MNISTDataModule(folder, **settings)
    data.prepare_data()
    data.setup()
    return data


def refused(folder: Path) -> str:
    """What is said: one message with the folder and both remedies."""
    with pytest.raises(UserError) as caught:
        load(folder)
    assert explains(str(caught.value), folder)
    return str(caught.value)


def explains(error: str, folder: Path) -> bool:
    remedies = (f"Delete {folder / RAW} and run again", "put the four files there", "DATA_DIR")
    return "MNIST could not be downloaded or read: " in error and all(remedy in error for remedy in remedies)


# --- What the tensors should be, in NumPy ---
def windows(images: np.ndarray, crop: int, size: int) -> np.ndarray:
    """The mean of each window of the central square: blocks, or where those do not fit the pixels they touch."""
    edge = (28 - crop) // 2
    images, means = images[:, edge : edge + crop, edge : edge + crop] / 255, np.empty((len(images), size, size))
    bounds = [(i * crop // size, -(-(i + 1) * crop // size)) for i in range(size)]
    for row, (top, bottom) in enumerate(bounds):
        for column, (left, right) in enumerate(bounds):
            means[:, row, column] = images[:, top:bottom, left:right].mean(axis=(1, 2))
    return means[:, None]


def upright(image: np.ndarray) -> np.ndarray:
    """LeCun's deskewing in loops: row y is read k (y - centre) further right, bilinearly between two pixels."""
    side, total = len(image), image.sum()
    ys, xs = np.mgrid[:side, :side]
    centre_y, centre_x = ((image * axis).sum() / total for axis in (ys, xs))
    k = (image * (xs - centre_x) * (ys - centre_y)).sum() / (image * (ys - centre_y) ** 2).sum()
    out = np.zeros_like(image)
    for y in range(side):
        for x in range(side):
            source = x + np.clip(k, -1, 1) * (y - centre_y)
            left = int(np.floor(source))
            for pixel, weight in ((left, left + 1 - source), (left + 1, source - left)):
                if 0 <= pixel < side:
                    out[y, x] += weight * image[y, pixel]
    return out


def bar(slope: float, side: int = 28) -> torch.Tensor:
    """A bar 3 pixels wide through the middle that leans by `slope` pixels a row."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    middle = (side - 1) / 2
    inside = ((columns - middle - slope * (rows - middle)).abs() <= 1.5) & ((rows - middle).abs() < 9)
    return inside.float()[None, None]


def lean(image: torch.Tensor) -> float:
    """The k of the docstring."""
    rows, columns = torch.meshgrid(*[torch.arange(float(side)) for side in image.shape[-2:]], indexing="ij")
    dx, dy = ((axis - (image * axis).sum() / image.sum()) for axis in (columns, rows))
    return ((image * dx * dy).sum() / (image * dy * dy).sum()).item()


# --- Tensors ---
@pytest.mark.parametrize("deskewed", [False, True])
@pytest.mark.parametrize("crop, size", [(28, 1), (28, 7), (28, 28), (20, 10), (20, 20), (20, 8), (2, 2)])
def test_tensors(tmp_path: Path, crop: int, size: int, deskewed: bool) -> None:
    """Images that lean, by up to 1.8, off their middle; test images have a mean and deviation of their own."""
    ink = np.random.default_rng(0).random((40, 28, 28)) ** 2
    leaning = ink * np.concatenate([bar(slope)[0] for slope in np.linspace(-1.8, 1.8, 40)])
    folder, raw = write_mnist(tmp_path / "data", 40, 20), {"train": 200 * leaning, "t10k": 90 * leaning[::-2]}
    for split, images in raw.items():
        raw[split] = images.astype(np.uint8)
        (folder / RAW / f"{split}-images-idx3-ubyte").write_bytes(idx(raw[split]))
    data = load(folder, deskew=deskewed, crop_size=crop, image_size=size)
    assert data.train_labels.tolist() == [i % 10 for i in range(40)] and data.train_labels.dtype == torch.long
    if deskewed:
        raw = {split: np.stack([upright(image / 1.0) for image in images]) for split, images in raw.items()}
    train, test = (windows(images, crop, size) for images in raw.values())
    for images, expected in ((data.train_images, train), (data.test_images, test)):
        assert images.dtype == torch.float
        np.testing.assert_allclose(images, (expected - train.mean(axis=0)) / train.std(ddof=1), atol=2e-3)


def test_the_checksum_is_of_the_images_and_of_what_is_done_to_them(data_dir: Path) -> None:
    """Not of where they are, nor of the size of a batch."""
    same = load(data_dir).checksum, load(data_dir, batch_size=7).checksum
    settings = ({"deskew": False}, {"crop_size": 28}, {"image_size": 7})
    others = [load(data_dir, **setting).checksum for setting in settings]
    assert same[0] == same[1] and len({same[0], *others}) == 4


def test_real_mnist(real_mnist: Path) -> None:
    data = load(real_mnist, deskew=False, crop_size=28, image_size=28)
    assert data.train_images.shape == (60_000, 1, 28, 28) and len(data.test_images) == 10_000
    assert data.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test_labels.bincount().tolist()[:3] == [980, 1135, 1032]


def test_in_a_lightning_trainer(tmp_path: Path) -> None:
    """Its loaders, for a module of the user's own."""

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = MLP(14 * 14, 16)

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.mlp(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01)

    data = MNISTDataModule(write_mnist(tmp_path / "data", 1_000), "MNIST", False, 28, 14, batch_size=20)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    model = Classifier()
    Trainer(max_epochs=3, accelerator="cpu", enable_model_summary=False, **quiet).fit(model, data)
    right = [(model.mlp(images).argmax(dim=1) == labels) for images, labels in data.test_dataloader()]
    assert torch.cat(right).float().mean() > 0.9 and len(right) == 3
    first, second = (next(iter(data.train_dataloader()))[1].tolist() for _ in range(2))
    assert len(first) == 20 and first != second  # shuffled


# --- Deskewing ---
def test_a_bar_becomes_upright() -> None:
    for slope in (-0.9, -0.3, 0.5):
        leaning = bar(slope)
        result = deskew(leaning)
        assert abs(lean(leaning) - slope) < 0.1 and abs(lean(result)) < 0.05
        assert result.sum() == pytest.approx(leaning.sum().item(), rel=1e-3)  # no ink is lost
        assert (result.sum(dim=2) > 1).sum() <= 5  # columns, of the 3 that it is wide
    assert 0.6 < lean(deskew(bar(1.8))) < 1.1  # by 1 at most


def test_what_deskewing_leaves_as_it_is() -> None:
    """Without ink, upright, or of one row; one image does not change another."""
    row = torch.zeros(1, 1, 28, 28)
    row[..., 9, 4:20] = 1
    images = torch.cat([torch.zeros(1, 1, 28, 28), bar(0), row, bar(0.5)])
    torch.testing.assert_close(deskew(images)[:3], images[:3], atol=1e-4, rtol=0)
    torch.testing.assert_close(deskew(images)[3:], deskew(images[3:]))


# --- Data sets ---
@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("dataset", ["FashionMNIST", "KMNIST"])
def test_another_data_set(dataset: str, tmp_path: Path, main: Callable) -> None:
    data_dir = write_mnist(tmp_path / "data", dataset=dataset)
    code, out, error = main(*small(data_dir=data_dir, dataset=dataset.lower()))
    assert code == 0 and f"300 + 60 images of {dataset};" in out, error
    code, _, error = main(*small(data_dir=data_dir))  # MNIST's folder is another
    assert code == 1 and "MNIST could not be downloaded" in error


def test_other_images_in_the_place_of_mnists(data_dir: Path) -> None:
    """Fashion-MNIST's, usually: as many as MNIST's, so as long, and with another checksum."""
    images = np.full((10_000, 28, 28), 7, dtype=np.uint8)
    (data_dir / RAW / NAMES[2]).write_bytes(idx(images))
    (data_dir / RAW / NAMES[3]).write_bytes(idx(np.arange(10_000).astype(np.uint8) % 10))
    assert len(load(data_dir).test_images) == 10_000


@pytest.mark.usefixtures("no_figure")
def test_a_read_only_folder_with_a_strange_name(tmp_path: Path, main: Callable) -> None:
    folder, output = write_mnist(tmp_path / "größe 数 % {x} 'q'"), tmp_path / "läufe 1"
    main(*small(data_dir=folder))  # nobody may not be able to read what is imported late
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    output.mkdir()
    output.chmod(0o777)
    with as_nobody(tmp_path):
        code, out, error = main(*small(data_dir=folder, output_dir=output))
    assert code == 0 and f"Files: {output / RUN.relative_to('runs')}" in out, error


# --- Files that cannot be had or read ---
DAMAGE = {  # what a file is then
    "empty": lambda content: b"",
    "half unpacked": lambda content: content[: len(content) // 2],
    "cut in its header": lambda content: content[:6],
    "longer": lambda content: content + b"\0",
    "HTML": lambda content: b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>",
    "of another type": lambda content: content[:2] + b"\x0d" + content[3:],
    "compressed": gzip.compress,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file(data_dir: Path, how: str) -> None:
    for name in NAMES:
        path = data_dir / RAW / name
        content = path.read_bytes()
        path.write_bytes(DAMAGE[how](content))
        refused(data_dir)
        path.write_bytes(content)
    load(data_dir)  # whole again


OTHERS = {  # than MNIST's: of another size, labels of other classes (EMNIST's), and not one for each image
    "images": lambda array: array[:, 1:],
    "classes": lambda array: np.arange(len(array)) % 11,
    "labels": lambda array: array[1:],
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_not_mnist(data_dir: Path, what: str) -> None:
    for name in NAMES[0::2] if what == "images" else NAMES[1::2]:
        path = data_dir / RAW / name
        content = path.read_bytes()
        shape = (-1, 28, 28) if what == "images" else -1
        array = np.frombuffer(content, np.uint8, offset=16 if what == "images" else 8).reshape(shape)
        path.write_bytes(idx(OTHERS[what](array).astype(np.uint8)))
        refused(data_dir)
        path.write_bytes(content)


@pytest.mark.parametrize("missing", [NAMES, NAMES[2:3]])
def test_no_network(data_dir: Path, main: Callable, missing: list[str]) -> None:
    raw = data_dir / RAW
    for name in missing:
        (raw / name).unlink()
    before = sorted(os.listdir(raw))
    code, out, error = main(*small(data_dir=data_dir))
    assert code == 1 and not out and explains(error, data_dir) and "refused" in error and "Traceback" not in error
    assert sorted(os.listdir(raw)) == before and not os.path.exists("runs")


def compressed(raw: Path) -> list[tuple[str, str]]:
    """Put .gz files in the place of the four; torchvision's list of them with their MD5."""
    resources = []
    for name in NAMES:
        content = gzip.compress((raw / name).read_bytes())
        (raw / f"{name}.gz").write_bytes(content)
        (raw / name).unlink()
        resources.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
    return resources


def test_compressed_files_at_hand_are_used(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, raw = load(data_dir), data_dir / RAW
    monkeypatch.setattr(MNIST, "resources", compressed(raw))
    data = load(data_dir)
    assert data.checksum == expected.checksum and torch.equal(data.test_images, expected.test_images)
    (raw / NAMES[0]).unlink()
    (raw / f"{NAMES[0]}.gz").write_bytes(b"half a file")
    refused(data_dir)


def test_an_interrupted_unpacking(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves a part of a file, here of the last one, which is seen; what the message says mends it."""
    raw = data_dir / RAW
    monkeypatch.setattr(MNIST, "resources", compressed(raw))
    archives = {path: path.read_bytes() for path in raw.iterdir()}

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_call(patch, gzip.GzipFile, "read", 4, interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(data_dir)
    assert (raw / NAMES[3]).exists()
    refused(data_dir)
    shutil.rmtree(raw)
    raw.mkdir()
    for path, content in archives.items():
        path.write_bytes(content)
    assert len(load(data_dir).test_images) == 60


@pytest.mark.parametrize("closed", ["file", "folder", "new", "no folder"])
def test_no_permission(data_dir: Path, closed: str) -> None:
    """To read a file, to look into the folder, to make it; nor can it be made where a file is."""
    path = {"file": data_dir / RAW / NAMES[0], "folder": data_dir / RAW}.get(closed, data_dir)
    folder = {"new": data_dir / "new", "no folder": data_dir / RAW / NAMES[0]}.get(closed, data_dir)
    path.chmod(0o555 if path == data_dir else 0)
    with as_nobody(data_dir.parent):
        error = refused(folder)
    path.chmod(0o755)  # so that pytest can remove it
    reasons = {"folder": "Error downloading", "no folder": "Not a directory"}  # torchvision just sees no files there
    assert reasons.get(closed, "Permission denied") in error
