"""M2N2 on MNIST: classifiers evolved from scratch, without a gradient, by merging models.

This is Model Merging of Natural Niches, Experiment 1 of "Competition and Attraction Improve Model
Fusion" (Abrantes, Lange, Tang; arXiv:2508.16204), on the real MNIST. 100,000 children, each scored
on 10,000 of the training images, reach 98.20 ± 0.06 % test accuracy (mean ± SD of seeds 42 to 46)
with an MLP 64-128-10, in 5 minutes on two CPU cores. PGPE with as many children reaches
98.34 ± 0.13 % (five seeds; README).

    python m2n2_mnist.py                              # the experiment of the constants below
    python m2n2_mnist.py --iterations 1000 --seed 7   # any constant overridden; see --help
    torchrun --nproc_per_node 2 -- m2n2_mnist.py      # the examples split over processes
"""

import argparse
import csv
import errno
import io
import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

# --- Constants: edit these, or give them as flags, --seed 7 for SEED = 7 ---
# Run
SEED = 42  # seed of the first run
RUNS = 1  # number of runs, with consecutive seeds; with RESUME always 1
ITERATIONS = 100_000  # children evaluated in a run
TEST_EVERY = 1_000  # children between two rows of metrics.csv; at each the checkpoint is renewed
RESUME = ""  # folder of a run to go on with, as runs/m2n2_mnist/version_3; its constants stay
OUTPUT_DIR = "runs"  # folder that gets m2n2_mnist/version_N for each run
ACCELERATOR = "cuda" if torch.cuda.is_available() else "cpu"  # where to compute
# Data and model
DATASET = "MNIST"  # torchvision's name of the data set
DATA_DIR = "data"  # folder that holds the data set, or gets it downloaded
DESKEW = True  # shear each image until its ink stands upright; not in the paper
CROP_SIZE = 20  # pixels a side of the central square kept, 28 for all; MNIST's digits fill 20
IMAGE_SIZE = 8  # pixels a side after averaging over areas, which the model sees; the paper's 8
HIDDEN_DIM = 128  # hidden units of the MLP; the paper's 256
# M2N2
ARCHIVE_SIZE = 4  # models in the archive, K; the paper's 20
SUBSET_SIZE = 10_000  # training examples a child is scored on; 0, as in the paper: all of them
SUBSET_EVERY = 1_000  # children after which the examples of SUBSET_SIZE are chosen anew
SCORE = "probability"  # of the true class; or the paper's "correct": 1 where right, else 0
TEMPERATURE = 0.67  # of the softmax that gives the probability; higher is smoother
ALPHA = 1.0  # competition: 1 shares each example among its models, 0 is none
INIT_STD = 0.01  # standard deviation of the two random models at the start
MUTATION_STD = 0.005  # σ, standard deviation of the mutation, at the start; the paper's 0.01
FINAL_MUTATION_STD = 0.001  # σ at the end of a run; the paper's is constant
PRIOR_STD = 0.2  # mutation draws weights to N(0, PRIOR_STD²); must exceed σ; 0: off, the paper's
USE_CROSSOVER = True  # False: a child is a mutated copy of its first parent
USE_SPLIT_POINT = True  # False: one SLERP over the whole vector
USE_ATTRACTION = True  # False: both parents are drawn by fitness


# --- Flat parameter vectors ---
def slerp(t: float | Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Spherical interpolation sin((1 - t) Ω) / sin Ω · a + sin(t Ω) / sin Ω · b, `(params,)`.

    Ω is the angle between a and b; `t` is a number, or a tensor that broadcasts to `(params,)`.
    Where sin Ω is NaN or below 0.001 (zero, parallel or opposite vectors), Ω = 0.0001 takes its
    place, which makes the interpolation linear.
    """
    omega = torch.acos(torch.dot(a, b) / (a.norm() * b.norm()))
    # The comparison is false for NaN: a zero vector, or a cosine rounded beyond 1.
    omega = torch.where(omega.sin() >= 1e-3, omega, 1e-4)
    sin = omega.sin()
    return ((1 - t) * omega).sin() / sin * a + (t * omega).sin() / sin * b


def get_params(model: nn.Module) -> Tensor:
    """All parameters as one detached vector `(params,)`, in the order of `model.parameters()`."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def set_params(model: nn.Module, params: Tensor) -> None:
    """Copy a vector `(params,)` of `get_params` into the model; ValueError for a wrong length."""
    vector = get_params(model)  # a copy, in the model's dtype
    if params.shape != vector.shape:
        raise ValueError(f"the model has {len(vector)} parameters, not {tuple(params.shape)}")
    vector_to_parameters(vector.copy_(params), model.parameters())


# --- Model ---
class MLP(nn.Module):
    """Images `(examples, ...)` → hidden ReLU layer → logits `(examples, classes)`."""

    def __init__(self, input_dim: int, hidden_dim: int = HIDDEN_DIM, output_dim: int = 10) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, output_dim)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.hidden(images.flatten(1)).relu_()
        # This is self.output(hidden), but with rows of zeros up to a multiple of 16, which a CPU
        # multiplies up to twice as fast.
        classes = self.output.out_features
        weight = nn.functional.pad(self.output.weight, (0, 0, 0, -classes % 16))
        return (hidden @ weight.T)[:, :classes] + self.output.bias


