"""The data module: real files in torchvision's layout, damaged ones, and a real download."""

import gzip
import hashlib
import http.server
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import idx, small, write_mnist
from pytorch_lightning import Trainer
from torchvision.datasets import MNIST

import m2n2_mnist as script
from m2n2_mnist import MLP, MNISTDataModule, UserError

NAMES = list(script.IDX_FILES)


def load(folder: Path, **settings: object) -> MNISTDataModule:
    data = MNISTDataModule(folder, **settings)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("size", [1, 7, 10, 14, 28])
def test_tensors(data_dir: Path, size: int) -> None:
    darker = MNIST(data_dir, train=False).data.numpy() // 2  # so that its mean and deviation are its own
    (data_dir / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(idx(darker))
    data = load(data_dir, image_size=size)
    assert data.train_images.shape == (300, 1, size, size) and data.test_images.dtype == torch.float
    assert data.test_images.shape == (60, 1, size, size) and data.train_labels.dtype == torch.long
    assert data.train_labels.tolist() == [i % 10 for i in range(300)]
    assert data.train_images.mean(dim=0).abs().max() < 1e-5  # the mean image is gone
    if 28 % size == 0:  # the area average, worked out in blocks
        shape = (-1, 1, size, 28 // size, size, 28 // size)
        train, test = (
            MNIST(data_dir, train=train).data.numpy().reshape(shape).mean(axis=(3, 5)) / 255 for train in (True, False)
        )
        expected = (test - train.mean(axis=0)) / train.std(ddof=1)
        np.testing.assert_allclose(data.test_images, expected, atol=1e-3)


def test_nothing_is_fetched_where_the_files_are(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST, "download", lambda self: pytest.fail("it tried to download"))
    load(data_dir)


def test_in_a_lightning_trainer(tmp_path: Path) -> None:
    data = MNISTDataModule(write_mnist(tmp_path / "data", 1_000), image_size=14, batch_size=20)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    model = MLP(14 * 14, 16)
    Trainer(max_epochs=3, accelerator="cpu", enable_model_summary=False, **quiet).fit(model, data)
    batches = [(model(images).argmax(dim=1) == labels) for images, labels in data.test_dataloader()]
    assert torch.cat(batches).float().mean() > 0.9 and len(batches) == 3


def damage(raw: Path, name: str, how: str) -> None:
    path = raw / name
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": content[:-100],
            "cut in its header": content[:6],
            "longer": content + b"\0",
            "HTML": b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>",
            "magic": b"\1" + content[1:],
            "type": content[:2] + b"\x0d" + content[3:],
            "compressed": gzip.compress(content),
        }[how]
    )


HOWS = ["empty", "truncated", "cut in its header", "longer", "HTML", "magic", "type", "compressed"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", HOWS)
def test_damaged_file(data_dir: Path, name: str, how: str) -> None:
    damage(data_dir / "MNIST" / "raw", name, how)
    with pytest.raises(UserError, match=rf"{name} is not a whole MNIST file(.|\n)*Delete it"):
        load(data_dir)


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_images_and_labels_of_different_lengths(data_dir: Path, split: str) -> None:
    labels = np.zeros(31, dtype=np.uint8)
    (data_dir / "MNIST" / "raw" / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(UserError, match=rf"{split}-labels-idx1-ubyte is not a whole MNIST file"):
        load(data_dir)


def test_labels_above_nine_and_other_shapes(data_dir: Path) -> None:
    raw = data_dir / "MNIST" / "raw"
    (raw / NAMES[1]).write_bytes(idx(np.full(300, 10, dtype=np.uint8)))
    with pytest.raises(UserError, match=NAMES[1]):
        load(data_dir)
    (raw / NAMES[0]).write_bytes(idx(np.zeros((300, 27, 28), dtype=np.uint8)))
    with pytest.raises(UserError, match=NAMES[0]):
        load(data_dir)


def test_a_file_as_long_as_the_real_one_must_be_the_real_one(data_dir: Path) -> None:
    raw = data_dir / "MNIST" / "raw"
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((10_000, 28, 28), dtype=np.uint8)))
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.*checksum"):
        load(data_dir)


def test_real_mnist(real_mnist: Path) -> None:
    data = load(real_mnist, image_size=28)
    assert data.train_images.shape == (60_000, 1, 28, 28) and len(data.test_images) == 10_000
    assert data.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test_labels.bincount().tolist()[:3] == [980, 1135, 1032]
    raw = MNIST(real_mnist).data.numpy() / np.float32(255)
    expected = (raw - raw.mean(axis=0)).std() / raw.std()
    assert data.train_images.std().item() == pytest.approx(expected, rel=1e-3)


def test_unreadable(data_dir: Path, main) -> None:
    path = data_dir / "MNIST" / "raw" / NAMES[0]
    path.unlink()
    path.mkdir()
    code, _, error = main(*small(data_dir=data_dir))
    assert code == 1 and str(path) in error and "Is a directory" in error


