"""What a child of M2N2 costs, beside the bare forward pass and beside the authors' own loop.

    python tests/benchmark.py [--all]
    python tests/benchmark.py --authors ../natural_niches --authors-python python-with-jax

Whatever is compared is timed in turn, on the same data. The table's data is random, and it has two
views. Fastest: single steps and passes, on a noisy machine the steadiest figure. Sustained: what a
run gets, pieces of one `evolve`, without its rows; a new subset is timed by itself.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from settings import PAPER, digits, mnist, script
from torch import Tensor

from m2n2_mnist import M2N2, MLP, captured_step

DIGITS = {"examples": 1_437, "image_size": 8, "hidden_dim": 256}  # the paper's data and model
# The authors' functions as they are; only the data and the sizes, which they take from their
# modules, are put in. The data is on JAX's device: as the NumPy arrays of theirs it would be
# converted anew for each child.
PUBLISHED_LOOP = """
import contextlib, io, sys, time
folder, arrays, hidden_dim, num_params, pop_size = sys.argv[1:]
sys.path.insert(0, folder)
import jax, numpy
import data, model
x_train, y_train, x_test, y_test = map(jax.numpy.asarray, numpy.load(arrays).values())
data.load_data = lambda: ((x_train, y_train), (x_test, y_test))
model.input_dim, model.hidden_dim = x_train.shape[1], int(hidden_dim)
model.num_params = int(num_params)
from natural_niches_fn import run_natural_niches
names = ["no_matchmaker", "no_crossover", "no_splitpoint", "use_pre_trained"]
features = dict.fromkeys(names, False)
for children in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        archive = run_natural_niches(1, int(pop_size), int(children), False, **features)
        jax.block_until_ready(archive)
        seconds = time.perf_counter() - start
    print(seconds, flush=True)
"""


# --- Against the bare forward pass ---
def milliseconds(function: Callable[[], object], calls: int = 1) -> float:
    """Of one call, the mean of several without a pause."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """The replay of a CUDA graph of it: a step is spared its launches, so the pass is too."""
    function()  # what libraries set up at first use cannot be captured
    torch.cuda.synchronize()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        function()
    return graph.replay


def evolve(m2n2: M2N2, children: int) -> None:
    """So many children by `evolve`, its bar out of sight."""
    with contextlib.redirect_stderr(io.StringIO()):
        m2n2.evolve(children, 10**9)


def measure(
    device: torch.device,
    rounds: int,
    examples: int = 60_000,
    image_size: int = script.IMAGE_SIZE,
    hidden_dim: int = script.HIDDEN_DIM,
    **settings: object,
) -> list[float]:
    """Milliseconds: fastest step and forward pass, median child and forward pass, a new subset.

    The step is one of a piece of `evolve`. A forward pass is the model's alone on the examples that
    a child is scored on, whole or in M2N2's batches, whichever is faster, by PyTorch's own threads.
    """
    torch.manual_seed(0)
    images = torch.randn(examples, 1, image_size, image_size).to(device)
    labels = torch.randint(10, (examples,), device=device)
    model = MLP(image_size**2, hidden_dim)
    tensors = (images, labels, images[:100], labels[:100])
    m2n2 = M2N2(model, *tensors, subset_every=10**9, **settings)
    row = dict.fromkeys(("best_fitness", "train_acc", "test_acc"), 0)
    m2n2._measure = lambda: row  # at the end of a piece, which is no end
    model.to(device)

    @torch.inference_mode()
    def forward(batch_size: int) -> None:
        for batch in m2n2._images.split(batch_size):
            model(batch)

    evolve(m2n2, 5 * m2n2.archive_size)  # no empty slots
    calls = 100 if device.type == "cuda" else 1  # a launch alone is too short to be timed
    step = captured_step(m2n2) if device.type == "cuda" else m2n2._step

    def single_step() -> None:
        with script.one_thread():  # as `evolve` makes it
            step()

    children = max(10, round(250 / milliseconds(single_step, calls)))  # a quarter of a second
    piece = partial(evolve, m2n2, children)
    sizes = {len(m2n2._images), min(len(m2n2._images), m2n2.logits.part_size)}
    passes = [partial(forward, size) for size in sizes]
    if device.type == "cuda":
        passes = [captured(function) for function in passes]
    singles = [single_step, *passes]
    times = [
        [milliseconds(piece) / children, *(milliseconds(single, calls) for single in singles)]
        for _ in range(rounds)
    ]
    (_, step_time, *fastest) = np.min(times, axis=0)
    (child, _, *medians) = np.median(times, axis=0)
    subset = milliseconds(m2n2._choose_subset, 3)
    return [step_time, min(fastest), child, min(medians), subset]


def table(rounds: int | None, everything: bool) -> None:
    """A row for each setting of interest; `everything` adds how the time scales."""
    device = torch.device(script.ACCELERATOR)
    rounds = rounds or (10 if device.type == "cuda" else 40)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    print(f"{device.type} ({name}), float32, torch {torch.__version__}; ms, {rounds} rounds")
    print(f"{'':38}{'fastest':>16}{'':10}{'sustained (medians)':>24}")
    head = "    step  forward  ratio     child  forward  ratio  children/s  new subset"
    print(f"{'':38}{head}")

    def row(title: str, **shape: object) -> None:
        step, fastest, child, median, subset = measure(device, rounds, **shape)
        single = f"{step:8.3f}{fastest:9.3f}{step / fastest:7.2f}"
        sustained = f"{child:10.3f}{median:9.3f}{child / median:7.2f}{1e3 / child:12.0f}"
        print(f"{title:38}{single}{sustained}{subset:12.1f}", flush=True)

    side, hidden, size = script.IMAGE_SIZE, script.HIDDEN_DIM, script.ARCHIVE_SIZE
    row(f"defaults: {side}x{side}, {hidden} hidden, K = {size}")
    row("the same, 0/1 scores", score="correct")
    row("the same, all 60,000 images", subset_size=0)
    row("28x28, 128 hidden", image_size=28, hidden_dim=128)
    row("14x14, 32 hidden, K = 20, 0/1, all", image_size=14, hidden_dim=32, **PAPER)
    row("1,437 of 8x8, 256 hidden, K = 20, 0/1", **DIGITS, **PAPER)
    if everything:
        for subset in (2_500, 5_000, 20_000, 40_000):
            row(f"{subset:,} images a child", subset_size=subset)
        for size in (10, 20, 40, 80):
            row(f"K = {size}", archive_size=size)
        for hidden in (32, 64, 128, 256, 512):
            row(f"{hidden} hidden", hidden_dim=hidden)


# --- Against the authors' published loop ---
def jax_version(folder: Path, python: str) -> str:
    """That of `python`, if it can run the authors' code; else one line and the end."""
    if not (folder / "natural_niches_fn.py").is_file():
        sys.exit(
            f"Error: {folder} holds no natural_niches_fn.py: clone SakanaAI/natural_niches there."
        )
    needed = "jax, optax, sklearn, tqdm"
    try:
        command = [python, "-c", f"import {needed}; print(jax.__version__)"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).splitlines()[-1]
        sys.exit(f"Error: {python} cannot import {needed} ({why}). --authors-python names another.")