# --- Data ---
def deskew(images: Tensor) -> Tensor:
    """Images `(examples, 1, side, side)`, each sheared until its ink stands upright.

    With dx and dy a pixel's offsets from the centre of mass and m its share of the ink, a row moves
    back by k dy, k = Σ m dx dy / Σ m dy². Then Σ m dx dy is about zero, unless k is limited, to ±1
    (LeCun, Bottou, Bengio, Haffner 1998). An image without ink stays as it is.
    """
    identity = torch.eye(2, 3, dtype=images.dtype)
    size = [1, *images.shape[1:]]
    # The coordinates of the pixels' centres, from -1 to 1: x and y are (1, side, side).
    grid = nn.functional.affine_grid(identity[None], size, align_corners=False)
    x, y = grid.unbind(-1)

    total = images.sum(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    m = (images / total).squeeze(1)  # (examples, side, side), each sums to 1
    centre_x = (m * x).sum(dim=(1, 2), keepdim=True)
    centre_y = (m * y).sum(dim=(1, 2), keepdim=True)
    dx = x - centre_x
    dy = y - centre_y
    k = (m * dx * dy).sum(dim=(1, 2)) / (m * dy * dy).sum(dim=(1, 2)).clamp(min=1e-12)

    shear = identity.repeat(len(images), 1, 1)  # from a pixel to where its value comes from
    shear[:, 0, 1] = k.clamp(-1, 1)
    shear[:, 0, 2] = -shear[:, 0, 1] * centre_y.flatten()
    grid = nn.functional.affine_grid(shear, images.shape, align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


class MNISTDataModule(LightningDataModule):
    """A data set of MNIST's family, as whole tensors for M2N2 and as loaders for a `Trainer`.

    `train_images` and `test_images` are float32 `(examples, 1, image_size, image_size)`, minus the
    mean training image, divided by the standard deviation of all training pixels; `train_labels`
    and `test_labels` are int64 `(examples,)`. `examples` are these four in the order in which
    `M2N2` takes them. OSError for files that cannot be downloaded or read; it says what to do.
    """

    def __init__(
        self,
        data_dir: str | Path = DATA_DIR,
        dataset: str = DATASET,
        deskew: bool = DESKEW,
        crop_size: int = CROP_SIZE,
        image_size: int = IMAGE_SIZE,
        batch_size: int = 128,
    ) -> None:
        super().__init__()
        self.data_dir = os.path.expanduser(data_dir)
        self.dataset = dataset
        self.deskew = deskew
        self.crop_size = crop_size
        self.image_size = image_size
        self.batch_size = batch_size

    def prepare_data(self) -> None:
        """Download the files that are missing, if any, and unpack them."""
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)  # seconds; torchvision would wait for ever
        try:
            self._read(train=True, download=True)
        finally:
            socket.setdefaulttimeout(patience)

    def setup(self, stage: str | None = None) -> None:
        """Read the files and make the tensors."""
        train, self.train_labels = self._read(train=True)
        test, self.test_labels = self._read(train=False)
        train, test = self._preprocess(train), self._preprocess(test)
        mean, std = train.mean(dim=0), train.std()
        self.train_images = (train - mean) / std
        self.test_images = (test - mean) / std
        self.examples = (self.train_images, self.train_labels, self.test_images, self.test_labels)

    def _read(self, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
        """Images, uint8 `(examples, 28, 28)`, and labels, int64 `(examples,)`, by torchvision."""
        folder = Path(self.data_dir, self.dataset, "raw")
        kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
        files = [f"{split}-{kind}" for split in ("train", "t10k") for kind in kinds]
        missing = [name for name in files if not (folder / name).exists()]
        if download and missing:
            print(f"Downloading {self.dataset} to {folder}", flush=True)
        try:
            dataset = getattr(datasets, self.dataset)
            examples = dataset(self.data_dir, train, download=download)
            images, labels = examples.data, examples.targets
            if images.shape != (len(labels), 28, 28) or labels.max() > 9:
                raise ValueError(f"images {tuple(images.shape)}, labels up to {labels.max()}")
        except Exception as error:  # whatever torchvision, the network or the disk raises
            remedy = f"Its files are damaged: delete {folder} and run again."
            if missing or isinstance(error, OSError):
                found = ", ".join(os.listdir(folder) if folder.is_dir() else []) or "nothing"
                remedy = f"Put {', '.join(files)}, unpacked, into {folder} (there is {found})"
                remedy += "; DATA_DIR may name another folder."
            trouble = "could not be downloaded or read"
            raise OSError(f"{self.dataset} {trouble}: {error}\n{remedy}") from error
        return images, labels

    def _preprocess(self, images: Tensor) -> Tensor:
        """Pixel values from 0 to 1, deskewed, cropped and averaged, `(examples, 1, side, side)`."""
        preprocessed = []
        for part in images.split(5_000):  # for less memory
            pixels = part[:, None].float() / 255
            if self.deskew:
                pixels = deskew(pixels)
            pixels = center_crop(pixels, self.crop_size)
            preprocessed.append(nn.functional.adaptive_avg_pool2d(pixels, self.image_size))
        return torch.cat(preprocessed)

    def train_dataloader(self) -> DataLoader:
        examples = TensorDataset(self.train_images, self.train_labels)
        return DataLoader(examples, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.test_images, self.test_labels), self.batch_size)


# --- M2N2 ---
def part_of(examples: Tensor) -> Tensor:
    """The part that this process scores; under torch.distributed each scores one."""
    if not dist.is_initialized():
        return examples
    return examples.tensor_split(dist.get_world_size())[dist.get_rank()]


def all_reduce(values: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations on one thread: a sum is rounded alike whatever the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def thread_pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that each run PyTorch's operations by themselves.

    `process` is `os.getpid()`, as threads do not live on in a forked process.
    """
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


class ForwardPass:
    """A model's logits as a function of its parameters, the images divided among threads.

    PyTorch's own threads meet at the end of each operation, where all wait for the slowest: on a
    busy machine they take up to ten times as long. Here each thread evaluates whole parts of
    `part_size` images (0: 2,500, or all on a GPU) by itself, in the same way whichever thread it
    is: the bits of the logits do not depend on the number of threads.
    """

    def __init__(self, model: nn.Module, part_size: int = 0) -> None:
        self._params = get_params(model)
        on_cpu = self._params.device.type == "cpu"
        self.part_size = part_size or (2_500 if on_cpu else 10**9)
        threads = torch.get_num_threads() if on_cpu else 1
        # A copy for each thread, as a forward pass may keep something in its modules.
        self._copies = [deepcopy(model) for _ in range(threads)]
        for copy in self._copies:
            vector_to_parameters(self._params, copy.parameters())  # now views of self._params

    def __reduce__(self) -> tuple:
        # Views do not survive copying or pickling: the copy makes them anew.
        return ForwardPass, (self._copies[0], self.part_size)

    @one_thread()
    def __call__(self, params: Tensor, images: Tensor) -> Tensor:
        """Logits `(classes, examples)` of the model with the parameters `(params,)`."""
        self._params.copy_(params)
        parts = images.split(self.part_size)
        logits: list[Tensor | None] = [None] * len(parts)  # filled by the threads
        numbers = iter(range(len(parts)))  # common to the threads: none gets another's number

        def evaluate(model: nn.Module) -> None:
            # Gradients and autocast are modes of a thread: set here, they are the same in all.
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                for number in numbers:
                    logits[number] = model(parts[number]).T.float()

        # The caller evaluates too, with the first copy; there are no more threads than parts.
        pool = thread_pool(len(self._copies), os.getpid())
        helpers = [pool.submit(evaluate, model) for model in self._copies[1 : len(parts)]]
        try:
            evaluate(self._copies[0])
        finally:
            wait(helpers)  # after Ctrl-C too: no thread is left at work
        for helper in helpers:
            helper.result()  # raises what was raised there
        return torch.cat(logits, dim=1)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The true class's logit minus the highest other, `(examples,)`, for `(classes, examples)`.

    An example is classified correctly, for scores as for accuracies, where its margin is above 0:
    a tie is an error.
    """
    true = logits.gather(0, labels[None])[0]
    highest_other = logits.scatter(0, labels[None], -torch.inf).amax(dim=0)
    return true - highest_other


def probabilities(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) of the true class, `(examples,)`, for `(classes, examples)`."""
    return (logits / temperature).softmax(dim=0).gather(0, labels[None])[0]


def checked_examples(
    split: str, images: Tensor | np.ndarray, labels: Tensor | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Copies of both as tensors on the images' device; ValueError if they cannot be used."""
    images = torch.as_tensor(images).detach().clone(memory_format=torch.contiguous_format)
    labels = torch.as_tensor(labels).to(images.device, copy=True)
    good_images = images.is_floating_point() and images.dim() and len(images)
    good_labels = labels.dtype == torch.long and labels.shape == images.shape[:1]
    if not good_images or not good_labels or not images.isfinite().all() or labels.min() < 0:
        found = f"{images.dtype} {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
        accepts = "floating-point (examples, ...), all finite, and int64 (examples,) from 0 up"
        raise ValueError(f"{split}_images and {split}_labels are {found}, accepted are {accepts}")
    return images, labels


@torch.no_grad()
def checked_model(model: nn.Module, images: Tensor, classes: int) -> nn.Module:
    """A copy to be evaluated on these images; ValueError if it cannot be evolved on them."""
    model = deepcopy(model).to(images.device, images.dtype).eval()
    if next(model.parameters(), None) is None:
        raise ValueError("model has no parameters")
    image = images[:1].clone()
    try:
        logits = model(image)
    except Exception as error:
        raise ValueError(f"model cannot take images {tuple(images.shape)}: {error}") from error
    # _version counts changes in place: ReLU(inplace=True) may leave this image's values equal.
    if image._version or not torch.equal(image, images[:1]):
        raise ValueError("model changes its input in place: every child would change the data")
    fits = isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == 1
    if not fits or logits.shape[1] < classes:
        answer = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model answers {answer} to an image, accepted is (1, {classes}) or more")
    return model


def merging_params(model: nn.Module, others: Sequence[nn.Module | Mapping]) -> list[Tensor]:
    """The vectors `(params,)` of modules or state_dicts; ValueError if they cannot be merged."""
    vectors = []
    for number, other in enumerate(others):
        which = f"initial_models[{number}]"
        state = other.state_dict() if isinstance(other, nn.Module) else other
        loaded = deepcopy(model)
        try:
            loaded.load_state_dict(state)
        except (RuntimeError, TypeError) as error:  # names what differs
            raise ValueError(f"{which} does not fit model: {error}") from error
        params = get_params(loaded)
        if not params.float().isfinite().all():
            raise ValueError(f"{which} has parameters that are not finite")
        # Only parameters are merged, all else stays model's: so all else must be equal already.
        rebuilt = deepcopy(model)
        set_params(rebuilt, params)
        own, theirs = rebuilt.state_dict(), dict(state)
        if isinstance(other, nn.Module):  # has the buffers, too, that a state_dict leaves out
            own.update(rebuilt.named_buffers())
            theirs.update(other.named_buffers())
        for name, tensor in own.items():
            if name in theirs and not torch.equal(tensor, theirs[name].to(tensor)):
                raise ValueError(f"{which} has another {name} than model, which is not merged")
        vectors.append(params.float())
    return vectors


class M2N2:
    """Model Merging of Natural Niches: a steady-state evolution of an archive of K models.

    Takes any `model` from floating-point images `(examples, ...)` to logits `(examples, classes)`,
    and int64 labels; ValueError where they do not fit. Model and data are copied. The model is
    evaluated on the training images' device, in their precision and in evaluation mode; all
    parameters evolve, frozen ones too, and buffers stay.

    The archive, float32, starts as K empty slots, zeros with fitness 0. Two random models take the
    first of them, and children the next. The weights of `model` are not used: to start from trained
    ones, give two or more `initial_models` (modules, state_dicts) and prior_std=0, or they shrink.

    Children are scored on `subset_size` of the training examples, which are chosen anew after each
    `subset_every` children; 0 for all of them. Under torch.distributed every process holds the
    archive and all examples, draws the same random numbers and scores its part of the subset.

    The paper's symbols: s_ij in [0, 1], the score of model i on training example j of the subset;
    z_j = Σ_i s_ij; f_i, a fitness. What to read: `archive`, `scores`, `subset` (which examples,
    `(subset_size,)`), `iteration` (children so far), `history` (rows of `evolve`), `best` (the
    member with the highest training accuracy at the last row, `(params,)`).
    """

    def __init__(
        self,
        model: nn.Module,
        train_images: Tensor | np.ndarray,
        train_labels: Tensor | np.ndarray,
        test_images: Tensor | np.ndarray,
        test_labels: Tensor | np.ndarray,
        *,
        archive_size: int = ARCHIVE_SIZE,
        subset_size: int = SUBSET_SIZE,
        subset_every: int = SUBSET_EVERY,
        score: str = SCORE,
        temperature: float = TEMPERATURE,
        alpha: float = ALPHA,
        init_std: float = INIT_STD,
        mutation_std: float = MUTATION_STD,
        final_mutation_std: float = FINAL_MUTATION_STD,
        prior_std: float = PRIOR_STD,
        use_crossover: bool = USE_CROSSOVER,
        use_split_point: bool = USE_SPLIT_POINT,
        use_attraction: bool = USE_ATTRACTION,
        schedule: int = 0,  # children over which σ falls; 0: to the end of the first `evolve`
        eval_batch_size: int = 0,  # images a thread evaluates at a time; 0: 2,500, or all on a GPU
        initial_models: Sequence[nn.Module | Mapping] = (),
        seed: int = SEED,
    ) -> None:
        if score not in ("probability", "correct"):
            raise ValueError(f"score is {score!r}, accepted are 'probability' and 'correct'")
        if archive_size < 2:
            raise ValueError(f"archive_size is {archive_size}, accepted is 2 or more")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, accepted is above 0")
        if not 0 <= alpha <= 3:  # above 3.2, 1 / z^α may overflow
            raise ValueError(f"alpha is {alpha}, accepted is 0 to 3")
        if prior_std and prior_std <= max(mutation_std, final_mutation_std):
            raise ValueError(f"prior_std is {prior_std}, accepted is 0 or above the mutation's σ")
        self.archive_size = archive_size
        self.subset_every = subset_every
        self.score = score
        self.temperature = temperature
        self.alpha = alpha
        self.init_std = init_std
        self.mutation_std = mutation_std
        self.final_mutation_std = final_mutation_std
        self.prior_std = prior_std
        self.use_crossover = use_crossover
        self.use_split_point = use_split_point
        self.use_attraction = use_attraction
        self.schedule = schedule

        self.train_images, self.train_labels = checked_examples("train", train_images, train_labels)
        test_images, test_labels = checked_examples("test", test_images, test_labels)
        self.test_images = test_images.to(self.train_images)
        self.test_labels = test_labels.to(self.train_labels)
        examples = len(self.train_labels)
        self.subset_size = subset_size if 0 < subset_size < examples else examples

        classes = 1 + int(max(self.train_labels.max(), self.test_labels.max()))
        self.model = checked_model(model, self.test_images, classes)
        self.logits = ForwardPass(self.model, eval_batch_size)
        self._generator = torch.Generator(self.train_images.device).manual_seed(seed)
        self._fill_archive(merging_params(self.model, initial_models))

    def __getstate__(self) -> dict:
        # A copy: else a worker of multiprocessing would share this one's tensors and change them.
        return deepcopy(vars(self))

    @one_thread()
    def _fill_archive(self, vectors: Sequence[Tensor]) -> None:
        """Make K empty slots; these vectors, or two random ones, enter them like children."""
        params = len(get_params(self.model))
        options = {"dtype": torch.float32, "device": self.train_images.device}
        # The members' rows and, last, the child's. A step always copies the child's row over the
        # worst row, which may be itself: no branch, all in place, so a CUDA graph can replay it.
        self._models = torch.zeros(self.archive_size + 1, params, **options)
        # The first models are scored on a random subset; `evolve` begins by choosing another.
        self.subset = torch.arange(len(self.train_labels), device=self.train_images.device)
        if self.subset_size < len(self.subset):
            draws = torch.rand(len(self.subset), generator=self._generator, **options)
            self.subset = draws.topk(self.subset_size).indices
        part = part_of(self.subset)  # that this process scores
        self._images = self.train_images[part]
        self._labels = self.train_labels[part]
        self._scores = torch.zeros(self.archive_size + 1, len(part), **options)
        # σ and what shrinks a child, set by `evolve` before a step.
        self._sigma = torch.full((1,), self.mutation_std, **options)
        self._shrink = torch.ones(1, **options)
        # Children that entered the archive since the last row of history.
        self._accepted = torch.zeros(1, **options)
        self.best = torch.zeros(params, **options)
        self.iteration = 0
        self.history: list[dict[str, float]] = []

        if not vectors:
            empty = torch.empty(2, params, **options)
            vectors = [row.normal_(0, self.init_std, generator=self._generator) for row in empty]
        for vector in vectors:
            self._evaluate(vector)
            self._update_archive()
        self._accepted.zero_()

    @property
    def archive(self) -> Tensor:
        """The members' parameters `(archive, params)`; an empty slot's are zeros."""
        return self._models[:-1]

    @property
    def scores(self) -> Tensor:
        """The members' scores on this process's part of the subset, `(archive, examples)`."""
        return self._scores[:-1]

    @one_thread()
    def evolve(
        self,
        iterations: int,
        test_every: int = TEST_EVERY,
        after_row: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> None:
        """Make `iterations` more children.

        Each `test_every` children and at the end a row goes to `history`, and to `after_row`. σ
        falls over `schedule` children; where none is given, to the end of the first call.
        """
        first = self.iteration
        end = first + iterations
        self.schedule = self.schedule or end
        make_child = self._step
        hidden = dist.is_initialized() and dist.get_rank() > 0
        with tqdm(desc="Evolving Models", initial=first, total=end, disable=hidden) as bar:
            while self.iteration < end:
                if self.iteration % self.subset_every == 0:
                    self._choose_subset()
                if self._models.is_cuda and self.iteration == first + 3:
                    make_child = captured_step(self)  # by now CUDA's libraries are set up
                self._set_sigma()
                make_child()
                self.iteration += 1
                bar.update()
                if self.iteration % test_every == 0 or self.iteration == end:
                    row = self._measure()
                    self.history.append(row)
                    best_fitness, test_acc = row["best_fitness"], row["test_acc"]
                    bar.set_postfix(best_fitness=f"{best_fitness:.0f}", test_acc=f"{test_acc:.2%}")
                    after_row(row)

    def _choose_subset(self) -> None:
        """Dynamic subset selection, after Gathercole & Ross 1994, and the members' scores on it.

        With p the probability of the true class (for either score), half are the examples with the
        highest Σ_i p_ij (1 - p_ij), which a mutation can move most: p (1 - p) is, up to a factor,
        the derivative of p by the logit. The other half are drawn, so that nothing is forgotten.
        """
        if self.subset_size == len(self.train_labels):
            return
        spread = self._models.new_zeros(len(self.train_labels))
        part = part_of(spread)  # a view, to be filled by this process
        images, labels = part_of(self.train_images), part_of(self.train_labels)
        for params in self.archive[self.archive.any(dim=1)]:
            p = probabilities(self.logits(params, images), labels, self.temperature)
            part += (p * (1 - p)).nan_to_num(0)
        all_reduce(spread)
        # The first half has priority 1 and all others a random one below.
        priority = torch.empty_like(spread).uniform_(generator=self._generator)
        priority[spread.topk(self.subset_size // 2).indices] = 1
        self.subset.copy_(priority.topk(self.subset_size).indices)
        self._score_members()

    def _score_members(self) -> None:
        """Fill in the images and labels of the subset, and the members' scores on them."""
        part = part_of(self.subset)
        torch.index_select(self.train_images, 0, part, out=self._images)
        torch.index_select(self.train_labels, 0, part, out=self._labels)
        for row, params in enumerate(self.archive):
            scores = self._score(self.logits(params, self._images), self._labels)
            # An empty slot scores 0, and so does a member where it overflows on a new subset.
            self._scores[row] = torch.where(params.any(), scores.nan_to_num(0), 0)

    def _set_sigma(self) -> None:
        """Set the next step's σ, along half a cosine, and the factor √(1 - (σ / prior_std)²)."""
        progress = min(self.iteration, self.schedule) / self.schedule
        cosine = (1 + math.cos(math.pi * progress)) / 2  # from 1 to 0
        sigma = self.final_mutation_std + (self.mutation_std - self.final_mutation_std) * cosine
        self._sigma.fill_(sigma)
        if self.prior_std:
            self._shrink.fill_((1 - (sigma / self.prior_std) ** 2) ** 0.5)

    @torch.inference_mode()
    def _step(self) -> None:
        """One child, from its parents to its place in the archive; no CPU waits for the GPU."""
        parent_a, parent_b = self._select_parents()
        child = self._mutate(self._crossover(parent_a, parent_b))
        self._evaluate(child)
        self._update_archive()

    def _select_parents(self) -> tuple[Tensor, Tensor]:
        """Two indices `(1,)`, the first by fitness, P(A) = f_A / Σ f.

        The second by attraction, P(B) = g_B / Σ g with g_B = Σ_j max(s_Bj - s_Aj, 0) / z_j^α.
        """
        fitness, rewards = self._update_fitness(self.scores)
        parent_a = self._draw(fitness)
        if not self.use_attraction:
            return parent_a, self._draw(fitness)
        gain = (self.scores - self.scores.index_select(0, parent_a)).relu_()  # (archive, examples)
        attraction = all_reduce(gain @ rewards)
        attraction.index_fill_(0, parent_a, 1e-30)  # so B = A if all g are 0
        return parent_a, self._draw(attraction)

    def _draw(self, chances: Tensor) -> Tensor:
        """An index `(1,)`, i with probability chances_i / Σ chances.

        Of exponential times of rates chances_i, the i-th is shortest with that probability; here
        the largest 1 / time wins. torch.multinomial would make the CPU wait for the GPU.
        """
        waiting = torch.empty_like(chances).exponential_(generator=self._generator)
        return torch.argmax(chances / waiting, dim=0, keepdim=True)

    def _crossover(self, parent_a: Tensor, parent_b: Tensor) -> Tensor:
        """SLERP(w) before split point p, SLERP(1 - w) from it on; Ω is the whole vectors'.

        w ~ U(0, 1), p ~ U{0..params-1}; the child is `(params,)`.
        """
        a, b = self.archive.index_select(0, torch.cat([parent_a, parent_b]))
        if not self.use_crossover:
            return a
        w = a.new_empty(1).uniform_(generator=self._generator)
        if not self.use_split_point:
            return slerp(w, a, b)
        split_point = torch.randint(len(a), (1,), device=a.device, generator=self._generator)
        before = torch.arange(len(a), device=a.device) < split_point
        return slerp(torch.where(before, w, 1 - w), a, b)

    def _mutate(self, child: Tensor) -> Tensor:
        """child + σ N(0, 1), or, with a prior, child · √(1 - (σ / prior_std)²) + σ N(0, 1).

        The second is the Crank-Nicolson proposal (Neal 1998; Cotter, Roberts, Stuart, White 2013),
        which leaves N(0, prior_std²) unchanged.
        """
        noise = torch.empty_like(child).normal_(generator=self._generator)
        return self._shrink * child + self._sigma * noise

    def _evaluate(self, child: Tensor) -> None:
        """Fill the child's row: its parameters, and its scores on the subset."""
        self._scores[-1] = self._score(self.logits(child, self._images), self._labels)
        self._models[-1] = child

    def _score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """s_j `(examples,)` of logits `(classes, examples)`; NaN where it cannot be computed."""
        if self.score == "probability":
            return probabilities(logits, labels, self.temperature)
        margin = margins(logits, labels)
        return torch.where(margin.isfinite(), (margin > 0).float(), torch.nan)

    def _update_fitness(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Changes nothing, returns the fitness f_i = Σ_j s_ij / z_j^α and the rewards 1 / z_j^α.

        `(models,)` and `(examples,)`. An example with z_j = 0 adds nothing.
        """
        rewards = scores.nansum(dim=0).clamp_(min=1e-12).pow_(-self.alpha)
        # Identical models must get equal sums, or rounding would choose between them: so not
        # scores @ rewards. On CUDA even a sum differs by row unless rows are padded to fours.
        paid = nn.functional.pad(scores * rewards, (0, -len(rewards) % 4))
        return all_reduce(paid.sum(dim=1)), rewards

    def _update_archive(self) -> None:
        """The worst of K + 1 models goes."""
        fitness, _ = self._update_fitness(self._scores)
        # This takes NaN, of a child that overflowed, or the first of equals.
        worst = torch.argmin(fitness, dim=0, keepdim=True)
        self._scores.index_copy_(0, worst, self._scores[-1:].clone())
        self._models.index_copy_(0, worst, self._models[-1:].clone())
        self._accepted += worst < self.archive_size

    def _measure(self) -> dict[str, float]:
        """A row of `history`.

        `train_acc` and `test_acc` are of `best`; `best_fitness`, perhaps another's, is over the
        subset. `coverage` is the share of training examples that some member classifies correctly,
        `diversity` the share on which one of two members does and the other does not, averaged over
        all pairs (the disagreement measure, Kuncheva & Whitaker 2003), `acceptance` the share of
        the children since the last row that entered the archive.
        """
        right = self._right()
        known_by = right.sum(dim=0)  # how many members, (examples,)
        examples = len(self.train_labels)
        members = self.archive.any(dim=1).sum().item()
        pairs = max(1, members * (members - 1) / 2)
        disagreements = all_reduce((known_by * (members - known_by)).sum()).item()
        counts = all_reduce(right.sum(dim=1))  # (archive,)
        self.best.copy_(self.archive[counts.argmax()])
        fitness, _ = self._update_fitness(self.scores)
        previous = self.history[-1]["iteration"] if self.history else 0
        row = {
            "iteration": self.iteration,
            "best_fitness": fitness.max().item(),
            "train_acc": counts.max().item() / examples,
            "test_acc": self.test_accuracy(self.best[None]),
            "coverage": all_reduce((known_by > 0).sum()).item() / examples,
            "diversity": disagreements / examples / pairs,
            "acceptance": self._accepted.item() / (self.iteration - previous),
        }
        self._accepted.zero_()
        return row

    def _right(self) -> Tensor:
        """Whether each member is right on each example of this process, `(archive, examples)`."""
        images, labels = part_of(self.train_images), part_of(self.train_labels)
        right = [margins(self.logits(params, images), labels) > 0 for params in self.archive]
        filled = self.archive.any(dim=1, keepdim=True)  # an empty slot is right on none
        return torch.stack(right) & filled

    def best_model(self) -> nn.Module:
        """`best` as a model of its own, in evaluation mode; ValueError before the first row."""
        if not self.history:
            raise ValueError("there is no best model before the first row of history: evolve")
        model = deepcopy(self.model)
        set_params(model, self.best)
        return model

    def test_accuracy(self, models: Tensor) -> float:
        """Test accuracy of the mean of the probabilities of some models `(models, params)`."""
        total = 0
        for params in models:
            total += (self.logits(params, self.test_images) / self.temperature).softmax(dim=0)
        right = margins(total, self.test_labels) > 0
        return right.sum().item() / len(self.test_labels)

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "archive": self.archive.clone(),
            "generator": self._generator.get_state(),
            "subset": self.subset.clone(),
            "best": self.best.clone(),
            "iteration": self.iteration,
            "schedule": self.schedule,
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from the state of an M2N2 with equal arguments; scores are recomputed."""
        self.archive.copy_(state["archive"])
        self.subset.copy_(state["subset"])
        self._score_members()
        self._generator.set_state(state["generator"])
        self._accepted.zero_()  # as after each row, with which `evolve` ends
        self.best.copy_(state["best"])
        self.iteration = state["iteration"]
        self.schedule = self.schedule or state["schedule"]  # one already set here stays
        self.history = list(state["history"])


def captured_step(m2n2: M2N2) -> Callable[[], None]:
    """The replay of a CUDA graph of a step, one launch; or the step, if it cannot be captured."""
    device, generator = m2n2.archive.device, m2n2._generator
    state = generator.get_state()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    # A failed capture leaves its own stream current: this outer context sets the old one again.
    current = torch.cuda.stream(torch.cuda.current_stream(device))
    try:
        # From 2.14 on torch does this by itself. `__version__` compares by number, not as text.
        if torch.__version__ < "2.14":
            graph.register_generator_state(generator)
        capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(device), current, capture:
            m2n2._step()
    except RuntimeError as error:  # as where the model makes the CPU wait
        tqdm.write(f"No CUDA graph, which is slower: {str(error).splitlines()[0]}")
        m2n2._generator = torch.Generator(device)  # the other may still be in capture mode
        m2n2._generator.set_state(state)
        return m2n2._step
    return graph.replay


# --- Files and figure ---
def write_whole(path: Path, contents: bytes) -> None:
    """Write a file that is whole or as it was before; OSError says what stood in the way."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a name of this process alone
    try:
        temporary.write_bytes(contents)
        os.replace(temporary, path)
    except OSError as error:
        remedy = "See that you may write there and that no other program holds the file."
        if error.errno == errno.ENOSPC:
            remedy = "Make room."
        raise OSError(f"{path} could not be written: {error.strerror}. {remedy}") from error
    finally:
        with suppress(OSError):  # it is gone, if all went well, or the disk is read-only by now
            temporary.unlink()


def save(m2n2: M2N2, constants: argparse.Namespace, folder: Path) -> None:
    """Write metrics, best model and checkpoint: whatever ends the run now, these are left."""
    states = {"checkpoint.pt": {"constants": vars(constants), "m2n2": m2n2.state_dict()}}
    if m2n2.history:
        metrics = io.StringIO(newline="")
        writer = csv.DictWriter(metrics, m2n2.history[0])
        writer.writeheader()
        writer.writerows(m2n2.history)
        write_whole(folder / "metrics.csv", metrics.getvalue().encode())
        states["best_model.pt"] = m2n2.best_model().cpu().state_dict()
    for name, state in states.items():
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(folder / name, buffer.getvalue())


def plot_evolution(histories: Sequence[list[dict[str, float]]], path: Path) -> None:
    """Errors and diversity over the children, in % of the examples; mean ± SD of some runs."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        print("No figure without matplotlib: `pip install matplotlib` to get evolution.png.")
        return
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    children = [row["iteration"] for row in histories[0]]
    curves = {
        "test error of the best": lambda row: 1 - row["test_acc"],
        "training error of the best": lambda row: 1 - row["train_acc"],
        "training examples that no member knows": lambda row: 1 - row["coverage"],
        "diversity": lambda row: row["diversity"],
    }
    for label, share in curves.items():
        values = np.array([[100 * share(row) for row in history] for history in histories])
        mean = values.mean(axis=0)
        std = values.std(axis=0, ddof=1) if len(histories) > 1 else 0
        axes.plot(children, mean, label=label)
        axes.fill_between(children, mean - std, mean + std, alpha=0.3, linewidth=0)
    axes.set(xlabel="children evaluated", ylabel="examples (%)", yscale="log")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=200)
    write_whole(path, picture.getvalue())


# --- The constants as flags, and what is accepted ---
RULES = {  # type, then the lowest and the highest number, or the choices
    ("SEED",): (int, 0, 10**15),
    ("SUBSET_SIZE",): (int, 0, 10**9),
    ("RUNS", "ITERATIONS", "TEST_EVERY", "SUBSET_EVERY"): (int, 1, 10**9),
    ("CROP_SIZE", "IMAGE_SIZE"): (int, 1, 28),
    ("HIDDEN_DIM",): (int, 1, 4_000),
    ("ARCHIVE_SIZE",): (int, 2, 500),
    ("TEMPERATURE",): (float, 1e-3, 1e3),
    ("ALPHA",): (float, 0.0, 3.0),
    ("INIT_STD",): (float, 1e-12, 1e30),
    ("MUTATION_STD", "FINAL_MUTATION_STD", "PRIOR_STD"): (float, 0.0, 1e30),
    ("DESKEW", "USE_CROSSOVER", "USE_SPLIT_POINT", "USE_ATTRACTION"): (bool, True, False),
    ("ACCELERATOR",): (str, "cpu", "cuda"),
    ("DATASET",): (str, "MNIST", "FashionMNIST", "KMNIST"),
    ("SCORE",): (str, "probability", "correct"),
    ("RESUME", "OUTPUT_DIR", "DATA_DIR"): (Path,),
}
ACCEPTED = {name: rule for names, rule in RULES.items() for name in names}
try:
    SOURCE = Path(__file__).read_bytes()  # now: the file may be edited before a run copies it
except (NameError, OSError):  # pasted into a notebook, or read from standard input
    SOURCE = b""


def accepted(name: str) -> str:
    """What a constant takes, in words."""
    kind, *values = ACCEPTED[name]
    if kind in (int, float):
        low, high = values
        return f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
    return " or ".join(map(repr, values)) or "a folder"


def check(name: str, value: object) -> int | float | bool | str:
    """The value in the constant's type, 100000 for 1e5; ValueError says in a line what it takes."""
    kind, *values = ACCEPTED[name]
    if kind in (int, float):
        low, high = values
        if type(value) in (int, float) and low <= value <= high and kind(value) == value:
            return kind(value)
    elif kind is Path:
        if isinstance(value, str | Path):
            return os.path.expanduser(str(value))
    elif type(value) is kind and value in values:
        return value
    shown = " ".join(repr(value).split())  # an array's has several lines
    raise ValueError(f"{name} is {shown}, accepted is {accepted(name)}")


def from_text(name: str, text: str) -> object:
    """The switch or number that a flag's text means; else the text, for `check` to judge."""
    kind = ACCEPTED[name][0]
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return float(text) if kind in (int, float) else text
    except ValueError:
        return text


def parse_constants(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, object]]:
    """The constants at the top, overridden by flags, each checked; and the flags."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--constant VALUE]...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    # The help for a flag is the comment beside its constant.
    comments = dict(re.findall(r"^([A-Z_]+)\b.*# *(.*)", SOURCE.decode(errors="replace"), re.M))
    constants = {name: value for name, value in globals().items() if name in ACCEPTED}
    for name, default in constants.items():
        meaning = f"{comments.get(name, '')} [{accepted(name)}] (default: {default!r})"
        flag = "--" + name.lower().replace("_", "-")
        parser.add_argument(flag, dest=name, help=meaning.strip().replace("%", "%%"))
    texts = vars(parser.parse_args(argv))
    try:
        flags = {name: check(name, from_text(name, text)) for name, text in texts.items()}
        constants = {name: check(name, value) for name, value in constants.items()} | flags
        sigma = max(constants["MUTATION_STD"], constants["FINAL_MUTATION_STD"])
        if 0 < constants["PRIOR_STD"] <= sigma and not constants["RESUME"]:
            raise ValueError(f"PRIOR_STD is {constants['PRIOR_STD']}, accepted is 0 or above σ")
    except ValueError as error:
        parser.exit(2, f"Error: {error}\n")
    return argparse.Namespace(**constants), flags


def resume(constants: argparse.Namespace, flags: dict) -> tuple[argparse.Namespace, dict]:
    """The constants and the state of the run in RESUME.

    A flag may name another DATA_DIR and raise ITERATIONS, which raises σ again; any other that
    differs is refused.
    """
    path = Path(constants.RESUME, "checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        then = {name: check(name, checkpoint["constants"][name]) for name in vars(constants)}
        state = checkpoint["m2n2"]
    except Exception:  # of many kinds; torch's message may advise weights_only=False
        sys.exit(f"Error: {path} is no whole checkpoint of this script. RESUME is a run's folder.")
    for name, value in flags.items():
        raised = name == "ITERATIONS" and value > then[name]
        if value != then[name] and name not in ("RESUME", "DATA_DIR") and not raised:
            sys.exit(f"Error: {name} is {value!r}, but {then[name]!r} in the run to RESUME.")
    return argparse.Namespace(**then | flags | {"RESUME": constants.RESUME}), state


# --- A run ---
def launch(accelerator: str) -> Fabric:
    """A device for this process, or for each of torchrun's; SLURM's or MPI's each run alone."""
    devices, nodes = 1, 1
    if dist.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    found = torch.cuda.device_count()
    if accelerator == "cuda" and found < devices:
        sys.exit(
            f"Error: ACCELERATOR is 'cuda', and {devices} process(es) find {found} GPU(s). Start a "
            "new run on 'cpu'; one made on CUDA cannot go on without it, but has best_model.pt."
        )
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes)
    fabric.launch()
    return fabric


def new_folder(output_dir: str) -> Path:
    """A new folder version_N; making it claims it, as only one run can."""
    parent = Path(output_dir, "m2n2_mnist")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in count():
            folder = parent / f"version_{number}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise OSError(f"{error}. Choose another OUTPUT_DIR.") from error


def m2n2_of(constants: argparse.Namespace, examples: Sequence[Tensor]) -> M2N2:
    """The evolution that these constants describe, at its start."""
    return M2N2(
        MLP(constants.IMAGE_SIZE**2, constants.HIDDEN_DIM),
        *examples,
        archive_size=constants.ARCHIVE_SIZE,
        subset_size=constants.SUBSET_SIZE,
        subset_every=constants.SUBSET_EVERY,
        score=constants.SCORE,
        temperature=constants.TEMPERATURE,
        alpha=constants.ALPHA,
        init_std=constants.INIT_STD,
        mutation_std=constants.MUTATION_STD,
        final_mutation_std=constants.FINAL_MUTATION_STD,
        prior_std=constants.PRIOR_STD,
        use_crossover=constants.USE_CROSSOVER,
        use_split_point=constants.USE_SPLIT_POINT,
        use_attraction=constants.USE_ATTRACTION,
        schedule=constants.ITERATIONS,
        seed=constants.SEED,
    )


def run(
    constants: argparse.Namespace, fabric: Fabric, data: MNISTDataModule, state: dict | None
) -> tuple[list[dict[str, float]], Path]:
    """A run from its folder to its last row: its history, and the folder."""
    m2n2 = m2n2_of(constants, [tensor.to(fabric.device) for tensor in data.examples])
    folder = Path(constants.RESUME)
    if state:
        try:
            m2n2.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            sys.exit(f"Error: {folder} is of another model ({error}): RESUME with its own script.")
    elif fabric.is_global_zero:
        folder = new_folder(constants.OUTPUT_DIR)
        if SOURCE:
            write_whole(folder / "m2n2_mnist.py", SOURCE)
    if fabric.is_global_zero:
        write_whole(folder / "constants.json", json.dumps(vars(constants), indent=2).encode())
        save(m2n2, constants, folder)

    def after_row(row: dict[str, float]) -> None:
        try:
            if fabric.is_global_zero:
                save(m2n2, constants, folder)
        except OSError as error:
            if row["iteration"] == constants.ITERATIONS:
                raise
            tqdm.write(f"{error} The run goes on, and tries again after its next row.")

    try:
        m2n2.evolve(constants.ITERATIONS - m2n2.iteration, constants.TEST_EVERY, after_row)
    except KeyboardInterrupt:
        fabric.print(f"Interrupted. To go on from the last row, give no flag but --resume {folder}")
        sys.exit(130)  # as after any Ctrl-C
    ensemble = m2n2.test_accuracy(m2n2.archive)
    fabric.print(f"Test accuracy of the archive as an ensemble: {ensemble:.2%}")
    return m2n2.history, folder


def main(argv: str | Sequence[object] = ()) -> None:
    """The experiment of the constants and flags; errors a user can mend end in one message."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  None where it was closed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's have none
            stream.reconfigure(errors="replace")  # where σ cannot be shown
    words = argv.split() if isinstance(argv, str) else [str(word) for word in argv]
    constants, flags = parse_constants(words)
    state = None
    if constants.RESUME:
        constants, state = resume(constants, flags)
    fabric = launch(constants.ACCELERATOR)
    constants = fabric.broadcast(constants)  # the first process's: SEED may be int(time.time())
    constants.DATA_DIR = os.path.abspath(constants.DATA_DIR)  # so that RESUME works from anywhere
    preprocessing = (constants.DESKEW, constants.CROP_SIZE, constants.IMAGE_SIZE)
    data = MNISTDataModule(constants.DATA_DIR, constants.DATASET, *preprocessing)
    histories = []
    try:
        with fabric.rank_zero_first(local=True):
            data.prepare_data()
        data.setup()
        images = f"{len(data.train_labels):,} + {len(data.test_labels):,} images"
        where = f"{fabric.device}, {fabric.world_size} process(es); {images} of {constants.DATASET}"
        for seed in range(constants.SEED, constants.SEED + constants.RUNS):
            fabric.print(f"M2N2 on {where}; seed {seed}", flush=True)
            this_run = argparse.Namespace(**vars(constants) | {"SEED": seed, "RUNS": 1})
            history, folder = run(this_run, fabric, data, state)
            histories.append(history)
            if fabric.is_global_zero:
                plot_evolution(histories, folder / "evolution.png")
            accuracy = f"Final Test Accuracy of the best model: {history[-1]['test_acc']:.2%}"
            fabric.print(f"Files: {folder}\nEvolution finished.\n{accuracy}", flush=True)
    except OSError as error:
        sys.exit(f"Error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if len(histories) > 1:
        accuracies = [100 * history[-1]["test_acc"] for history in histories]
        mean, std = np.mean(accuracies), np.std(accuracies, ddof=1)
        fabric.print(f"Mean Test Accuracy of {len(histories)} runs: {mean:.2f} ± {std:.2f}%")


if __name__ == "__main__":
    in_notebook = "kernel_launcher" in sys.argv[0]  # whose arguments are the kernel's own
    main([] if in_notebook else sys.argv[1:])
