"""The data: their tensors, deskewing, MNIST's family, and files that cannot be had or read."""

import gzip
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, idx, small, write_mnist
from torchvision import datasets
from torchvision.datasets import MNIST

from m2n2_mnist import MNISTDataModule, deskew

RAW = Path("MNIST", "raw")
KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
NAMES = [f"{split}-{kind}" for split in ("train", "t10k") for kind in KINDS]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for dataset in ("MNIST", "FashionMNIST", "KMNIST"):  # refused at once
        monkeypatch.setattr(getattr(datasets, dataset), "mirrors", ["http://127.0.0.1:9/"])


def load(folder: Path, **settings: object) -> MNISTDataModule:
    data = MNISTDataModule(folder, **settings)
    data.prepare_data()
    data.setup()
    return data


def assert_damaged(folder: Path) -> None:
    """One message that says to delete the folder of the files."""
    with pytest.raises(OSError) as caught:
        load(folder)
    trouble, remedy = str(caught.value).rsplit("\n", 1)
    assert trouble.startswith("MNIST could not be downloaded or read: ")
    assert remedy == f"Its files are damaged: delete {folder / RAW} and run again."


def says_missing(error: str, folder: Path, found: str = "nothing") -> bool:
    """One message with the files that it looked for, where, what is there; nothing to delete."""
    remedy = f"Put {', '.join(NAMES)}, unpacked, into {folder / RAW} (there is {found}); DATA_DIR "
    trouble = "MNIST could not be downloaded or read: "
    return trouble in error and remedy in error and "elete" not in error


