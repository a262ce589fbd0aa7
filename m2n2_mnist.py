"""M2N2 on MNIST: classifiers evolved from scratch, without a gradient, by merging models.

It reaches 96.57 ± 0.08 % test accuracy (mean ± SD of seeds 42 to 44) with 50,000 forward passes of an MLP 100-96-10,
in 4 minutes on 2 cores of an Intel Xeon with bf16. This is Model Merging of Natural Niches, Experiment 1 of
"Competition and Attraction Improve Model Fusion" (Abrantes, Lange, Tang; arXiv:2508.16204), on the real MNIST.

    python m2n2_mnist.py                              # the experiment of the constants below
    python m2n2_mnist.py --iterations 1000 --seed 7   # any constant overridden; --help lists them
    torchrun --nproc_per_node 2 m2n2_mnist.py         # the examples split over processes
"""

import argparse
import contextlib
import io
import logging
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
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets.mnist import MNIST, read_sn3_pascalvincent_tensor
from tqdm import tqdm

# --- Constants: edit these. The brackets hold what is accepted; --help lists them all ---

# Run
SEED = 42  # seed of the first run [0, 4294967295]
RUNS = 1  # how often to repeat the experiment, with consecutive seeds [1, inf]
ITERATIONS = 50_000  # children evaluated in a run, which is forward passes [1, inf]
TEST_EVERY = 1_000  # iterations between two rows of metrics.csv [1, inf]
CHECKPOINT_EVERY = 2_500  # iterations between two checkpoints [1, inf]
RESUME = ""  # folder of an interrupted run to go on with, runs/m2n2_mnist/version_3; "" for none
DATA_DIR = "data"  # folder that holds MNIST, or gets it downloaded
OUTPUT_DIR = "runs"  # folder that gets m2n2_mnist/version_N for each run
# Model and data
IMAGE_SIZE = 10  # pixels a side: 28 is MNIST as it is, less is an area average [1, 28]
HIDDEN_DIM = 96  # hidden units of the MLP [1, inf]
# M2N2
START = "scratch"  # or trained on digits 0-4 and 5-9, then no mutation [scratch | specialists]
ARCHIVE_SIZE = 10  # models in the archive, K; the paper's 20 [2, inf]
SCORE = "probability"  # that of the true class, or the paper's 0/1 [probability | correct]
TEMPERATURE = 0.67  # of the softmax of the probability; higher is smoother [0.001, 1000.0]
ALPHA = 1.0  # competition: 1 shares each example among its models, 0 is a plain GA [0.0, 3.0]
INIT_STD = 0.01  # standard deviation of the two random models at the start [1.0e-12, 1e+30]
MUTATION_STD = 0.008  # standard deviation of the mutation at the start of a run [0.0, 1e+30]
FINAL_MUTATION_STD = 0.0007  # the same at its end; the paper's is constant [0.0, 1e+30]
USE_CROSSOVER = True  # False: a child is a mutated copy of its first parent [true | false]
USE_SPLIT_POINT = True  # False: one SLERP over the whole vector [true | false]
USE_ATTRACTION = True  # False: both parents are drawn by fitness [true | false]
# Hardware
ACCELERATOR = "auto"  # where to compute [auto | cpu | cuda]
PRECISION = "auto"  # of the evaluation; auto: bf16 if in hardware [auto | bf16-true | 32-true]


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

    `t` is a number or one for each parameter. Parallel, opposite and zero vectors are interpolated linearly.
    """
    omega = torch.acos(torch.dot(a, b) / (a.norm() * b.norm()))  # NaN for zeros, or a cosine rounded to beyond 1
    omega = torch.where(omega.sin() > 1e-3, omega, 1e-4)  # float32 resolves no smaller angle; 1e-4 is linear
    sin = omega.sin()
    return ((1 - t) * omega).sin() / sin * a + (t * omega).sin() / sin * b


# --- Model ---
class MLP(LightningModule):
    """Images `(examples, ...)` → hidden ReLU layer → logits `(examples, classes)`; `MLP(64, 256)` is the paper's."""

    def __init__(self, input_dim: int, hidden_dim: int = HIDDEN_DIM, output_dim: int = 10) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(input_dim, hidden_dim), nn.Linear(hidden_dim, output_dim)

    def forward(self, images: Tensor) -> Tensor:
        # relu(x + b) = max(x, -b) + b, and that + b moves on into the output's bias: memory is passed over less often.
        hidden = (images.flatten(1) @ self.hidden.weight.T).clamp_(min=-self.hidden.bias)
        bias = torch.addmv(self.output.bias, self.output.weight, self.hidden.bias)
        # (classes, examples) in memory: a softmax over the classes is then 20 times faster.
        return torch.addmm(bias[:, None], self.output.weight, hidden.T).T

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

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
    UserError for files that cannot be downloaded or are not whole.
    """

    def __init__(self, data_dir: str | Path = DATA_DIR, image_size: int = IMAGE_SIZE, batch_size: int = 128) -> None:
        super().__init__()
        self.raw_dir = Path(data_dir, "MNIST", "raw")  # torchvision's layout
        self.image_size, self.batch_size = image_size, batch_size

    def prepare_data(self) -> None:
        """Download the files that are missing, if any; each gets its name only when whole."""
        socket.setdefaulttimeout(30)  # seconds of silence; torchvision would wait for ever
        remedy = f"Try again, or put the four unpacked files {', '.join(IDX_FILES)} into {self.raw_dir}, or point "
        with explained("MNIST could not be downloaded", remedy + "DATA_DIR at the folder whose MNIST/raw holds them."):
            missing = [name for name in IDX_FILES if not (self.raw_dir / name).exists()]
            if missing:
                self.raw_dir.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=self.raw_dir) as folder:
                    MNIST(folder, download=True)
                    for name in missing:
                        os.replace(Path(folder, "MNIST", "raw", name), self.raw_dir / name)

    def setup(self, stage: str | None = None) -> None:
        """Read the files whole and make the tensors; one as long as MNIST's must be MNIST's."""
        tensors = []
        for name, (items, crc) in IDX_FILES.items():
            path = self.raw_dir / name
            with explained(f"{path} is not a whole MNIST file", "Delete it and run again, or check DATA_DIR."):
                tensors.append(values := read_sn3_pascalvincent_tensor(path))
                shape = (len(tensors[-2]),) if "labels" in name else (len(values), 28, 28)
                altered = len(values) == items and zlib.crc32(values.numpy()) != crc
                if altered or values.shape != shape or ("labels" in name and values.max() > 9):
                    raise ValueError("its checksum or shape is wrong, or a label is above 9")
        train, test = (F.adaptive_avg_pool2d(images[:, None] / 255, self.image_size) for images in tensors[::2])
        self.train_images, self.test_images = ((x - train.mean(dim=0)) / train.std() for x in (train, test))
        self.train_labels, self.test_labels = (labels.long() for labels in tensors[1::2])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.train_images, self.train_labels), self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.test_images, self.test_labels), self.batch_size)


# --- M2N2 ---
@dataclass(eq=False)
class M2N2:
    """Model Merging of Natural Niches: a steady-state evolution of an archive of K models.

    Works with any `model` from images to logits `(examples, classes)`, on the images' device and in their precision;
    the archive stays float32. Symbols are the paper's: s_ij in [0, 1] is the score of model i on training example j,
    z_j = Σ_i s_ij, f_i the fitness of model i. The archive starts as K empty slots (zeros), into which
    `initial_models`, by default two random ones, are put like children. Under torch.distributed each process holds
    the whole archive and its part of the training examples. ValueError for K < 2 or an unknown score.
    Attributes: `archive` (archive, params), `scores` (archive, examples of this process), `iteration` (children so
    far), `history` (the rows that `evolve` measured).
    """

    model: nn.Module
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    _: KW_ONLY
    archive_size: int = ARCHIVE_SIZE
    score: str = SCORE
    temperature: float = TEMPERATURE
    alpha: float = ALPHA
    init_std: float = INIT_STD
    mutation_std: float = MUTATION_STD
    final_mutation_std: float = FINAL_MUTATION_STD
    use_crossover: bool = USE_CROSSOVER
    use_split_point: bool = USE_SPLIT_POINT
    use_attraction: bool = USE_ATTRACTION
    initial_models: Sequence[nn.Module] = ()
    seed: int = SEED

    def __post_init__(self) -> None:
        if self.archive_size < 2 or self.score not in ("probability", "correct"):
            raise ValueError(f"archive_size is {self.archive_size}, score is {self.score!r}")
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._class_sizes = self.train_labels.bincount()  # (classes,), of all processes
        parts = (x.tensor_split(processes)[rank].contiguous() for x in (self.train_images, self.train_labels))
        self.train_images, self.train_labels = parts
        device = self.train_images.device
        self._evaluated = deepcopy(self.model).to(device, self.train_images.dtype).eval().requires_grad_(False)
        self._weights = get_params(self._evaluated)  # (params,), of which its parameters are views: loading is one copy
        nn.utils.vector_to_parameters(self._weights, self._evaluated.parameters())

        # Row K is the child's place. It is then copied onto the row that goes, itself if the child loses: no branch.
        self._models = torch.zeros(self.archive_size + 1, len(self._weights), device=device)
        self._scores = torch.zeros(self.archive_size + 1, len(self.train_labels), device=device)
        self.archive, self.scores = self._models[:-1], self._scores[:-1]
        # Fresh memory costs more than arithmetic, and the allocator keeps what a layer frees only below 32 MiB.
        widest = max(parameter.shape[:1].numel() for parameter in self._evaluated.parameters())
        size = 24 * 2**20 // (widest * self._weights.element_size())  # examples evaluated at a time
        parts = (x.split(size) for x in (self.train_images, self.train_labels, self._scores[-1]))
        self._parts = list(zip(*parts, strict=True))
        self._positions = torch.arange(len(self._weights), device=device)
        self._std, self._accepted = torch.tensor([[self.mutation_std], [0.0]], device=device)
        self._generator = torch.Generator(device).manual_seed(self.seed)
        self._random = {"device": device, "generator": self._generator}
        self.iteration, self.history = 0, []
        randoms = (self.init_std * torch.randn(len(self._weights), **self._random) for _ in "AB")
        for params in map(get_params, self.initial_models) if self.initial_models else randoms:
            self._evaluate(params.to(device))
            self._update_archive()
        self._accepted.zero_()

    def evolve(self, iterations: int, test_every: int = TEST_EVERY, after_child: Callable = lambda m2n2: False) -> None:
        """Make `iterations` more children, or until `after_child(self)` is true; every `test_every`, extend `history`.

        The mutation schedule spans the run from its first child ever to the last of this call: a run that goes on
        takes it up where it was, and one that goes on beyond its end mutates as a longer run does at that point.
        """
        end, step, capture_at = self.iteration + iterations, self._step, self.iteration + 3
        # A narrow terminal cuts the end off, so the figures come before the times.
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}, {rate_fmt}]"
        options = {"initial": self.iteration, "bar_format": layout, "disable": rank_zero_only.rank > 0}
        with tqdm(None, "Evolving Models", end, **options) as bar:
            while self.iteration < end:
                wave = (1 + np.cos(np.pi * self.iteration / end)) / 2  # 1 to 0
                self._std.fill_(self.final_mutation_std + (self.mutation_std - self.final_mutation_std) * wave)
                if self._weights.is_cuda and self.iteration == capture_at:  # the first few warm CUDA up
                    step = self._captured_step()
                step()
                self.iteration += 1
                bar.update()
                if self.iteration % test_every == 0 or self.iteration == end:
                    self.history.append(row := self._measure())
                    bar.set_postfix(best_fitness=f"{row['best_fitness']:.1f}", test_acc=f"{row['test_acc']:.2%}")
                if after_child(self):
                    break

    @torch.inference_mode()
    def _step(self) -> None:
        """One child, from its parents to its place in the archive; the host waits for nothing."""
        first, second = self._select_parents()
        child = self._crossover(first, second)
        self._evaluate(self._mutate(child))
        self._update_archive()

    def _captured_step(self) -> Callable[[], None]:
        """`_step` as a CUDA graph, captured once: each replay is a single launch."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph.replay

    def _select_parents(self) -> tuple[Tensor, Tensor]:
        """Indices `(1,)`: P(A) = f_A / Σ f; P(B) = g_B / Σ g, the attraction g_B = Σ_j max(s_Bj - s_Aj, 0) / z_j^α."""
        fitness = self._update_fitness()
        first = self._draw(fitness)
        if not self.use_attraction:
            return first, self._draw(fitness)
        gain = (self.scores - self.scores.index_select(0, first)).relu_()  # (archive, examples)
        attraction = self._sum(gain @ self._shares).index_fill_(0, first, 1e-30)  # (archive,); B = A if all g are 0
        return first, self._draw(attraction)

    def _draw(self, weights: Tensor) -> Tensor:
        """An index `(1,)` with probability weights / Σ weights; torch.multinomial would make the host wait."""
        noise = torch.empty_like(weights).exponential_(generator=self._generator)
        return torch.argmax(weights / noise, dim=0, keepdim=True)

    def _crossover(self, first: Tensor, second: Tensor) -> Tensor:
        """Child `(params,)`: SLERP(w) before the split point p, SLERP(1 - w) after; w ~ U(0, 1), p ~ U{0..params-1}."""
        a, b = self.archive.index_select(0, torch.cat([first, second]))
        if not self.use_crossover:
            return a
        mix = torch.rand(1, **self._random)
        if self.use_split_point:
            split = torch.randint(len(a), (1,), **self._random)
            mix = torch.where(self._positions < split, mix, 1 - mix)  # (params,)
        return slerp(mix, a, b)

    def _mutate(self, child: Tensor) -> Tensor:
        """child + σ N(0, 1); `evolve` sets σ, which falls by half a cosine from `mutation_std` to the final one."""
        return child + self._std * torch.randn(len(child), **self._random)

    def _logits(self, params: Tensor, images: Tensor) -> Tensor:
        """Logits `(classes, examples)` of the model with these parameters."""
        self._weights.copy_(params)
        return self._evaluated(images).T.float()

    def _evaluate(self, child: Tensor) -> None:
        """Fill row K: s_j is softmax(logits / temperature) of the true class, or 1 if its logit is the only highest."""
        for images, labels, row in self._parts:
            logits, labels, row = self._logits(child, images), labels[None], row[None]
            if self.score == "probability":
                torch.gather(logits.mul_(1 / self.temperature).softmax(dim=0), 0, labels, out=row)
            else:
                margin = logits.gather(0, labels) - logits.scatter_(0, labels, -torch.inf).amax(dim=0)
                torch.add(margin > 0, margin, alpha=0, out=row)  # NaN where the model overflows, as a softmax is
        self._models[-1] = child

    def _update_fitness(self, with_child: bool = False) -> Tensor:
        """f_i = Σ_j s_ij / z_j^α, 0 where z_j = 0: `(archive,)` or `(archive + 1,)`, NaN for a child that overflows."""
        z = self.scores.sum(dim=0)  # (examples,)
        if with_child:
            z += self._scores[-1].nan_to_num()  # nobody competes with a child that overflowed
        self._shares = z.clamp_(min=1e-12).pow_(-self.alpha)
        if not with_child:
            return self._sum(self.scores @ self._shares)
        # Slower, but a product of matrices may sum equal rows to different bits, and here ties must be ties.
        return self._sum(torch.linalg.vecdot(self._scores, self._shares))

    def _update_archive(self) -> None:
        """The worst of the K + 1 goes: the first of equals, and NaN before any number."""
        worst = torch.argmin(self._update_fitness(with_child=True), dim=0, keepdim=True)
        for rows in (self._models, self._scores):
            rows.index_copy_(0, worst, rows[-1:].clone())
        self._accepted += worst < self.archive_size

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, each with its part of the examples."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    def _measure(self) -> dict[str, float]:
        """A row of `history`. A member covers an example by a score above 1/2."""
        hits, examples = self.train_hits().sum(dim=1), self._class_sizes.sum().item()  # (archive,)
        row = {
            "iteration": self.iteration,
            "best_fitness": self._update_fitness().max().item(),
            "train_acc": hits.max().item() / examples,
            "test_acc": self.test_accuracy(self.archive[hits.argmax()][None]),
            "coverage": self._sum((self.scores.amax(dim=0) > 0.5).sum()).item() / examples,
            "acceptance": self._accepted.item() / (self.iteration - sum(r["iteration"] for r in self.history[-1:])),
        }
        self._accepted.zero_()
        return row

    @torch.no_grad()
    def train_hits(self) -> Tensor:
        """How many training examples of each class each member gets right, `(archive, classes)`."""
        predictions = [self._logits(params, self.train_images).max(dim=0).indices for params in self.archive]
        right = torch.stack(predictions) == self.train_labels
        return self._sum(right.float() @ F.one_hot(self.train_labels, len(self._class_sizes)).float())

    @torch.no_grad()
    def test_accuracy(self, models: Tensor) -> float:
        """Test accuracy of the mean of the probabilities of some models `(models, params)`."""
        logits = (self._logits(params, self.test_images) for params in models)
        probabilities = sum(x.div_(self.temperature).softmax(dim=0) for x in logits)
        return (probabilities.argmax(dim=0) == self.test_labels).float().mean().item()

    def best_model(self) -> nn.Module:
        """The archive member with the highest training accuracy, as a model of its own."""
        best = deepcopy(self.model)
        set_params(best, self.archive[self.train_hits().sum(dim=1).argmax()])
        return best

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        counts = {"iteration": self.iteration, "history": list(self.history), "accepted": self._accepted.clone()}
        return counts | {"archive": self.archive.clone(), "generator": self._generator.get_state()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take up the state of an equal M2N2; the scores are computed anew."""
        for row, params in enumerate(state["archive"].to(self.archive)):
            self._evaluate(params)
            self.archive[row], self.scores[row] = params, self._scores[-1] * params.any()  # zeros: an empty slot
        self._generator.set_state(state["generator"])
        self._accepted.copy_(state["accepted"])
        self.iteration, self.history = state["iteration"], list(state["history"])


# --- Outputs ---
@rank_zero_only
def save_whole(save: Callable[[io.BytesIO], object], path: Path) -> None:
    """What `save` writes, to a temporary file that is moved into place: whole or not at all."""
    buffer, temporary = io.BytesIO(), path.with_suffix(".tmp")
    save(buffer)
    with explained(f"{path} could not be written", "Make room, then RESUME the last checkpoint."):
        try:
            temporary.write_bytes(buffer.getbuffer())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, experiment: dict) -> dict:
    """M2N2's state; UserError unless the checkpoint is whole and of the same experiment, but for what may change."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state, before = checkpoint["m2n2"], dict(checkpoint["experiment"])
    except Exception as error:  # whose own text may tell how to run the code in the file
        raise UserError(f"{path} is no whole checkpoint. RESUME wants a run's folder.") from error
    free = ("RUNS", "ITERATIONS", "CHECKPOINT_EVERY", "RESUME", "DATA_DIR", "OUTPUT_DIR")
    for name, value in experiment.items():
        if name not in free and value != (was := before.get(name)):
            raise UserError(f"{name} is {value!r}, but {was!r} in the run to RESUME. Set it so, or start afresh.")
    return state


@rank_zero_only
def plot_evolution(histories: Sequence[list[dict]], niches: Tensor, path: Path) -> None:
    """Left: coverage and accuracy, mean ± SD of runs. Right: `niches`, accuracy by digit `(archive, classes)`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("No figure without matplotlib: `pip install matplotlib` to get evolution.png.")
    figure, rows = Figure(figsize=(7.2, 2.9), layout="constrained"), list(zip(*histories, strict=False))
    left, right = figure.subplots(1, 2)
    children = [runs[0]["iteration"] / 1_000 for runs in rows]
    for key, label in (("coverage", "archive coverage"), ("test_acc", "best model, test accuracy")):
        values = np.reshape([[100 * run[key] for run in runs] for runs in rows], (-1, len(histories)))
        mean, std = values.mean(axis=1), values.std(axis=1, ddof=min(1, len(histories) - 1))
        left.plot(children, mean, label=label)
        left.fill_between(children, mean - std, mean + std, alpha=0.3)
    left.legend(loc="lower right")
    title = f"Evolution, mean ± SD of {len(histories)} runs" if len(histories) > 1 else "Evolution"
    left.set(xlabel="children evaluated (thousands)", ylabel="examples (%)", title=title)
    right.set(xlabel="digit", ylabel="archive member", title="Niches", xticks=range(10))
    image = right.imshow(100 * niches.numpy(), aspect="auto", cmap="cividis")
    figure.colorbar(image, label="training accuracy (%)")
    save_whole(partial(figure.savefig, dpi=200), path)


# --- Main ---
def checked(name: str, accepted: str, text: str) -> object:
    """A constant's value from its text, if it is `accepted`, as the brackets at the top say it."""
    low, _, high = accepted.partition(", ")
    with contextlib.suppress(ValueError):
        if high and float(low) <= (number := (float if "." in low else int)(text)) <= float(high):  # false for NaN
            return number
        if text.lower() in accepted.split(" | "):
            return {"true": True, "false": False}.get(text.lower(), text.lower())
    if accepted:
        raise argparse.ArgumentTypeError(f"{name} is {text!r}, accepted is [{accepted}]")
    return text


def parse_constants(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The constants at the top, overridden from the command line, each checked."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(None, "%(prog)s [--constant VALUE]...", __doc__, **options)
    block = Path(__file__).read_text(encoding="utf-8").partition("\nclass ")[0]
    for name, meaning, accepted in re.findall(r"^([A-Z_]+) = .*?  # (.+?(?: \[(.+)\])?)$", block, re.M):
        flag, check = f"--{name.lower().replace('_', '-')}", partial(checked, name, accepted)
        text = f"{meaning} (default: {globals()[name]!r})"
        parser.add_argument(flag, dest=name, type=check, default=str(globals()[name]), help=text)
    constants = parser.parse_args(argv)
    if constants.RESUME and constants.RUNS > 1:
        parser.error(f"RUNS is {constants.RUNS}, but RESUME goes on with one run")
    return constants


def launch(constants: argparse.Namespace) -> Fabric:
    """The device and, under torchrun, the processes; resolves ACCELERATOR and PRECISION."""
    here, everywhere = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    with explained(f"ACCELERATOR is {constants.ACCELERATOR!r}", "Set it to 'auto' or 'cpu'."):
        fabric = Fabric(accelerator=constants.ACCELERATOR, devices=here, num_nodes=everywhere // here)
    fabric.launch()
    constants.ACCELERATOR = fabric.device.type
    if constants.PRECISION == "auto":  # bf16 where it is no emulation, which would be slower
        has_bf16 = any(torch.cpu.get_capabilities().get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
        if fabric.device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        constants.PRECISION = "bf16-true" if has_bf16 else "32-true"
    return fabric


def train_specialists(data: MNISTDataModule, hidden_dim: int, fabric: Fabric) -> list[MLP]:
    """Two MLPs, one trained for an epoch by gradient descent on digits 0 to 4, one on 5 to 9."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    models = [MLP(data.image_size**2, hidden_dim) for _ in "AB"]
    for model, chosen in zip(models, (data.train_labels < 5, data.train_labels > 4), strict=True):
        half = TensorDataset(data.train_images[chosen], data.train_labels[chosen])
        trainer = Trainer(accelerator="cpu", devices=1, plugins=LightningEnvironment(), max_epochs=1, barebones=True)
        trainer.fit(model, DataLoader(half, data.batch_size, shuffle=True))
        set_params(model, fabric.broadcast(get_params(model)))
    return models


def run(constants: argparse.Namespace, fabric: Fabric, data: MNISTDataModule, histories: list[list[dict]]) -> int:
    """One experiment, whose history joins the others': the number of the signal that interrupted it, or 0."""
    experiment = {**vars(constants), "CRC-32 of the images in DATA_DIR": zlib.crc32(data.train_images.numpy())}
    where = (constants.RESUME, "", "") if constants.RESUME else (constants.OUTPUT_DIR, "m2n2_mnist")
    state = load_checkpoint(Path(*where, "checkpoint.pt"), experiment) if constants.RESUME else None
    warnings.filterwarnings("ignore", module="lightning_fabric|pytorch_lightning")  # metrics.csv is rewritten, not lost
    with explained(f"{Path(*where)} cannot be written", "Choose another OUTPUT_DIR."):
        logger = CSVLogger(*where, flush_logs_every_n_steps=1)
        logger.log_hyperparams(vars(constants))
    folder = Path(logger.log_dir)

    seed_everything(constants.SEED, verbose=False)
    settings = {f.name: experiment[f.name.upper()] for f in fields(M2N2) if f.name.upper() in experiment}
    if constants.START == "specialists":
        models = train_specialists(data, constants.HIDDEN_DIM, fabric)
        settings |= {"initial_models": models, "mutation_std": 0.0, "final_mutation_std": 0.0}
    model = MLP(constants.IMAGE_SIZE**2, constants.HIDDEN_DIM)
    dtype = torch.bfloat16 if constants.PRECISION == "bf16-true" else torch.float32
    tensors = data.train_images.to(dtype), data.train_labels, data.test_images.to(dtype), data.test_labels
    m2n2 = M2N2(model, *(tensor.to(fabric.device) for tensor in tensors), **settings)
    if state:
        m2n2.load_state_dict(state)
        for row in m2n2.history:
            logger.log_metrics(row, row["iteration"])
    caught, first, started = [0], m2n2.iteration, time.perf_counter()

    def save_checkpoint() -> None:
        save_whole(partial(torch.save, {"experiment": experiment, "m2n2": m2n2.state_dict()}), folder / "checkpoint.pt")

    def after_child(m2n2: M2N2) -> bool:
        if m2n2.history and m2n2.history[-1]["iteration"] == m2n2.iteration:
            logger.log_metrics(m2n2.history[-1], m2n2.iteration)
        if m2n2.iteration % constants.CHECKPOINT_EVERY == 0:
            save_checkpoint()
        if fabric.world_size > 1:  # all stop at the same child
            if m2n2.iteration % 50:
                return False
            caught.append(int(fabric.all_reduce(torch.tensor(caught[-1]), reduce_op="max")))
        return caught[-1] > 0

    def interrupt(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    save_checkpoint()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    place = f"{fabric.device}, {constants.PRECISION}, {fabric.world_size} process(es)"
    size = f"{len(get_params(model)):,} parameters; {len(data.train_images):,} + {len(data.test_images):,} images"
    fabric.print(f"M2N2 on {place}; MLP of {size} from {constants.DATA_DIR}; seed {constants.SEED}", flush=True)
    if first >= constants.ITERATIONS:
        fabric.print(f"Already finished, at iteration {first:,} of {constants.ITERATIONS:,}.")
    m2n2.evolve(max(0, constants.ITERATIONS - first), constants.TEST_EVERY, after_child)
    seconds, children = time.perf_counter() - started, m2n2.iteration - first
    save_checkpoint()

    histories.append(m2n2.history)
    best, interrupted = m2n2.best_model(), m2n2.iteration < constants.ITERATIONS
    save_whole(partial(torch.save, best.state_dict()), folder / "best_model.pt")
    plot_evolution(histories, m2n2.train_hits().cpu() / data.train_labels.bincount(), folder / "evolution.png")
    fabric.print(f"Test accuracy of the archive as an ensemble: {m2n2.test_accuracy(m2n2.archive):.2%}")
    fabric.print(f"{children:,} children in {seconds:.1f} s, {children / seconds:.1f} a second\nFiles: {folder}")
    if interrupted:
        flags = f"--seed={constants.SEED}", "--runs=1", f"--resume={folder}"
        fabric.print(f"To go on: {shlex.join(['python', *sys.argv, *flags])}")
    fabric.print(f"Evolution interrupted at iteration {m2n2.iteration}." if interrupted else "Evolution finished.")
    accuracy = m2n2.test_accuracy(get_params(best)[None])
    fabric.print(f"Final Test Accuracy of the best model: {accuracy:.2%}", flush=True)
    fabric.barrier()  # torchrun ends the others when the first leaves with an error code
    return caught[-1] if interrupted else 0


def main() -> None:
    """All runs of the experiment; what only the user can mend ends in one message."""
    try:
        constants, histories = parse_constants(), []
        fabric = launch(constants)
        data = MNISTDataModule(constants.DATA_DIR, constants.IMAGE_SIZE)
        with fabric.rank_zero_first(local=True):
            data.prepare_data()
        data.setup()
        for seed in range(constants.SEED, constants.SEED + constants.RUNS):
            constants.SEED = seed
            if caught := run(constants, fabric, data, histories):
                sys.exit(128 + caught)
        if constants.RUNS > 1:
            std, mean = torch.std_mean(torch.tensor([100 * history[-1]["test_acc"] for history in histories]))
            fabric.print(f"Mean Test Accuracy of {constants.RUNS} runs: {mean:.2f} ± {std:.2f}%")
    except (UserError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
