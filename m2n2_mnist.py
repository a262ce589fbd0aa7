"""M2N2 on MNIST: classifiers evolved from scratch, without a gradient, by merging models.

It reaches 97.05 ± 0.13 % test accuracy (mean ± SD of seeds 42 to 49) with 50,000 forward passes of an MLP 100-96-10,
in 6 to 11 minutes on 2 CPU cores. This is Model Merging of Natural Niches, Experiment 1 of
"Competition and Attraction Improve Model Fusion" (Abrantes, Lange, Tang; arXiv:2508.16204), on the real MNIST.

    python m2n2_mnist.py                              # the experiment of the constants below
    python m2n2_mnist.py --iterations 1000 --seed 7   # any constant overridden; --help lists them
    torchrun --nproc_per_node 2 -- m2n2_mnist.py      # the examples split over processes
"""

import argparse
import ast
import contextlib
import inspect
import io
import logging
import math
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from numbers import Real
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import mnist
from tqdm import tqdm

# --- Constants: edit these. Any Python does; ACCEPTED below says which values ---

# Run
SEED = 42  # seed of the first run
RUNS = 1  # how often to repeat the experiment, with consecutive seeds
ITERATIONS = 50_000  # children evaluated in a run, which is forward passes
TEST_EVERY = 1_000  # iterations between two rows of metrics.csv
CHECKPOINT_EVERY = 2_500  # iterations between two checkpoints
RESUME = ""  # folder of an interrupted run to go on with, runs/m2n2_mnist/version_3; "" for none
DATA_DIR = "data"  # folder that holds MNIST, or gets it downloaded
OUTPUT_DIR = "runs"  # folder that gets m2n2_mnist/version_N for each run
# Model and data
IMAGE_SIZE = 10  # pixels a side: 28 is MNIST as it is, less is an area average
HIDDEN_DIM = 96  # hidden units of the MLP
# M2N2
START = "scratch"  # or "specialists" trained on digits 0-4 and 5-9, then merged without mutation
ARCHIVE_SIZE = 4  # models in the archive, K; the paper's 20
SCORE = "probability"  # that of the true class, or the paper's 0/1: "correct"
TEMPERATURE = 0.67  # of the softmax of the probability; higher is smoother
ALPHA = 1.0  # competition: 1 shares each example among its models, 0 is none
INIT_STD = 0.01  # standard deviation of the two random models at the start
MUTATION_STD = 0.005  # σ, standard deviation of the mutation, at the start of a run
FINAL_MUTATION_STD = 0.001  # σ at its end; the paper's is constant
USE_CROSSOVER = True  # False: a child is a mutated copy of its first parent
USE_SPLIT_POINT = True  # False: one SLERP over the whole vector
USE_ATTRACTION = True  # False: both parents are drawn by fitness
USE_MIRRORING = True  # a child that loses is tried again with the opposite mutation; not in the paper
# Hardware
ACCELERATOR = "auto"  # where to compute; auto: on CUDA if there is one
PRECISION = "32-true"  # of the evaluation; "bf16-true" is faster where in hardware, but learns less
EVAL_BATCH_SIZE = 0  # images evaluated at a time; 0: 10,000 on a CPU, for its caches, all on a GPU

# --- What is accepted, said once for the classes below, the constants, the flags and --help ---
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
CONSTANTS = {  # type, then its range or its choices
    "seed": (int, 0, 2**32 - 1),
    "runs": (int, 1, math.inf),
    "iterations": (int, 1, 10**15),
    "test_every": (int, 1, math.inf),
    "checkpoint_every": (int, 1, math.inf),
    "resume": (Path,),
    "data_dir": (Path,),
    "output_dir": (Path,),
    "image_size": (int, 1, 28),
    "hidden_dim": (int, 1, 10**7),
    "start": (str, "scratch", "specialists"),
    "archive_size": (int, 2, 10**6),
    "score": (str, "probability", "correct"),
    "temperature": (float, 1e-3, 1e3),
    "alpha": (float, 0.0, 3.0),
    "init_std": (float, 1e-12, 1e30),
    "mutation_std": (float, 0.0, 1e30),
    "final_mutation_std": (float, 0.0, 1e30),
    "use_crossover": (bool,),
    "use_split_point": (bool,),
    "use_attraction": (bool,),
    "use_mirroring": (bool,),
    "accelerator": (str, "auto", "cpu", "cuda"),
    "precision": (str, *DTYPES),
    "eval_batch_size": (int, 0, 10**15),
}
ACCEPTED = CONSTANTS | {  # arguments alone
    "input_dim": (int, 1, 10**7),
    "output_dim": (int, 1, 10**7),
    "batch_size": (int, 1, 10**15),
    "schedule": (int, 0, 10**15),
}
MERGED_ALONE = {"MUTATION_STD": 0.0, "FINAL_MUTATION_STD": 0.0, "USE_MIRRORING": False}  # for START = "specialists"
if gone := [name.upper() for name in CONSTANTS if name.upper() not in globals()]:
    sys.exit(f"Error: {', '.join(gone)} must stay at the top of {__file__}, with a value.")


def accepted(name: str) -> str:
    """What an argument or constant takes, in words."""
    kind, *limits = ACCEPTED[name.lower()]
    if kind in (int, float):
        return f"{'an integer' if kind is int else 'a number'} from {limits[0]} to {limits[1]}"
    return {str: " | ".join(map(repr, limits)), bool: "True | False", Path: "a folder"}[kind]