# --- What the tensors should be, in NumPy ---
def windows(images: np.ndarray, crop: int, size: int) -> np.ndarray:
    """The mean of each window of the central square: a block, or the pixels that it touches."""
    edge = (28 - crop) // 2
    images = images[:, edge : edge + crop, edge : edge + crop] / 255
    means = np.empty((len(images), size, size))
    bounds = [(i * crop // size, -(-(i + 1) * crop // size)) for i in range(size)]
    for row, (top, bottom) in enumerate(bounds):
        for column, (left, right) in enumerate(bounds):
            means[:, row, column] = images[:, top:bottom, left:right].mean(axis=(1, 2))
    return means[:, None]


def lean(image: np.ndarray) -> tuple[float, float]:
    """Pixels a row by which its ink leans to the right, k of `deskew`, and its centre's row."""
    ys, xs = np.mgrid[: len(image), : len(image)]
    centre_y, centre_x = ((image * axis).sum() / image.sum() for axis in (ys, xs))
    k = (image * (xs - centre_x) * (ys - centre_y)).sum() / (image * (ys - centre_y) ** 2).sum()
    return k, centre_y


def upright(image: np.ndarray) -> np.ndarray:
    """LeCun's deskewing in loops: row y is read k (y - centre) further right, bilinearly."""
    (k, centre_y), side, out = lean(image), len(image), np.zeros_like(image)
    for y in range(side):
        for x in range(side):
            source = x + np.clip(k, -1, 1) * (y - centre_y)
            left = int(np.floor(source))
            for pixel, weight in ((left, left + 1 - source), (left + 1, source - left)):
                if 0 <= pixel < side:
                    out[y, x] += weight * image[y, pixel]
    return out


def bar(slope: float) -> np.ndarray:
    """A bar 3 pixels wide through the middle that leans by `slope` pixels a row."""
    y, x = np.mgrid[:28, :28] - 13.5
    return ((abs(x - slope * y) <= 1.5) & (abs(y) < 9)).astype(np.float32)


# --- Tensors and loaders ---
@pytest.mark.parametrize("deskewed", [False, True])
@pytest.mark.parametrize("crop, size", [(28, 1), (28, 7), (28, 28), (20, 20), (20, 8), (2, 2)])
def test_tensors(tmp_path, crop, size, deskewed):
    """Images that lean, by up to 1.8, off their middle; test images have another mean."""
    examples = 40 if deskewed else 5_020  # the loops are slow; more than are averaged at a time
    leaning = np.stack([bar(slope) for slope in np.linspace(-1.8, 1.8, examples)])
    leaning *= np.random.default_rng(0).random(leaning.shape) ** 2
    folder = write_mnist(tmp_path / "data", examples, 20)
    raw = {"train": 200 * leaning, "t10k": 90 * leaning[-20:]}
    for split, images in raw.items():
        raw[split] = images.astype(np.uint8)
        (folder / RAW / f"{split}-images-idx3-ubyte").write_bytes(idx(raw[split]))
        if deskewed:
            raw[split] = np.stack([upright(image / 1.0) for image in raw[split]])
    data = load(folder, deskew=deskewed, crop_size=crop, image_size=size)
    assert torch.equal(data.train_labels, torch.arange(examples) % 10)
    train, test = (windows(images, crop, size) for images in raw.values())
    mean, std = train.mean(axis=0), train.std(ddof=1)
    for images, expected in ((data.train_images, train), (data.test_images, test)):
        np.testing.assert_allclose(images, (expected - mean) / std, atol=2e-3)


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch, capsys):
    write_mnist(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("~/data", Path("~", "data")):
        assert len(load(folder).train_labels) == 300
    assert "Downloading" not in capsys.readouterr().out


def test_a_bar_becomes_upright():
    """Without loss of ink; what is upright, empty or a single row stays."""
    images = np.stack([bar(slope) for slope in (-0.9, -0.3, 0.5, 0, 0, 0)])
    images[4:] = 0
    images[5, 9, 4:20] = 1
    results = deskew(torch.from_numpy(images)[:, None])[:, 0].numpy()
    for image, result in zip(images[:3], results, strict=False):
        assert abs(lean(result)[0]) < 0.05
        assert result.sum() == pytest.approx(image.sum(), rel=1e-3)
    np.testing.assert_allclose(results[3:], images[3:], atol=1e-4)


def test_loaders(data_dir):
    """Images with their labels, in batches; for training all, in another order each time."""
    data = MNISTDataModule(data_dir, batch_size=40)
    data.setup(stage="fit")  # as Lightning's Trainer does
    (images, labels), (rest, _) = data.test_dataloader()
    assert torch.equal(torch.cat([images, rest]), data.test_images)
    assert torch.equal(labels, data.test_labels[:40])
    first, second = (
        torch.cat([images[:, 0, 0, 0] for images, _ in data.train_dataloader()]) for _ in range(2)
    )
    assert sorted(first) == sorted(data.train_images[:, 0, 0, 0]) and not torch.equal(first, second)
    assert [len(batch) for batch, _ in data.train_dataloader()] == 7 * [40] + [20]


# --- Data sets and folders ---
@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("dataset", ["FashionMNIST", "KMNIST"])
def test_another_data_set(dataset, tmp_path, main):
    """In folders with strange names."""
    data_dir, output = tmp_path / "größe 数 % {x} 'q'", tmp_path / "läufe 1"
    write_mnist(data_dir, dataset=dataset)
    code, out, error = main(*small(data_dir=data_dir, dataset=dataset, output_dir=output))
    assert code == 0 and f"300 + 60 images of {dataset};" in out, error
    assert f"Files: {output / RUN.relative_to('runs')}" in out
    code, _, error = main(*small(data_dir=data_dir))  # MNIST's folder is another
    assert code == 1 and says_missing(error, data_dir)


@contextmanager
def read_only(folder: Path, mode: int = 0o444) -> Iterator[None]:
    """As a user who may not write to the folder, and has these rights to its files."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else mode)
    for path in (folder.parent, *folder.parent.parents[:2]):
        path.chmod(0o755)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may write everywhere
    try:
        yield
    finally:
        os.seteuid(user)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_a_read_only_folder(data_dir):
    with read_only(data_dir):
        assert len(load(data_dir).train_labels) == 300


# --- Files that cannot be had or read ---
DAMAGE = {  # what a file is then
    "empty": lambda content: b"",
    "half unpacked": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
    "HTML": lambda content: b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>",
    "compressed": gzip.compress,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file(data_dir, how):
    for name in NAMES:
        path = data_dir / RAW / name
        content = path.read_bytes()
        path.write_bytes(DAMAGE[how](content))
        assert_damaged(data_dir)
        path.write_bytes(content)
    load(data_dir)  # whole again


@pytest.mark.parametrize("split, examples", [("train", 300), ("t10k", 60)])
def test_what_is_not_mnist(data_dir, split, examples):
    """Images of another size, labels of more classes (EMNIST's), and not one for each image."""
    images, labels = (data_dir / RAW / name for name in NAMES if name.startswith(split))
    for path, array in (
        (images, np.zeros((examples, 27, 28))),
        (labels, np.arange(examples) % 11),
        (labels, np.zeros(examples - 1)),
    ):
        content = path.read_bytes()
        path.write_bytes(idx(array.astype(np.uint8)))
        assert_damaged(data_dir)
        path.write_bytes(content)


@pytest.mark.parametrize("missing", [NAMES, NAMES[2:3]])
def test_no_network(data_dir, main, missing):
    """It says first that it downloads, and leaves what is there as it is."""
    raw = data_dir / RAW
    for name in missing:
        (raw / name).unlink()
    before = os.listdir(raw)
    found = ", ".join(before) or "nothing"
    code, out, error = main(*small(data_dir=data_dir))
    assert code == 1 and out == f"Downloading MNIST to {raw}\n" and "refused" in error
    assert says_missing(error, data_dir, found) and "Traceback" not in error
    assert os.listdir(raw) == before and not os.path.exists("runs")


def test_a_mirror_that_does_not_answer(tmp_path, main, monkeypatch):
    """It is given up soon, here sooner; what else uses the network has its own patience again."""
    asked, set_patience = [], socket.setdefaulttimeout

    def impatient(seconds: float | None) -> None:
        asked.append(seconds)
        set_patience(0.1 if len(asked) == 1 else seconds)

    set_patience(10)  # so that this test ends
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # the system takes the connection
            address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            monkeypatch.setattr(MNIST, "mirrors", [address])
            monkeypatch.setattr(socket, "setdefaulttimeout", impatient)
            code, out, error = main(*small(data_dir=tmp_path / "data"))
        assert asked[0] <= 20 and socket.getdefaulttimeout() == 10
    finally:
        set_patience(None)
    assert code == 1 and out.startswith("Downloading MNIST to ") and "timed out" in error
    assert says_missing(error, tmp_path / "data")


@pytest.mark.parametrize("place", [RAW, Path()])
def test_other_names_in_a_read_only_folder(place, data_dir, main):
    """As Kaggle's, which may also lie where no folder MNIST/raw can be made."""
    for name in NAMES:
        path = data_dir / RAW / name
        path.rename(data_dir / place / name.replace("-idx", ".idx"))
    if place != RAW:
        shutil.rmtree(data_dir / "MNIST")
    found = ", ".join(os.listdir(data_dir / RAW)) if place == RAW else "nothing"
    with read_only(data_dir):
        code, _, error = main(*small(data_dir=data_dir))
    assert code == 1 and says_missing(error, data_dir, found) and "Traceback" not in error


def test_files_that_may_not_be_read(data_dir, main):
    """They are not damaged, as far as anybody knows."""
    found = ", ".join(os.listdir(data_dir / RAW))
    with read_only(data_dir, mode=0o000):
        code, _, error = main(*small(data_dir=data_dir))
    assert code == 1 and says_missing(error, data_dir, found) and "Permission denied" in error
