"""Milliseconds of one iteration of M2N2 against the bare forward pass, on random data.

    python tests/benchmark.py

Every ratio is taken in one go: the two are timed in turn, and the fastest of many rounds counts,
which on a noisy machine is the steadiest figure.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import m2n2_mnist as script
from m2n2_mnist import M2N2, MLP


def alternate(functions: list[Callable[[], object]], cuda: bool, rounds: int) -> list[float]:
    """The fastest time of each function in milliseconds, called in turn."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            torch.cuda.synchronize() if cuda else None
            start = time.perf_counter()
            function()
            torch.cuda.synchronize() if cuda else None
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def measure(
    device: torch.device,
    dtype: torch.dtype,
    examples: int = 60_000,
    image_size: int = script.IMAGE_SIZE,
    hidden_dim: int = script.HIDDEN_DIM,
    archive_size: int = script.ARCHIVE_SIZE,
    score: str = script.SCORE,
) -> tuple[float, float]:
    """Milliseconds of an iteration and of the bare forward pass, whole or in parts, whichever is faster."""
    torch.manual_seed(0)
    images = torch.randn(examples, 1, image_size, image_size).to(device, dtype)
    labels = torch.randint(10, (examples,), device=device)
    model = MLP(image_size**2, hidden_dim)
    m2n2 = M2N2(model, images, labels, images[:100], labels[:100], archive_size=archive_size, score=score)
    cuda, step, repeats = device.type == "cuda", m2n2._step, 1
    for _ in range(5 * archive_size):  # no empty slots
        step()
    if cuda:
        step, repeats = m2n2._captured_step(), 100
    bare = model.to(device, dtype)

    def forward(part: int) -> None:
        with torch.inference_mode():
            for _ in range(repeats):
                for piece in images.split(part):
                    bare(piece)

    def iterations() -> None:
        for _ in range(repeats):
            step()

    layouts = [partial(forward, part) for part in (len(m2n2._parts[0][0]), examples)]
    iteration, *passes = alternate([iterations, *layouts], cuda, rounds=10 if cuda else 40)
    return iteration / repeats, min(passes) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--precision", choices=("bf16-true", "32-true"), help="default: the script's")
    arguments = parser.parse_args()
    flags = [f"--precision={arguments.precision}"] if arguments.precision else []
    constants = script.parse_constants(flags)
    device = script.launch(constants).device
    dtype = torch.bfloat16 if constants.PRECISION == "bf16-true" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{device.type} ({name}), {constants.PRECISION}, torch {torch.__version__}")
    print(f"{'':44}  iteration    forward  ratio  children/s")

    def row(title: str, **shape: object) -> None:
        iteration, forward = measure(device, dtype, **shape)
        ratio, rate = iteration / forward, 1e3 / iteration
        print(f"{title:44}{iteration:8.3f} ms{forward:8.3f} ms{ratio:7.2f}{rate:12.0f}", flush=True)

    side, hidden = script.IMAGE_SIZE, script.HIDDEN_DIM
    row(f"defaults: {side}x{side}, {hidden} hidden, K = {script.ARCHIVE_SIZE}")
    row("the same, 0/1 scores", score="correct")
    row("28x28, 128 hidden", image_size=28, hidden_dim=128)
    row("14x14, 32 hidden, K = 20, probabilities", image_size=14, hidden_dim=32, archive_size=20)
    row(
        "14x14, 32 hidden, K = 20, 0/1",
        image_size=14,
        hidden_dim=32,
        archive_size=20,
        score="correct",
    )
    digits = {"examples": 1437, "image_size": 8, "hidden_dim": 256, "archive_size": 20}
    row("1,437 of 8x8, 256 hidden, K = 20, probability", **digits)
    row("1,437 of 8x8, 256 hidden, K = 20, 0/1", **digits, score="correct")
    for examples in (6_000, 15_000, 30_000, 60_000):
        row(f"{examples:,} examples", examples=examples)
    for size in (10, 20, 40, 80):
        row(f"K = {size}", archive_size=size)
    for hidden in (32, 64, 128, 256, 512):
        row(f"{hidden} hidden", hidden_dim=hidden)


if __name__ == "__main__":
    main()