@pytest.fixture
def not_root(tmp_path: Path) -> Iterator[None]:
    """Root may read and write everything: become nobody for the test."""
    root = os.geteuid() == 0
    if root:
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o755)
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["file", "folder", "output", "new"])
def test_no_permission(data_dir: Path, main, not_root: None, closed: str) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    raw = data_dir / "MNIST" / "raw"
    main(*small(data_dir=data_dir))  # nobody may not be able to read what is imported late
    if closed == "new":
        data_dir = data_dir / "new"  # in a folder that only its owner may write
    elif closed != "output":
        (raw / NAMES[0] if closed == "file" else raw).chmod(0)
    os.seteuid(user)
    if user == os.getuid() and closed in ("output", "new"):
        data_dir.parent.chmod(0o500)
    code, _, error = main(*small(data_dir=data_dir, output_dir=data_dir / "runs"))
    assert code == 1 and "Permission denied" in error and "Traceback" not in error
    assert ("OUTPUT_DIR" if closed == "output" else "DATA_DIR") in error and str(data_dir) in error


# The download, from a server of our own in place of torchvision's mirrors.


class Server(http.server.ThreadingHTTPServer):
    """Serves the four files; `mode` says how, and may change while it runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"{n}.gz": gzip.compress((folder / n).read_bytes()) for n in NAMES}
        self.mode, self.requests = "well", []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up are what is tested


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, mode = Path(self.path).name, self.server.mode
        content = self.server.files[name]
        self.server.requests.append(name)
        bad = name.startswith("t10k-images")  # the third: some files are there already
        if mode == "503" and bad:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if mode == "corrupt" and bad:
            content = content[:-20] + bytes(20)
        if mode == "cut" and bad:
            content = content[: len(content) // 2]
        if mode == "silent" and bad:
            time.sleep(3)
        for part in range(0, len(content), 1024):
            self.wfile.write(content[part : part + 1024])
            time.sleep(0.002 if mode == "slow" else 0)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(write_mnist(tmp_path / "served") / "MNIST" / "raw")
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in server.files.items()]
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", sums)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("mode", ["well", "slow"])
def test_download(server: Server, tmp_path: Path, mode: str) -> None:
    server.mode = mode
    data = load(tmp_path / "new")
    assert len(data.train_images) == 300 and set(server.requests) == set(server.files)
    assert sorted(os.listdir(tmp_path / "new" / "MNIST" / "raw")) == sorted(NAMES)
    server.requests.clear()
    load(tmp_path / "new")
    assert not server.requests


def test_no_time_out_without_a_download(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's."""
    monkeypatch.setattr(script.socket, "setdefaulttimeout", pytest.fail)
    load(data_dir)


@pytest.mark.parametrize("mode", ["503", "corrupt", "cut", "silent"])
def test_download_that_fails_and_is_tried_again(
    server: Server, tmp_path: Path, mode: str, main, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.mode = mode
    set_timeout = script.socket.setdefaulttimeout
    monkeypatch.setattr(script.socket, "setdefaulttimeout", lambda s: set_timeout(s and s / 30))
    flags = small(data_dir=tmp_path / "new")
    code, _, error = main(*flags)
    assert code == 1 and "MNIST could not be downloaded" in error and "DATA_DIR" in error
    assert all(name in error for name in NAMES) and "Traceback" not in error
    assert os.listdir(tmp_path / "new" / "MNIST" / "raw") == []  # nothing a later run would trust
    server.mode = "well"
    code, out, _ = main(*flags)
    assert code == 0 and "Evolution finished." in out


def test_a_file_that_was_there_is_kept(server: Server, tmp_path: Path) -> None:
    own = write_mnist(tmp_path / "own", seed=1) / "MNIST" / "raw"
    before = (own / NAMES[0]).read_bytes()
    (own / NAMES[2]).unlink()
    load(tmp_path / "own")
    assert (own / NAMES[0]).read_bytes() == before and (own / NAMES[2]).exists()


def test_no_network(tmp_path: Path, main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # refused at once
    code, _, error = main(*small(data_dir=tmp_path / "new"))
    assert code == 1 and "refused" in error and "put the four unpacked files" in error


def test_data_dir_that_cannot_be_made(tmp_path: Path, main) -> None:
    (tmp_path / "file").touch()
    code, _, error = main(*small(data_dir=tmp_path / "file"))
    assert code == 1 and "MNIST could not be downloaded" in error and str(tmp_path) in error


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount the small tmpfs that plays the full disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_download_to_a_full_disk(server: Server, full_disk: Path, main) -> None:
    code, _, error = main(*small(data_dir=full_disk))
    assert code == 1 and "No space left on device" in error and "DATA_DIR" in error
    assert os.listdir(full_disk / "MNIST" / "raw") == []


def test_run_on_a_full_disk(data_dir: Path, full_disk: Path, main) -> None:
    code, _, error = main(*small(data_dir=data_dir, output_dir=full_disk, hidden_dim=1_000))
    assert code == 1 and "No space left on device" in error and str(full_disk) in error
    assert not list(full_disk.rglob("*.pt")) and not list(full_disk.rglob("*.tmp"))