def checked(name: str, value: object) -> int | float | bool | str:
    """`value` in the type that `name` has; ValueError that names it, the value and what is accepted.

    A whole float serves as an integer, and a `Path` as the text of a folder, in which ~ is the home folder.
    """
    kind, *limits = ACCEPTED[name.lower()]
    if kind is Path and isinstance(value, str | Path):
        return str(os.path.expanduser(value))
    if kind is bool and isinstance(value, bool | np.bool_):
        return bool(value)
    if kind is str and isinstance(value, str) and value.lower() in limits:
        return str(value).lower()
    is_number = kind in (int, float) and isinstance(value, Real) and not isinstance(value, bool)
    if is_number and limits[0] <= value <= limits[1] and (kind is float or value % 1 == 0):  # false for NaN
        return kind(value)
    shown = " ".join(repr(value).split())  # in one line
    raise ValueError(f"{name} is {shown}, accepted is {accepted(name)}")


class UserError(Exception):
    """Something that only the user can mend; the message names it and the remedy."""


@contextlib.contextmanager
def explained(trouble: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library or the disk raises inside into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{trouble}: {error or type(error).__name__}\n{remedy}") from error


# --- Flat parameter vectors ---
def get_params(model: nn.Module) -> Tensor:
    """All parameters as one detached vector `(params,)`, in the order of `model.parameters()`."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def set_params(model: nn.Module, params: Tensor) -> None:
    """Copy a vector `(params,)` of `get_params` into the model; ValueError for a wrong length."""
    present = get_params(model)
    if params.shape != present.shape:
        raise ValueError(f"the model has {len(present)} parameters, not {tuple(params.shape)}")
    nn.utils.vector_to_parameters(present.copy_(params), model.parameters())


def slerp(t: float | Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Spherical interpolation sin((1 - t) Ω) / sin Ω · a + sin(t Ω) / sin Ω · b, `(params,)`; Ω is their angle.

    `t` is a number or a tensor that is broadcast: `(n, 1)` gives n vectors, `(params,)` has one for each parameter.
    Parallel, opposite and zero vectors are interpolated linearly.
    """
    omega = torch.acos(torch.dot(a, b) / (a.norm() * b.norm()))  # NaN for zeros, or a cosine rounded to beyond 1
    omega = torch.where(omega.sin() > 1e-3, omega, 1e-4)  # float32 resolves no smaller angle; 1e-4 is linear
    sin = omega.sin()
    return ((1 - t) * omega).sin() / sin * a + (t * omega).sin() / sin * b


# --- Model ---
class MLP(LightningModule):
    """Images `(examples, ...)` → hidden ReLU layer → logits `(examples, classes)`; `MLP(64, 256)` is the paper's.

    ValueError for dimensions that are no positive integers.
    """

    def __init__(self, input_dim: int, hidden_dim: int = HIDDEN_DIM, output_dim: int = 10) -> None:
        super().__init__()
        input_dim, hidden_dim = checked("input_dim", input_dim), checked("hidden_dim", hidden_dim)
        self.hidden = nn.Linear(input_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, checked("output_dim", output_dim))

    def forward(self, images: Tensor) -> Tensor:
        # self.output(self.hidden(images.flatten(1)).relu()), with the logits of a class side by side in memory: what is
        # then done to them, class by class, is twice as fast.
        hidden = self.hidden(images.flatten(1)).relu_()
        return torch.addmm(self.output.bias[:, None], self.output.weight, hidden.T).T

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


# --- Data ---
IDX_FILES = {  # the real files, unpacked: number of items and their CRC-32
    "train-images-idx3-ubyte": (60_000, 0xF3639B56),
    "train-labels-idx1-ubyte": (60_000, 0xBA07E8EF),
    "t10k-images-idx3-ubyte": (10_000, 0xE4CA5F57),
    "t10k-labels-idx1-ubyte": (10_000, 0xEE8604D9),
}


class MNISTDataModule(LightningDataModule):
    """MNIST as whole tensors for the archive loop, and as loaders for a Lightning `Trainer`.

    `train_images` and `test_images` are float32 `(examples, 1, image_size, image_size)`, less the mean training image
    and over the training set's standard deviation; `train_labels` and `test_labels` are int64 `(examples,)`.
    `checksum` is that of all pixels and labels. ValueError for arguments that are not accepted; UserError for files
    that cannot be downloaded or are not whole.
    """

    def __init__(self, data_dir: str | Path = DATA_DIR, image_size: int = IMAGE_SIZE, batch_size: int = 128) -> None:
        super().__init__()
        self.raw_dir = Path(checked("data_dir", data_dir), "MNIST", "raw")  # torchvision's layout
        self.image_size = checked("image_size", image_size)
        self.batch_size = checked("batch_size", batch_size)

    def prepare_data(self) -> None:
        """Download the files that are missing, if any; each gets its name only when whole."""
        remedy = f"Try again, or put the four unpacked files {', '.join(IDX_FILES)} into {self.raw_dir}, or point "
        with explained("MNIST could not be downloaded", remedy + "DATA_DIR at the folder whose MNIST/raw holds them."):
            missing = [name for name in IDX_FILES if not (self.raw_dir / name).exists()]
            if missing:
                socket.setdefaulttimeout(30)  # seconds of silence; torchvision would wait for ever
                self.raw_dir.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=self.raw_dir) as folder:
                    mnist.MNIST(folder, download=True)
                    for name in missing:
                        os.replace(Path(folder, "MNIST", "raw", name), self.raw_dir / name)

    def setup(self, stage: str | None = None) -> None:
        """Read the files whole and make the tensors; one as long as MNIST's must be MNIST's."""
        self.checksum = 0
        train_images, train_labels, test_images, test_labels = self._read(*IDX_FILES)
        train, test = (
            nn.functional.adaptive_avg_pool2d(images[:, None] / 255, self.image_size)
            for images in (train_images, test_images)
        )
        mean, std = train.mean(dim=0), train.std()
        self.train_images, self.train_labels = (train - mean) / std, train_labels.long()
        self.test_images, self.test_labels = (test - mean) / std, test_labels.long()

    def _read(self, *names: str) -> list[Tensor]:
        """The uint8 tensors of the files, images before their labels."""
        tensors = []
        for name in names:
            path, (items, crc) = self.raw_dir / name, IDX_FILES[name]
            with explained(f"{path} is not a whole MNIST file", "Delete it and run again, or check DATA_DIR."):
                values = mnist.read_sn3_pascalvincent_tensor(path)
                shape = (len(tensors[-1]),) if "labels" in name else (len(values), 28, 28)
                altered = len(values) == items and zlib.crc32(values.numpy()) != crc
                if altered or values.shape != shape or ("labels" in name and values.max() > 9):
                    raise ValueError("its checksum or shape is wrong, or a label is above 9")
            self.checksum = zlib.crc32(values.numpy(), self.checksum)
            tensors.append(values)
        return tensors

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.train_images, self.train_labels), self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.test_images, self.test_labels), self.batch_size)