@contextlib.contextmanager
def published_loop(
    folder: Path, python: str, tensors: list[Tensor], hidden_dim: int, params: int
) -> Iterator[Callable[[int], float]]:
    """The authors' loop, from children to seconds, in one process: JAX compiles once."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "arrays.npz")
        np.savez(path, *tensors)
        sizes = (hidden_dim, params, PAPER["archive_size"])
        command = [python, "-B", "-c", PUBLISHED_LOOP, *map(str, (folder.absolute(), path, *sizes))]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # as in their main.py
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:

            def seconds(children: int) -> float:
                print(children, file=process.stdin, flush=True)
                if not (answer := process.stdout.readline()):
                    sys.exit("Error: the authors' code ended early, for the reason above.")
                return float(answer)

            yield seconds


def our_loop(tensors: list[Tensor], hidden_dim: int, children: int) -> float:
    """Seconds of the same by M2N2, its start included as theirs is."""
    with contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        M2N2(MLP(tensors[0].shape[1], hidden_dim), *tensors, **PAPER).evolve(children)
        return time.perf_counter() - start


def compare(folder: Path, python: str, data_dir: str, rounds: int, children: int | None) -> None:
    """Children a second of both, in rounds of a whole loop each, on the CPU in float32."""
    versions = f"torch {torch.__version__} ({torch.get_num_threads()} threads)"
    versions += f", jax {jax_version(folder, python)}"
    print(f"cpu ({os.cpu_count()} cores), float32, {versions}")
    print(f"K = 20, 0/1 scores, sigma = 0.01, all images; whole loops in turn, {rounds} rounds")
    tests = f"ours the best every {script.TEST_EVERY:,} and at the end"
    print(f"The published loop also tests a model after each child, {tests}.")
    print(f"{'children/s, median (min to max)':40}{'theirs':>22}{'ours':>22}  ratio")
    whole = partial(mnist, data_dir, deskew=False, crop_size=28, image_size=14)
    settings = (
        ("1,437 of 8x8 (load_digits), 256 hidden", digits, DIGITS["hidden_dim"], 2_000),
        ("60,000 of 14x14 (MNIST), 32 hidden", whole, 32, 500),
    )
    for title, load, hidden_dim, default in settings:
        tensors, count = [x.flatten(1) if x.dim() > 2 else x for x in load()], children or default
        params = len(script.get_params(MLP(tensors[0].shape[1], hidden_dim)))
        with published_loop(folder, python, tensors, hidden_dim, params) as theirs:
            loops = [theirs, partial(our_loop, tensors, hidden_dim)]
            for loop in loops:
                loop(10)  # JAX compiles
            rates = np.array([[count / loop(count) for loop in loops] for _ in range(rounds)]).T
        medians = np.median(rates, axis=1)
        spreads = (
            f"{m:.0f} ({r.min():.0f} to {r.max():.0f})" for m, r in zip(medians, rates, strict=True)
        )
        print(
            f"{title:40}{''.join(f'{x:>22}' for x in spreads)}{medians[1] / medians[0]:7.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--all", action="store_true", help="also by number of examples, K and hidden units"
    )
    parser.add_argument("--rounds", type=int, help="default: 40, on CUDA 10, with --authors 5")
    parser.add_argument(
        "--authors", type=Path, help="folder of SakanaAI/natural_niches, to compare with instead"
    )
    parser.add_argument(
        "--authors-python", default=sys.executable, help="a Python that has JAX (default: this one)"
    )
    parser.add_argument(
        "--children", type=int, help="of a round with --authors (default: 2,000 digits, 500 MNIST)"
    )
    parser.add_argument("--data-dir", default=script.DATA_DIR, help="of MNIST for --authors")
    arguments = parser.parse_args()
    if arguments.authors is None:
        return table(arguments.rounds, arguments.all)
    python, data_dir = arguments.authors_python, arguments.data_dir
    compare(arguments.authors, python, data_dir, arguments.rounds or 5, arguments.children)


if __name__ == "__main__":
    main()