# --- M2N2 ---
def check_examples(split: str, images: Tensor, labels: Tensor, like: Tensor) -> None:
    """ValueError unless these are floating-point images like `like`, at least one, each with an int64 label."""
    if not images.is_floating_point() or len(images) == 0 or images.shape[1:] != like.shape[1:]:
        shape = ("examples", *like.shape[1:])
        raise ValueError(f"{split}_images is {images.dtype} {tuple(images.shape)}, accepted is floating-point {shape}")
    if labels.dtype != torch.long or labels.shape != images.shape[:1] or labels.min() < 0:
        accepts = f"int64 ({len(images)},) from 0 up"
        raise ValueError(f"{split}_labels is {labels.dtype} {tuple(labels.shape)}, accepted is {accepts}")
    if not images.device == labels.device == like.device or images.dtype != like.dtype:
        raise ValueError(
            f"{split}_images is {images.dtype} on {images.device}, {split}_labels on {labels.device}, "
            f"accepted is {like.dtype} on {like.device}, where train_images is"
        )


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The true class's logit less the highest other, `(examples,)`, for logits `(classes, examples)`.

    An example counts as classified correctly, in scores as in accuracies, where this is above 0: a tie is an error.
    """
    return logits.gather(0, labels[None])[0] - logits.scatter(0, labels[None], -torch.inf).amax(dim=0)


class M2N2:
    """Model Merging of Natural Niches: a steady-state evolution of an archive of K models.

    Works with any `model` from images to logits `(examples, classes)`, on the images' device and in their precision;
    the archive stays float32. All parameters evolve, frozen ones too; buffers stay the model's own, and it is
    evaluated as after `model.eval()`. Symbols are the paper's: s_ij in [0, 1] is the score of model i on training
    example j, z_j = Σ_i s_ij, f_i the fitness of model i. The archive starts as K empty slots (zeros), into which
    `initial_models`, by default two random ones, are put like children. Under torch.distributed each process holds
    the whole archive and its part of the training examples. ValueError for arguments that are not accepted.

    Attributes: `archive` (archive, params), `scores` (archive, examples of this process), `iteration` (children so
    far), `history` (the rows that `evolve` measured), `schedule` (children over which σ falls; 0 until the first
    `evolve` sets it to its end).
    """

    def __init__(
        self,
        model: nn.Module,
        train_images: Tensor,
        train_labels: Tensor,
        test_images: Tensor,
        test_labels: Tensor,
        *,
        archive_size: int = ARCHIVE_SIZE,
        score: str = SCORE,
        temperature: float = TEMPERATURE,
        alpha: float = ALPHA,
        init_std: float = INIT_STD,
        mutation_std: float = MUTATION_STD,
        final_mutation_std: float = FINAL_MUTATION_STD,
        schedule: int = 0,
        use_crossover: bool = USE_CROSSOVER,
        use_split_point: bool = USE_SPLIT_POINT,
        use_attraction: bool = USE_ATTRACTION,
        use_mirroring: bool = USE_MIRRORING,
        eval_batch_size: int = EVAL_BATCH_SIZE,
        initial_models: Sequence[nn.Module] = (),
        seed: int = SEED,
    ) -> None:
        self.archive_size = checked("archive_size", archive_size)
        self.score = checked("score", score)
        self.temperature = checked("temperature", temperature)
        self.alpha = checked("alpha", alpha)
        self.init_std = checked("init_std", init_std)
        self.mutation_std = checked("mutation_std", mutation_std)
        self.final_mutation_std = checked("final_mutation_std", final_mutation_std)
        self.schedule = checked("schedule", schedule)
        self.use_crossover = checked("use_crossover", use_crossover)
        self.use_split_point = checked("use_split_point", use_split_point)
        self.use_attraction = checked("use_attraction", use_attraction)
        self.use_mirroring = checked("use_mirroring", use_mirroring)
        self.eval_batch_size = checked("eval_batch_size", eval_batch_size)
        self._generator = torch.Generator(train_images.device).manual_seed(checked("seed", seed))
        self._take_examples(train_images, train_labels, test_images, test_labels)
        self._take_model(model)
        self._make_archive(map(get_params, initial_models))

    def _take_examples(self, train_images: Tensor, train_labels: Tensor, *test: Tensor) -> None:
        """All test examples, and of the training examples this process's part."""
        check_examples("train", train_images, train_labels, train_images)
        check_examples("test", *test, train_images)
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if len(train_images) < processes:
            raise ValueError(f"train_images has {len(train_images)} examples, accepted is one a process, {processes}")
        self.train_images = train_images.tensor_split(processes)[rank].contiguous()
        self.train_labels = train_labels.tensor_split(processes)[rank].contiguous()
        self.test_images, self.test_labels = test
        self._class_sizes = train_labels.bincount()  # (classes,), of all processes
        self.eval_batch_size = self.eval_batch_size or (len(train_images) if train_images.is_cuda else 10_000)
        self._random = {"device": train_images.device, "generator": self._generator}

    def _take_model(self, model: nn.Module) -> None:
        """A copy to evaluate, on the images' device, in their precision; ValueError if it does not fit the labels."""
        self.model = model
        self._evaluated = (
            deepcopy(model).to(self.test_images.device, self.test_images.dtype).eval().requires_grad_(False)
        )
        self._weights = get_params(self._evaluated)  # (params,), of which its parameters are views: loading is one copy
        nn.utils.vector_to_parameters(self._weights, self._evaluated.parameters())
        images = self.test_images[:2].clone()
        with torch.no_grad():
            shape = tuple(getattr(self._evaluated(images), "shape", ()))
        if len(shape) != 2 or shape[0] != len(images):
            raise ValueError(f"model answers {shape} to {len(images)} images, accepted is (images, classes)")
        if not images.equal(self.test_images[:2]):
            raise ValueError("model changes the images it is given, accepted is one that leaves them as they are")
        if (last := max(len(self._class_sizes) - 1, self.test_labels.max().item())) >= shape[1]:
            raise ValueError(f"labels go up to {last}, accepted is 0 to {shape[1] - 1}, as the model answers")

    def _make_archive(self, initial: Iterator[Tensor]) -> None:
        """Empty slots, into which the `initial` parameters, or two random models, are put like children."""
        # A row holds a model and its scores, the last one the child's. That is copied onto the row that goes, itself if
        # the child loses: no branch, and no interrupt can leave a model with another's scores.
        params, examples, device = len(self._weights), len(self.train_labels), self._weights.device
        self._rows = torch.zeros(self.archive_size + 1, params + examples, device=device)
        self._models, self._scores = self._rows.split([params, examples], dim=1)
        self.archive, self._child = self._models[:-1], self._models[-1]
        self.scores, self._child_scores = self._scores[:-1], self._scores[-1]
        self._positions = torch.arange(params, device=device)
        self._sigma = torch.full((1,), self.mutation_std, device=device)
        self._base, self._noise = torch.zeros(2, params, device=device)  # of the last mutation
        self._lost = torch.zeros(1, dtype=torch.bool, device=device)  # whether it is to be mirrored
        self._accepted = torch.zeros(1, device=device)  # children since the last row of history
        self._replay, self._warm_ups = None, 3 if self._weights.is_cuda else 0
        self.iteration, self.history = 0, []
        random = (self.init_std * torch.randn(params, **self._random) for _ in range(2))
        for model in list(initial) or random:
            if len(model) != params:
                raise ValueError(f"initial_models have {len(model)} parameters, accepted is the model's {params}")
            self._evaluate(model.to(device))
            self._update_archive()
        self._accepted.zero_()
        self._lost.zero_()

    def evolve(self, iterations: int, test_every: int = TEST_EVERY, after_child: Callable = lambda m2n2: False) -> None:
        """Make `iterations` more children, or until `after_child(self)` is true; every `test_every`, extend `history`.

        σ falls over the `schedule`, by default to the end of the first call, and stays at its final value beyond.
        """
        end = self.iteration + checked("iterations", iterations)
        test_every = checked("test_every", test_every)
        self.schedule = self.schedule or end
        terminal = sys.stderr.isatty()  # elsewhere, in a cluster's log say, a line every 10 seconds
        # A narrow terminal cuts the end off, so the figures come before the times.
        layout = "{desc}: {percentage:3.0f}%{postfix} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        options = {"bar_format": layout + "\n" * (not terminal), "mininterval": 0.1 if terminal else 10}
        options |= {"initial": self.iteration, "disable": rank_zero_only.rank > 0}
        with tqdm(None, "Evolving Models", end, **options) as bar:
            while self.iteration < end:
                self._sigma.fill_(self._sigma_now())
                self._next_child()
                self.iteration += 1
                bar.update()
                if self.iteration % test_every == 0 or self.iteration == end:
                    self.history.append(row := self._measure())
                    shown = {name: f"{row[name]:.2%}" for name in ("train_acc", "test_acc")}
                    bar.set_postfix(best_fitness=f"{row['best_fitness']:.0f}", **shown, refresh=terminal)
                if after_child(self):
                    break

    def _sigma_now(self) -> float:
        """σ, which falls by half a cosine from `mutation_std` to `final_mutation_std`."""
        wave = (1 + np.cos(np.pi * min(self.iteration, self.schedule) / self.schedule)) / 2  # 1 to 0
        return self.final_mutation_std + (self.mutation_std - self.final_mutation_std) * wave

    @torch.inference_mode()
    def _step(self) -> None:
        """One child, from its parents to its place in the archive; the host waits for nothing."""
        parent_a, parent_b = self._select_parents()
        child = self._crossover(parent_a, parent_b)
        self._evaluate(self._mutate(child))
        self._update_archive()

    def _next_child(self) -> None:
        """A step. On CUDA, after a few of them, the replay of a graph captured of it once: a single launch."""
        (self._replay or self._step)()
        if self._warm_ups:
            self._warm_ups -= 1
            self._replay = None if self._warm_ups else self._captured_step()

    def _captured_step(self) -> Callable[[], None] | None:
        """The replay of `_step` as a CUDA graph, or None where the model makes the host wait."""
        graph, device, state = torch.cuda.CUDAGraph(), self._weights.device, self._generator.get_state()
        try:
            if torch.__version__ < "2.14":  # from there on a generator is registered on its first use
                graph.register_generator_state(self._generator)
            before = torch.cuda.stream(torch.cuda.current_stream(device))  # to which a failed capture would not return
            options = {"stream": torch.cuda.Stream(device), "capture_error_mode": "thread_local"}
            with torch.cuda.device(device), before, torch.cuda.graph(graph, **options):
                self._step()
        except RuntimeError as error:
            if rank_zero_only.rank == 0:
                tqdm.write(
                    f"No CUDA graph, which is slower: the step cannot be captured ({str(error).splitlines()[0]})"
                )
            self._generator = torch.Generator(device)  # the other may be stuck
            self._generator.set_state(state)
            self._random["generator"] = self._generator
            return None
        return graph.replay

    def _select_parents(self) -> tuple[Tensor, Tensor]:
        """Indices `(1,)`: P(A) = f_A / Σ f; P(B) = g_B / Σ g, the attraction g_B = Σ_j max(s_Bj - s_Aj, 0) / z_j^α."""
        fitness, example_weights = self._update_fitness(self.scores)
        parent_a = self._draw(fitness)
        if not self.use_attraction:
            return parent_a, self._draw(fitness)
        gain = (self.scores - self.scores.index_select(0, parent_a)).relu_()  # (archive, examples)
        attraction = self._sum(gain @ example_weights).index_fill_(0, parent_a, 1e-30)  # B = A if all g are 0
        return parent_a, self._draw(attraction)

    def _draw(self, weights: Tensor) -> Tensor:
        """An index `(1,)` with probability weights / Σ weights; torch.multinomial would make the host wait."""
        noise = torch.empty_like(weights).exponential_(generator=self._generator)
        return torch.argmax(weights / noise, dim=0, keepdim=True)

    def _crossover(self, parent_a: Tensor, parent_b: Tensor) -> Tensor:
        """Child `(params,)`: SLERP(w) before the split point p, SLERP(1 - w) after; w ~ U(0, 1), p ~ U{0..params-1}."""
        a, b = self.archive.index_select(0, torch.cat([parent_a, parent_b]))
        if not self.use_crossover:
            return a
        w = torch.rand(1, **self._random)
        if not self.use_split_point:
            return slerp(w, a, b)
        split_point = torch.randint(len(a), (1,), **self._random)
        before, after = slerp(torch.stack([w, 1 - w]), a, b)
        return torch.where(self._positions < split_point, before, after)

    def _mutate(self, child: Tensor) -> Tensor:
        """child + σ N(0, 1), with σ set by `evolve`.

        Mirrored mutation (Brockhoff et al. 2010, sequential): if the child before lost its place at once, it is tried
        again instead, with the same crossover and the opposite noise; not a third time.
        """
        noise = self._sigma * torch.randn(len(child), **self._random)
        if self.use_mirroring:
            child = self._base.copy_(torch.where(self._lost, self._base, child))
            noise = self._noise.copy_(torch.where(self._lost, -self._noise, noise))
        return child + noise

    def _evaluate(self, child: Tensor) -> None:
        """Fill the child's row: s_j is softmax(logits / temperature) of the true class, or 1 if correct, else 0.

        NaN where the model overflows.
        """
        logits = self.logits(child, self.train_images)
        if self.score == "probability":
            probabilities = (logits / self.temperature).softmax(dim=0)
            self._child_scores.copy_(probabilities.gather(0, self.train_labels[None])[0])
        else:
            margin = margins(logits, self.train_labels)
            self._child_scores.copy_((margin > 0) + 0 * margin)  # 0 · inf is NaN, as a softmax is
        self._child.copy_(child)

    @torch.no_grad()
    def logits(self, params: Tensor, images: Tensor) -> Tensor:
        """Logits `(classes, examples)` of the model with the parameters `(params,)`, evaluated a batch at a time.

        Fresh memory costs more than arithmetic, and what a layer of a batch used serves the next one.
        """
        self._weights.copy_(params)
        batches = [self._evaluated(batch).T.float() for batch in images.split(self.eval_batch_size)]
        return torch.cat(batches, dim=1)  # and so no memory that the model owns

    def _update_fitness(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """f_i = Σ_j s_ij / z_j^α, 0 where z_j = 0, `(models,)`, and the examples' weights 1 / z_j^α, `(examples,)`.

        A child that overflows gets NaN, and takes no part in z.
        """
        example_weights = scores.nansum(dim=0).clamp_(min=1e-12).pow_(-self.alpha)
        # A matrix product may sum equal rows to different bits; here ties must be ties.
        return self._sum(torch.linalg.vecdot(scores, example_weights)), example_weights

    def _update_archive(self) -> None:
        """The worst of the K + 1 goes: the first of equals, and NaN before any number."""
        fitness, _ = self._update_fitness(self._scores)
        worst = torch.argmin(fitness, dim=0, keepdim=True)
        self._rows.index_copy_(0, worst, self._rows[-1:].clone())
        lost = worst == self.archive_size
        self._accepted += ~lost
        self._lost.copy_(lost & ~self._lost)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, each with its part of the examples."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    def _measure(self) -> dict[str, float]:
        """A row of `history`.

        `coverage` is the share of training examples that at least one member classifies correctly. `diversity` is the
        share that one of two members does and the other does not, mean over all pairs: the disagreement measure
        (Skalak 1996; Kuncheva & Whitaker 2003), Σ_j n_j (K - n_j) / (N K (K - 1) / 2) with n_j members right on j.
        `acceptance` is the share of the children since the row before that entered the archive.
        """
        right, examples = self._right(), self._class_sizes.sum().item()
        hits, members = self._sum(right.sum(dim=1)), self.archive.any(dim=1).sum().item()
        known_by = right.sum(dim=0)  # (examples,)
        disagreements = self._sum((known_by * (members - known_by)).sum()).item()
        row = {
            "iteration": self.iteration,
            "best_fitness": self._update_fitness(self.scores)[0].max().item(),
            "train_acc": hits.max().item() / examples,
            "test_acc": self.test_accuracy(self.archive[hits.argmax()][None]),
            "coverage": self._sum((known_by > 0).sum()).item() / examples,
            "diversity": disagreements / examples / max(1, members * (members - 1) / 2),
            "acceptance": self._accepted.item() / (self.iteration - sum(r["iteration"] for r in self.history[-1:])),
        }
        self._accepted.zero_()
        return row

    def _right(self) -> Tensor:
        """Which training examples each member classifies correctly, bool `(archive, examples)`; an empty slot none."""
        right = [margins(self.logits(params, self.train_images), self.train_labels) > 0 for params in self.archive]
        return torch.stack(right) & self.archive.any(dim=1, keepdim=True)

    def class_hits(self) -> Tensor:
        """How many training examples of each class each member classifies correctly, `(archive, classes)`."""
        classes = nn.functional.one_hot(self.train_labels, len(self._class_sizes))
        return self._sum(self._right().float() @ classes.float())

    def test_accuracy(self, models: Tensor) -> float:
        """Test accuracy of the mean of the probabilities of some models `(models, params)`."""
        logits = (self.logits(params, self.test_images) for params in models)
        probabilities = sum((x / self.temperature).softmax(dim=0) for x in logits)
        return (margins(probabilities, self.test_labels) > 0).sum().item() / len(self.test_labels)

    def best_model(self) -> nn.Module:
        """The archive member with the highest training accuracy, as a model of its own, in evaluation mode."""
        best = deepcopy(self.model).eval()
        set_params(best, self.archive[self.class_hits().sum(dim=1).argmax()])
        return best

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "iteration": self.iteration,
            "schedule": self.schedule,
            "history": list(self.history),
            "accepted": self._accepted.clone(),
            "archive": self.archive.clone(),
            "mirror": (self._base.clone(), self._noise.clone(), self._lost.clone()),
            "generator": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take up the state of an equal M2N2; the scores are computed anew. A schedule of its own is kept."""
        if state["archive"].shape != self.archive.shape:
            raise ValueError(f"state is of {tuple(state['archive'].shape)}, accepted is {tuple(self.archive.shape)}")
        for row, params in enumerate(state["archive"].to(self.archive)):
            self._evaluate(params)
            self.archive[row] = params
            self.scores[row] = torch.where(params.any(), self._child_scores, 0)  # zeros: an empty slot
        self._generator.set_state(state["generator"])
        for own, saved in zip((self._base, self._noise, self._lost), state["mirror"], strict=True):
            own.copy_(saved)
        self._accepted.copy_(state["accepted"])
        self.schedule = self.schedule or state["schedule"]
        self.iteration, self.history = state["iteration"], list(state["history"])


# --- Outputs ---
@rank_zero_only
def atomic_save(save: Callable[[io.BytesIO], object], path: Path) -> None:
    """What `save` writes, to a temporary file that is moved into place: whole or not at all."""
    buffer, temporary = io.BytesIO(), path.with_suffix(".tmp")
    save(buffer)
    with explained(f"{path} could not be written", "Make room, then RESUME the last checkpoint."):
        try:
            temporary.write_bytes(buffer.getbuffer())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@rank_zero_only
def plot_evolution(histories: Sequence[list[dict]], niches: Tensor, path: Path) -> None:
    """Left: accuracy, coverage, diversity, mean ± SD of runs. Right: `niches`, what tells the members apart.

    `niches` `(archive, classes)` is each member's training accuracy on a digit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("No figure without matplotlib: `pip install matplotlib` to get evolution.png.")
    figure, rows = Figure(figsize=(7.2, 2.9), layout="constrained"), list(zip(*histories, strict=False))
    left, right = figure.subplots(1, 2)
    children = [runs[0]["iteration"] / 1_000 for runs in rows]
    labels = {"coverage": "training coverage", "test_acc": "test accuracy", "diversity": "training diversity"}
    for key, label in labels.items():
        values = np.reshape([[100 * run[key] for run in runs] for runs in rows], (-1, len(histories)))
        mean, std = values.mean(axis=1), values.std(axis=1, ddof=min(1, len(histories) - 1))
        left.plot(children, mean, label=label)
        left.fill_between(children, mean - std, mean + std, alpha=0.3)
    left.legend(loc="center right")
    title = f"Evolution, mean ± SD of {len(histories)} runs" if len(histories) > 1 else "Evolution"
    left.set(xlabel="children evaluated (thousands)", ylabel="examples (%)", title=title)
    right.set(xlabel="digit", ylabel="archive member", title="Niches: training accuracy", xticks=range(10))
    difference = 100 * (niches - niches.mean(dim=0)).numpy()
    limit = max(0.1, np.abs(difference).max())
    image = right.imshow(difference, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
    figure.colorbar(image, label="points above the mean")
    atomic_save(partial(figure.savefig, dpi=200), path)


# --- The command line ---
def constants_of_the_file() -> dict[str, object]:
    """The constants at the top, each checked."""
    return {name.upper(): checked(name.upper(), globals()[name.upper()]) for name in CONSTANTS}


def flag_of(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def value_of(name: str, text: str) -> object:
    """A flag's text as the constant would hold it: 1e4, true and FALSE are what they mean."""
    if ACCEPTED[name][0] in (int, float, bool):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(text.strip().title())
    return text


def parse_constants(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, object]]:
    """The constants at the top, overridden from the command line, each checked; and those that were overridden."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--constant VALUE]...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    text = Path(__file__).read_text(encoding="utf-8", errors="replace").partition("\nCONSTANTS")[0]
    comments = dict(re.findall(r"^([A-Z_]+)\b.*# *(.*)$", text, re.M))  # of use to --help alone
    for name in CONSTANTS:
        default = globals()[name.upper()]
        meaning = f"{comments.get(name.upper(), '')} [{accepted(name)}] (default: {default!r})".strip()
        parser.add_argument(flag_of(name), dest=name.upper(), help=meaning.replace("%", "%%"))
    flags = vars(parser.parse_args(argv))
    try:
        flags = {name: checked(name, value_of(name.lower(), text)) for name, text in flags.items()}
        constants = argparse.Namespace(**constants_of_the_file() | flags)
        if constants.START == "specialists":
            for name, value in MERGED_ALONE.items():
                if flags.get(name, value) != value:
                    raise ValueError(f"{name} is {flags[name]}, but the specialists are merged without mutation")
            vars(constants).update(MERGED_ALONE)
        if constants.RESUME and flags.get("RUNS", 1) > 1:
            raise ValueError(f"RUNS is {constants.RUNS}, but RESUME goes on with one run")
        if (last := constants.SEED + constants.RUNS - 1) > ACCEPTED["seed"][2]:
            raise ValueError(
                f"RUNS is {constants.RUNS}, with which SEED goes up to {last}, accepted is {accepted('seed')}"
            )
    except ValueError as error:
        parser.exit(2, f"Error: {error}\n")
    return constants, flags


def resume(constants: argparse.Namespace, flags: dict[str, object]) -> dict:
    """The checkpoint in RESUME, whose constants these become, but for what is given now and may change.

    Given is a flag, or a constant that the file has with another value than at the time. UserError for one that must
    not change, and unless the checkpoint is whole.
    """
    path = Path(constants.RESUME, "checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before, file, state = (dict(checkpoint[name]) for name in ("constants", "file", "m2n2"))
        if before.keys() != vars(constants).keys() or not {"archive", "mirror"} <= state.keys():
            raise ValueError("of another version")
    except Exception as error:  # whose own text may tell how to run the code in the file
        raise UserError(f"{path} is no whole checkpoint of this script. RESUME wants a run's folder.") from error
    given = {name: now for name, now in constants_of_the_file().items() if now != file.get(name, now)} | flags
    for name in ("ITERATIONS", "CHECKPOINT_EVERY", "RESUME", "DATA_DIR", "OUTPUT_DIR"):
        before[name] = given.pop(name, before[name])
    if before["ITERATIONS"] < (done := state["iteration"]):
        raise UserError(f"ITERATIONS is {before['ITERATIONS']}, but the run to RESUME has had {done}. Set it higher.")
    given.pop("RUNS", None)  # it is one run
    for name, now in given.items():
        if now not in ("auto", was := before.get(name)):
            remedy = f"Give {flag_of(name)}={was}, or start afresh."  # a flag: the file may compute the value anew
            raise UserError(f"{name} is {now!r}, but {was!r} in the run to RESUME. {remedy}")
    vars(constants).update(before)
    return checkpoint


def command(fabric: Fabric, *flags: str) -> str:
    """What starts this script again, on as many processes."""
    torchrun = ["torchrun", f"--nproc_per_node={fabric.world_size}", "--"]  # which would take --start for its own
    launcher = torchrun if fabric.world_size > 1 else ["python"]
    return shlex.join([*launcher, sys.argv[0], *flags])


class Interruption:
    """Ctrl-C or SIGTERM: the first is noted, so that all is saved before the end; a second one is the end."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.signal = fabric, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> int:
        """The signal that any of the processes got, the same in all of them; or 0."""
        if self.fabric.world_size > 1:
            self.signal = int(self.fabric.all_reduce(self.signal, reduce_op="max"))
        return self.signal


# --- A run ---
def launch(constants: argparse.Namespace) -> Fabric:
    """The device and, under torchrun, the processes; resolves ACCELERATOR."""
    if constants.ACCELERATOR == "auto":
        constants.ACCELERATOR = "cuda" if torch.cuda.is_available() else "cpu"
    here, everywhere = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    with explained(f"ACCELERATOR is {constants.ACCELERATOR!r}", "Set it to 'auto' or 'cpu', unless RESUME needs it."):
        fabric = Fabric(accelerator=constants.ACCELERATOR, devices=here, num_nodes=everywhere // here)
    fabric.launch()
    return fabric


def load_data(constants: argparse.Namespace, fabric: Fabric) -> MNISTDataModule:
    """The data, downloaded by one process of each machine."""
    data = MNISTDataModule(constants.DATA_DIR, constants.IMAGE_SIZE)
    with fabric.rank_zero_first(local=True):
        data.prepare_data()
    data.setup()
    return data


def train_specialists(data: MNISTDataModule, hidden_dim: int, fabric: Fabric) -> list[MLP]:
    """Two MLPs, one trained for an epoch by gradient descent on digits 0 to 4, one on 5 to 9."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    models = [MLP(data.image_size**2, hidden_dim) for _ in range(2)]
    for model, chosen in zip(models, (data.train_labels < 5, data.train_labels > 4), strict=True):
        half = TensorDataset(data.train_images[chosen], data.train_labels[chosen])
        trainer = Trainer(accelerator="cpu", devices=1, plugins=LightningEnvironment(), max_epochs=1, barebones=True)
        trainer.fit(model, DataLoader(half, data.batch_size, shuffle=True))
        set_params(model, fabric.broadcast(get_params(model)))
    return models


def build(constants: argparse.Namespace, fabric: Fabric, data: MNISTDataModule) -> M2N2:
    """The M2N2 of these constants, on the device and in the precision."""
    seed_everything(constants.SEED, verbose=False)
    taken = inspect.signature(M2N2).parameters
    settings = {name.lower(): value for name, value in vars(constants).items() if name.lower() in taken}
    if constants.START == "specialists":
        settings["initial_models"] = train_specialists(data, constants.HIDDEN_DIM, fabric)
    model = MLP(constants.IMAGE_SIZE**2, constants.HIDDEN_DIM)
    dtype = DTYPES[constants.PRECISION]
    tensors = data.train_images.to(dtype), data.train_labels, data.test_images.to(dtype), data.test_labels
    return M2N2(model, *(x.to(fabric.device) for x in tensors), schedule=constants.ITERATIONS, **settings)


def open_logger(constants: argparse.Namespace) -> CSVLogger:
    """The run's folder, with its constants in hparams.yaml; metrics.csv is written anew, also when it is resumed."""
    warnings.filterwarnings("ignore", module="lightning_fabric|pytorch_lightning")  # no rows are lost
    where = (constants.RESUME, "", "") if constants.RESUME else (constants.OUTPUT_DIR, "m2n2_mnist")
    with explained(f"{Path(*where)} cannot be written", "Choose another OUTPUT_DIR."):
        logger = CSVLogger(*where, flush_logs_every_n_steps=1)
        logger.log_hyperparams(vars(constants))
    return logger


def announce(constants: argparse.Namespace, fabric: Fabric, data: MNISTDataModule, m2n2: M2N2) -> None:
    place = f"{fabric.device}, {constants.PRECISION}, {fabric.world_size} process(es)"
    images = f"{len(data.train_images):,} + {len(data.test_images):,} images from {constants.DATA_DIR}"
    fabric.print(
        f"M2N2 on {place}; MLP of {m2n2.archive.shape[1]:,} parameters; {images}; seed {constants.SEED}", flush=True
    )
    if m2n2.iteration >= constants.ITERATIONS:
        fabric.print(f"Already finished, at iteration {m2n2.iteration:,} of {constants.ITERATIONS:,}.")


def report(fabric: Fabric, data: MNISTDataModule, m2n2: M2N2, histories: list[list[dict]], folder: Path) -> float:
    """The best model, the figure, and the run's last lines; the test accuracy of that model."""
    best = m2n2.best_model()
    atomic_save(partial(torch.save, best.state_dict()), folder / "best_model.pt")
    plot_evolution(histories, m2n2.class_hits().cpu() / data.train_labels.bincount(), folder / "evolution.png")
    fabric.print(
        f"Test accuracy of the archive as an ensemble: {m2n2.test_accuracy(m2n2.archive):.2%}\nFiles: {folder}"
    )
    if m2n2.iteration < m2n2.schedule:
        fabric.print(f"To go on: {command(fabric, f'--resume={folder}')}")
        fabric.print(f"Evolution interrupted at iteration {m2n2.iteration}.")
    else:
        fabric.print("Evolution finished.")
    with torch.no_grad():  # of the very file, in float32
        right = best(data.test_images).argmax(dim=1) == data.test_labels
    accuracy = right.sum().item() / len(right)
    fabric.print(f"Final Test Accuracy of the best model: {accuracy:.2%}", flush=True)
    return accuracy


def run(
    constants: argparse.Namespace,
    fabric: Fabric,
    data: MNISTDataModule,
    interruption: Interruption,
    histories: list[list[dict]],
    state: dict | None,
) -> float:
    """One run, from its folder to its last line: its test accuracy. Its history joins the others'."""
    logger, m2n2 = open_logger(constants), build(constants, fabric, data)
    if state:
        m2n2.load_state_dict(state)
        for row in m2n2.history:
            logger.log_metrics(row, row["iteration"])

    def save_checkpoint() -> None:
        known = {"constants": vars(constants) | {"RUNS": 1}, "file": constants_of_the_file(), "checksum": data.checksum}
        atomic_save(partial(torch.save, known | {"m2n2": m2n2.state_dict()}), Path(logger.log_dir, "checkpoint.pt"))

    def after_child(m2n2: M2N2) -> bool:
        if m2n2.history and m2n2.history[-1]["iteration"] == m2n2.iteration:
            logger.log_metrics(m2n2.history[-1], m2n2.iteration)
        if m2n2.iteration % constants.CHECKPOINT_EVERY == 0:
            save_checkpoint()
        together = fabric.world_size == 1 or m2n2.iteration % 50 == 0  # all processes stop at the same child
        return together and interruption.agreed() > 0

    save_checkpoint()
    announce(constants, fabric, data, m2n2)
    first, started = m2n2.iteration, time.perf_counter()
    if first < constants.ITERATIONS:
        m2n2.evolve(constants.ITERATIONS - first, constants.TEST_EVERY, after_child)
    seconds, children = time.perf_counter() - started, m2n2.iteration - first
    save_checkpoint()
    histories.append(m2n2.history)
    fabric.print(f"{children:,} children in {seconds:.1f} s, {children / seconds:.1f} a second")
    return report(fabric, data, m2n2, histories, Path(logger.log_dir))


def run_all(constants: argparse.Namespace, flags: dict[str, object]) -> int:
    """All runs of the experiment; the number of the signal that interrupted it, or 0."""
    checkpoint = resume(constants, flags) if constants.RESUME else {}
    fabric = launch(constants)
    vars(constants).update(fabric.broadcast(vars(constants)))  # a file may compute another value in each process
    data = load_data(constants, fabric)
    if checkpoint and checkpoint["checksum"] != data.checksum:
        raise UserError("The images in DATA_DIR are not those of the run to RESUME. Point it at them, or start afresh.")
    interruption, histories, accuracies = Interruption(fabric), [], []
    for seed in range(constants.SEED, constants.SEED + constants.RUNS):
        this = argparse.Namespace(**vars(constants) | {"SEED": seed})
        accuracies.append(run(this, fabric, data, interruption, histories, checkpoint.get("m2n2")))
        if interruption.agreed():
            break
    left = constants.RUNS - len(histories)
    if left:
        others = command(fabric, *sys.argv[1:], f"--seed={seed + 1}", f"--runs={left}")
        fabric.print(f"The other runs: {others}", file=sys.stderr)
    elif constants.RUNS > 1 and not interruption.signal:
        std, mean = torch.std_mean(100 * torch.tensor(accuracies))
        fabric.print(f"Mean Test Accuracy of {constants.RUNS} runs: {mean:.2f} ± {std:.2f}%")
    fabric.barrier()  # torchrun ends the others when the first leaves with an error code
    return interruption.signal


def main() -> None:
    """The experiment of the constants; what only the user can mend ends in one message."""
    try:
        if caught := run_all(*parse_constants()):
            sys.exit(128 + caught)
    except (UserError, OSError) as error:
        sys.exit(f"Error: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error).lower():
            raise
        trouble = (str(error) or "no memory").splitlines()[0]
        sys.exit(f"Error: {trouble}\nLower HIDDEN_DIM, ARCHIVE_SIZE, IMAGE_SIZE or EVAL_BATCH_SIZE.")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SIGTERMException:  # Lightning's, while the specialists are trained
        sys.exit(128 + signal.SIGTERM)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
