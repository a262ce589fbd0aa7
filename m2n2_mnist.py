"""M2N2 on MNIST: classifiers evolved from scratch, without a gradient, by merging models.

This is Model Merging of Natural Niches, Experiment 1 of "Competition and Attraction Improve Model Fusion" (Abrantes,
Lange, Tang; arXiv:2508.16204), on the real MNIST. 50,000 children, each evaluated on all training images, reach
98.15 ± 0.08 % test accuracy (mean ± SD of seeds 42 to 46) with an MLP 64-128-10, in 17 minutes on one CPU core, 10 to
11 on two. An H100 had 98.08 ± 0.09 % in 14 seconds. PGPE is level with it on the same images and budget (README).

    python m2n2_mnist.py                              # the experiment of the constants below
    python m2n2_mnist.py --iterations 1000 --seed 7   # any constant overridden; --help explains them
    torchrun --nproc_per_node 2 -- m2n2_mnist.py      # the examples split over processes
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import count
from numbers import Real
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning import LightningDataModule
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

# --- Constants: edit these. A value may be any Python expression; RULES, further down, says what is accepted ---
# Run
SEED = 42  # seed of the first run
RUNS = 1  # how often to repeat the experiment, with consecutive seeds
ITERATIONS = 50_000  # children evaluated in a run, which is forward passes
TEST_EVERY = 1_000  # iterations between two rows of metrics.csv, each with a checkpoint
RESUME = ""  # folder of an interrupted run to go on with, as runs/m2n2_mnist/version_3; "" for none
OUTPUT_DIR = "runs"  # folder that gets m2n2_mnist/version_N for each run
ACCELERATOR = "auto"  # where to compute; auto: on CUDA if there is one
# Data and model
DATASET = "MNIST"  # or another of torchvision's in the same layout
DATA_DIR = "data"  # folder that holds the data set, or gets it downloaded
DESKEW = True  # shear each image until its ink stands upright; not in the paper
CROP_SIZE = 20  # pixels a side of the central square that is kept, 28 for all; MNIST's digits fill 20
IMAGE_SIZE = 8  # pixels a side of its area average, which the model sees; the paper's 8
HIDDEN_DIM = 128  # hidden units of the MLP; the paper's 256
# M2N2
ARCHIVE_SIZE = 4  # models in the archive, K; the paper's 20
SCORE = "probability"  # that of the true class, or the paper's 0/1: "correct"
TEMPERATURE = 0.67  # of the softmax of the probability; higher is smoother
ALPHA = 1.0  # competition: 1 shares each example among its models, 0 is none
INIT_STD = 0.01  # standard deviation of the two random models at the start
MUTATION_STD = 0.005  # σ, standard deviation of the mutation, at the start of a run; the paper's 0.01
FINAL_MUTATION_STD = 0.001  # σ at its end; the paper's is constant
PRIOR_STD = 0.2  # mutation shrinks weights, so that unused ones tend to N(0, PRIOR_STD²); above σ; 0: off (paper)
USE_CROSSOVER = True  # False: a child is a mutated copy of its first parent
USE_SPLIT_POINT = True  # False: one SLERP over the whole vector
USE_ATTRACTION = True  # False: both parents are drawn by fitness
USE_MIRRORING = True  # a child that loses is tried again with the opposite mutation; not in the paper


# --- Flat parameter vectors ---
def slerp(t: float | Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Spherical interpolation sin((1 - t) Ω) / sin Ω · a + sin(t Ω) / sin Ω · b, `(params,)`; Ω is their angle.

    `t` is a number, or a tensor that broadcasts to `(params,)`. Where Ω is undefined or too small to divide by its sine
    (zero, parallel or opposite vectors), the interpolation is linear: that of an Ω of 0.0001.
    """
    omega = torch.acos(torch.dot(a, b) / (a.norm() * b.norm()))
    omega = torch.where(omega.sin() >= 1e-3, omega, 1e-4)  # false for NaN: a zero vector, or a cosine rounded beyond 1
    sin = omega.sin()
    return ((1 - t) * omega).sin() / sin * a + (t * omega).sin() / sin * b


def get_params(model: nn.Module) -> Tensor:
    """All parameters as one detached vector `(params,)`, in the order of `model.parameters()`."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def set_params(model: nn.Module, params: Tensor) -> None:
    """Copy a vector `(params,)` of `get_params` into the model; ValueError for a wrong length."""
    present = get_params(model)
    if params.shape != present.shape:
        raise ValueError(f"the model has {len(present)} parameters, not {tuple(params.shape)}")
    nn.utils.vector_to_parameters(present.copy_(params), model.parameters())  # a copy, as they become views of it


# --- Model ---
class MLP(nn.Module):
    """Images `(examples, ...)` → hidden ReLU layer → logits `(examples, classes)`; `MLP(64, 256)` is the paper's."""

    def __init__(self, input_dim: int, hidden_dim: int = HIDDEN_DIM, output_dim: int = 10) -> None:
        super().__init__()
        hidden_dim = checked("hidden_dim", hidden_dim)  # by RULES, further down
        self.hidden, self.output = nn.Linear(input_dim, hidden_dim), nn.Linear(hidden_dim, output_dim)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.hidden(images.flatten(1)).relu_()
        # self.output(hidden), with rows of zeros up to a multiple of 16, which a CPU multiplies up to twice as fast.
        weight = nn.functional.pad(self.output.weight, (0, 0, 0, -self.output.out_features % 16))
        return (hidden @ weight.T)[:, : self.output.out_features] + self.output.bias


# --- Data ---
def deskew(images: Tensor) -> Tensor:
    """Images `(examples, 1, side, side)`, each sheared about its centre of mass until its ink stands upright.

    A row moves by k times its distance from the centre, k = Σ m dx dy / Σ m dy² over the pixels' ink m, at most ±1,
    which makes Σ m dx dy zero (LeCun, Bottou, Bengio, Haffner 1998). An image without ink stays as it is.
    """
    # x and y are the coordinates of the pixels' centres, from -1 to 1, (1, side, side).
    x, y = nn.functional.affine_grid(torch.eye(2, 3)[None], [1, *images.shape[1:]], align_corners=False).unbind(-1)
    ink = (images / images.sum(dim=(2, 3), keepdim=True).clamp(min=1e-12)).squeeze(1)  # (examples, side, side)
    centre_x, centre_y = ((ink * axis).sum(dim=(1, 2), keepdim=True) for axis in (x, y))
    dx, dy = x - centre_x, y - centre_y
    k = (ink * dx * dy).sum(dim=(1, 2)) / (ink * dy * dy).sum(dim=(1, 2)).clamp(min=1e-12)
    shear = torch.eye(2, 3).repeat(len(images), 1, 1)  # from a pixel to where its value comes from
    shear[:, 0, 1] = k.clamp(-1, 1)
    shear[:, 0, 2] = -shear[:, 0, 1] * centre_y.flatten()
    grid = nn.functional.affine_grid(shear, images.shape, align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


class MNISTDataModule(LightningDataModule):
    """A data set of MNIST's family as whole tensors for the archive loop, and as loaders for a Lightning `Trainer`.

    `train_images` and `test_images` are float32 `(examples, 1, image_size, image_size)`, less the mean training image
    and over the training set's standard deviation; `train_labels` and `test_labels` are int64 `(examples,)`.
    `examples` are these four in the order in which `M2N2` takes them. `checksum` covers pixels, labels and how they are
    preprocessed. ValueError for arguments that are not accepted, UserError for files that cannot be downloaded or read.
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
        self.data_dir, self.dataset = checked("data_dir", data_dir), checked("dataset", dataset)
        self.deskew, self.crop_size = checked("deskew", deskew), checked("crop_size", crop_size)
        self.image_size, self.batch_size = checked("image_size", image_size), batch_size

    def prepare_data(self) -> None:
        """Download the files that are missing, if any, and unpack them."""
        self._read(train=True, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Read the files and make the tensors."""
        (train, self.train_labels), (test, self.test_labels) = self._read(train=True), self._read(train=False)
        self.checksum = zlib.crc32(repr((self.dataset, self.deskew, self.crop_size, self.image_size)).encode())
        for tensor in (train, self.train_labels, test, self.test_labels):
            self.checksum = zlib.crc32(tensor.numpy(), self.checksum)
        train, test = self._preprocessed(train), self._preprocessed(test)
        mean, std = train.mean(dim=0), train.std()
        self.train_images, self.test_images = (train - mean) / std, (test - mean) / std
        self.examples = (self.train_images, self.train_labels, self.test_images, self.test_labels)

    def _read(self, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
        """Images, uint8 `(examples, 28, 28)`, and labels, int64 `(examples,)`, by torchvision."""
        folder = Path(self.data_dir, self.dataset, "raw")
        remedy = f"Delete {folder} and run again, or put the four files there, unpacked; DATA_DIR may name another."
        with explained(f"{self.dataset} could not be downloaded or read", remedy):
            split = getattr(datasets, self.dataset)(self.data_dir, train, download=download)
            images, labels = split.data, split.targets
            if images.shape != (len(labels), 28, 28) or labels.max() > 9:
                raise ValueError(f"{tuple(images.shape)} images and {len(labels)} labels, up to {labels.max()}")
        return images, labels

    def _preprocessed(self, images: Tensor) -> Tensor:
        """Pixel values from 0 to 1, deskewed, cropped and averaged, `(examples, 1, image_size, image_size)`."""
        preprocessed = []
        for part in images.split(5_000):  # for less memory
            pixels = part[:, None] / 255
            pixels = center_crop(deskew(pixels) if self.deskew else pixels, self.crop_size)
            preprocessed.append(nn.functional.adaptive_avg_pool2d(pixels, self.image_size))
        return torch.cat(preprocessed)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.train_images, self.train_labels), self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.test_images, self.test_labels), self.batch_size)


# --- M2N2 ---
def all_reduce(values: Tensor) -> Tensor:
    """Sum the values in place over all processes, each of which holds a part of the training examples."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The true class's logit minus the highest other, `(examples,)`, for logits `(classes, examples)` as of `M2N2`.

    An example is classified correctly, for scores as for accuracies, where its margin is above 0: a tie is an error.
    """
    return logits.gather(0, labels[None])[0] - logits.scatter(0, labels[None], -torch.inf).amax(dim=0)


class M2N2:
    """Model Merging of Natural Niches: a steady-state evolution of an archive of K models.

    Takes any `model` from floating-point images `(examples, ...)` to logits `(examples, classes)`, and int64 labels;
    ValueError where they do not fit. A copy of the model is evaluated, on the training images' device, in their
    precision and in evaluation mode; all parameters evolve, frozen ones too, and buffers stay.

    The archive, float32, starts as K empty slots, zeros with fitness 0. Two random models, or `initial_models`, take
    the first of them, and children the next. Under torch.distributed every process holds the whole archive and its own
    part of the training examples; all draw the same random numbers, and fitness is summed over them.

    The paper's symbols: s_ij in [0, 1], the score of model i on training example j; z_j = Σ_i s_ij; f_i, a fitness.
    Attributes: the arguments, `archive`, `scores`, `iteration` (children so far), `history` (rows that `evolve` made).
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
        use_mirroring: bool = USE_MIRRORING,
        schedule: int = 0,  # children over which σ falls; 0: to the end of the first `evolve`
        eval_batch_size: int = 0,  # images evaluated at a time; 0: 6,000 on a CPU, for its caches, all on a GPU
        initial_models: Sequence[nn.Module] = (),
        seed: int = SEED,
    ) -> None:
        arguments = dict(locals())
        for name in ACCEPTED.keys() & arguments.keys():  # self.archive_size to self.seed, but initial_models
            setattr(self, name, checked(name, arguments[name]))
        images, labels = checked_examples("train", train_images, train_labels)
        test_images, test_labels = checked_examples("test", test_images, test_labels)
        self.test_images, self.test_labels = test_images.to(images), test_labels.to(images.device)
        self.class_sizes = labels.bincount(minlength=int(self.test_labels.max()) + 1)  # (classes,), of all processes
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.train_images, self.train_labels = (whole.tensor_split(processes)[rank] for whole in (images, labels))
        self.eval_batch_size = self.eval_batch_size or (len(images) if images.is_cuda else 6_000)
        self.model = checked_model(model, self.test_images, len(self.class_sizes))
        self._generator = torch.Generator(images.device).manual_seed(self.seed)
        self._fill_archive(initial_models)

    def __getstate__(self) -> dict:
        return deepcopy(vars(self))  # or a multiprocessing worker given this would share, and change, its tensors

    def _fill_archive(self, initial_models: Sequence[nn.Module]) -> None:
        """Empty slots, into which the initial models, or two random ones, are put like children."""
        self._params = params = len(get_params(self.model))
        initial = [get_params(model) for model in initial_models]
        if any(len(vector) != params for vector in initial):
            raise ValueError(f"initial_models is {[*map(len, initial)]} parameters, accepted is {params} each")
        # All that a step changes are tensors updated in place, so that a CUDA graph can replay it. A row is a model's
        # parameters and scores; the last row is the child's. It is copied over the worst row, maybe itself: that needs
        # no branch, and no interrupt can leave a model with another's scores.
        shape = self.archive_size + 1, params + len(self.train_labels)
        self._rows = torch.zeros(shape, device=self.train_images.device)
        self._unmutated, self._noise = self._rows.new_zeros(2, params)  # of the last child
        self._retry = self._rows.new_zeros(1, dtype=torch.bool)  # whether the next child is that one again, with -noise
        self._sigma, self._shrink = self._rows.new_tensor([[self.mutation_std], [1]])  # set by `evolve` before a step
        self._accepted = self._rows.new_zeros(1)  # children that entered the archive since the last row of history
        self.iteration, self.history = 0, []
        random = (self._noise.new_empty(params).normal_(0, self.init_std, generator=self._generator) for _ in range(2))
        for vector in initial or random:
            self._evaluate(vector.to(self._rows))
            self._update_archive()
        self._accepted.zero_()
        self._retry.zero_()

    archive = property(lambda self: self._rows[:-1, : self._params])  # (archive, params)
    scores = property(lambda self: self._rows[:-1, self._params :])  # (archive, examples of this process)

    def evolve(self, iterations: int, test_every: int = TEST_EVERY, after_child: Callable = lambda m2n2: False) -> None:
        """Make `iterations` more children, or stop once `after_child(self)` is true.

        Each `test_every` children and at the end a row goes to `history`. σ falls by half a cosine over `schedule`.
        """
        test_every, first = checked("test_every", test_every), self.iteration
        end = first + checked("iterations", iterations)
        self.schedule = self.schedule or end
        make_child = self._step
        options = {"initial": first, "total": end, "disable": rank_zero_only.rank > 0}
        with tqdm(desc="Evolving Models", mininterval=0.1 if sys.stderr.isatty() else 10, **options) as bar:  # seconds
            while self.iteration < end:
                if self._rows.is_cuda and self.iteration == first + 3:  # by then CUDA's libraries are set up
                    make_child = captured_step(self)
                cosine = (1 + np.cos(np.pi * min(self.iteration, self.schedule) / self.schedule)) / 2  # from 1 to 0
                sigma = self.final_mutation_std + (self.mutation_std - self.final_mutation_std) * cosine
                self._sigma.fill_(sigma)
                self._shrink.fill_(max(0, 1 - (sigma / self.prior_std) ** 2) ** 0.5 if self.prior_std else 1)
                make_child()
                self.iteration += 1
                bar.update()
                if self.iteration % test_every == 0 or self.iteration == end:
                    self.history.append(row := self._measure())
                    shown = {name: f"{row[name]:.2%}" for name in ("train_acc", "test_acc")}
                    bar.set_postfix(best_fitness=f"{row['best_fitness']:.0f}", **shown, refresh=False)
                if after_child(self):
                    break

    @torch.inference_mode()
    def _step(self) -> None:
        """One child, from its parents to its place in the archive; the host waits for nothing."""
        parent_a, parent_b = self._select_parents()
        child = self._mutate(self._crossover(parent_a, parent_b))
        self._evaluate(child)
        self._update_archive()

    def _select_parents(self) -> tuple[Tensor, Tensor]:
        """Indices `(1,)`: P(A) = f_A / Σ f; P(B) = g_B / Σ g, the attraction g_B = Σ_j max(s_Bj - s_Aj, 0) / z_j^α."""
        fitness, rewards = self._update_fitness(self.scores)
        parent_a = self._draw(fitness)
        if not self.use_attraction:
            return parent_a, self._draw(fitness)
        gain = (self.scores - self.scores.index_select(0, parent_a)).relu_()  # (archive, examples)
        attraction = all_reduce(gain @ rewards).index_fill_(0, parent_a, 1e-30)  # so B = A if all g are 0
        return parent_a, self._draw(attraction)

    def _draw(self, chances: Tensor) -> Tensor:
        """An index `(1,)`, i with probability chances_i / Σ chances; torch.multinomial would make the host wait.

        Exponential clocks: clock i rings after Exp(1) / chances_i, and is the first to ring with just that probability.
        """
        waiting = torch.empty_like(chances).exponential_(generator=self._generator)
        return torch.argmax(chances / waiting, dim=0, keepdim=True)

    def _crossover(self, parent_a: Tensor, parent_b: Tensor) -> Tensor:
        """SLERP(w) before the split point p, SLERP(1 - w) after it, `(params,)`; w ~ U(0, 1), p ~ U{0..params-1}."""
        a, b = self.archive.index_select(0, torch.cat([parent_a, parent_b]))
        if not self.use_crossover:
            return a
        w = torch.rand(1, device=a.device, generator=self._generator)
        if self.use_split_point:
            split_point = torch.randint(len(a), (1,), device=a.device, generator=self._generator)
            w = torch.where(torch.arange(len(a), device=a.device) < split_point, w, 1 - w)
        return slerp(w, a, b)

    def _mutate(self, child: Tensor) -> Tensor:
        """child + σ N(0, 1), or, with a prior, child · √(1 - (σ / prior_std)²) + σ N(0, 1).

        The second is the Crank-Nicolson proposal (Neal 1998; Cotter, Roberts, Stuart, White 2013), which leaves
        N(0, prior_std²) unchanged. Mirrored mutation (Brockhoff et al. 2010, sequential): a child that did not enter
        the archive is tried once more with the opposite noise. On such a retry the fresh `child` is discarded: to skip
        its crossover would take a branch, for which the host would have to wait.
        """
        noise = self._sigma * torch.randn(len(child), device=child.device, generator=self._generator)
        if self.use_mirroring:
            child = torch.where(self._retry, self._unmutated, child)
            noise = torch.where(self._retry, -self._noise, noise)
            self._unmutated.copy_(child)
            self._noise.copy_(noise)
        return self._shrink * child + noise

    def _evaluate(self, child: Tensor) -> None:
        """Fill the child's row; s_j is softmax(logits / temperature) of the true class, or 0/1; NaN if it overflows."""
        logits = self.logits(child, self.train_images)
        if self.score == "probability":
            scores = (logits / self.temperature).softmax(dim=0).gather(0, self.train_labels[None])[0]
        else:
            margin = margins(logits, self.train_labels)
            scores = torch.where(margin.isfinite(), (margin > 0).float(), torch.nan)  # NaN, as from softmax
        torch.cat([child, scores], out=self._rows[-1])

    @torch.no_grad()
    def logits(self, params: Tensor, images: Tensor) -> Tensor:
        """Logits `(classes, examples)` of the model with the parameters `(params,)`."""
        own = dict(self.model.named_parameters())
        parts = params.to(images.dtype).split([parameter.numel() for parameter in own.values()])
        views = {name: part.view_as(own[name]) for name, part in zip(own, parts, strict=True)}
        batches = images.split(self.eval_batch_size)  # small enough to stay in a CPU's caches from layer to layer
        return torch.cat([functional_call(self.model, views, batch).T.float() for batch in batches], dim=1)

    def _update_fitness(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return f_i = Σ_j s_ij / z_j^α, 0 where z_j = 0, `(models,)`, and the rewards 1 / z_j^α, `(examples,)`."""
        rewards = scores.nansum(dim=0).clamp_(min=1e-12).pow_(-self.alpha)  # a child that overflowed has NaN scores
        # Equal rows must have equal sums, or rounding would choose between identical models. A matrix product does not
        # give them, nor does CUDA to rows that do not all start at a multiple of four numbers: hence the padding.
        paid = nn.functional.pad(scores * rewards, (0, -len(rewards) % 4))
        return all_reduce(paid.sum(dim=1)), rewards

    def _update_archive(self) -> None:
        """The worst of K + 1 models goes; `argmin` takes NaN, of a child that overflowed, or the first of equals."""
        fitness, _ = self._update_fitness(self._rows[:, self._params :])
        worst = torch.argmin(fitness, dim=0, keepdim=True)
        self._rows.index_copy_(0, worst, self._rows[-1:].clone())
        entered = worst < self.archive_size
        self._accepted += entered
        self._retry.copy_(~entered & ~self._retry)  # a child that lost, unless it was a second try itself

    def _measure(self) -> dict[str, float]:
        """A row of `history`.

        `coverage` is the share of training examples that some member classifies correctly, `diversity` the share on
        which one of two members does and the other does not, averaged over all pairs (the disagreement measure,
        Kuncheva & Whitaker 2003), `acceptance` the share of children since the last row that entered the archive.
        """
        right, examples = self._right(), self.class_sizes.sum().item()
        known_by = right.sum(dim=0)  # how many members, (examples,)
        members = self.archive.any(dim=1).sum().item()
        disagreements = all_reduce((known_by * (members - known_by)).sum()).item()
        previous = self.history[-1]["iteration"] if self.history else 0
        accepted = self._accepted.item()
        self._accepted.zero_()
        return {
            "iteration": self.iteration,
            "best_fitness": self._update_fitness(self.scores)[0].max().item(),
            "train_acc": all_reduce(right.sum(dim=1)).max().item() / examples,
            "test_acc": self.test_accuracy(self.best_params(right)[None]),
            "coverage": all_reduce((known_by > 0).sum()).item() / examples,
            "diversity": disagreements / examples / max(1, members * (members - 1) / 2),
            "acceptance": accepted / (self.iteration - previous),
        }

    def _right(self) -> Tensor:
        """Whether each member classifies each training example correctly, `(archive, examples)`; an empty slot none."""
        right = [margins(self.logits(params, self.train_images), self.train_labels) > 0 for params in self.archive]
        return torch.stack(right) & self.archive.any(dim=1, keepdim=True)

    def best_params(self, right: Tensor | None = None) -> Tensor:
        """Those of the member with the highest training accuracy, `(params,)`; `right` may be had from `_right`."""
        right = self._right() if right is None else right
        return self.archive[all_reduce(right.sum(dim=1)).argmax()]

    def best_model(self) -> nn.Module:
        """That member as a model of its own, on the images' device and in their precision, in evaluation mode."""
        best = deepcopy(self.model)
        set_params(best, self.best_params())
        return best

    def class_accuracies(self) -> Tensor:
        """Each member's training accuracy on each class, `(archive, classes)`; NaN for a class without examples."""
        classes = nn.functional.one_hot(self.train_labels, len(self.class_sizes))
        return all_reduce(self._right().float() @ classes.float()) / self.class_sizes

    def test_accuracy(self, models: Tensor) -> float:
        """Test accuracy of the mean of the probabilities of some models `(models, params)`."""
        probabilities = sum((self.logits(x, self.test_images) / self.temperature).softmax(dim=0) for x in models)
        return (margins(probabilities, self.test_labels) > 0).sum().item() / len(self.test_labels)

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        tensors = {name: getattr(self, "_" + name).clone() for name in ("accepted", "unmutated", "noise", "retry")}
        progress = {"iteration": self.iteration, "schedule": self.schedule, "history": list(self.history)}
        return {"archive": self.archive.clone(), "generator": self._generator.get_state()} | tensors | progress

    def load_state_dict(self, state: dict) -> None:
        """Go on from the state of an M2N2 with equal arguments; scores are recomputed. A schedule given here stays."""
        if state["archive"].shape != self.archive.shape:
            raise ValueError(f"state is of {tuple(state['archive'].shape)}, accepted is {tuple(self.archive.shape)}")
        for row, params in enumerate(state["archive"].to(self._rows.device)):
            # Into the child's row; from memory of its own, like a child, as alignment may change a product's last bits.
            self._evaluate(params.clone())
            self._rows[row] = torch.where(params.any(), self._rows[-1], 0)  # an empty slot's scores are zeros too
        for name in ("accepted", "unmutated", "noise", "retry"):
            getattr(self, "_" + name).copy_(state[name])
        self._generator.set_state(state["generator"])
        self.schedule = self.schedule or state["schedule"]
        self.iteration, self.history = state["iteration"], list(state["history"])


def captured_step(m2n2: M2N2) -> Callable[[], None]:
    """The replay of a CUDA graph of a step, a single launch; or the step itself, if its model makes the host wait.

    Capture records a step and runs none.
    """
    device, generator, graph = m2n2.archive.device, m2n2._generator, torch.cuda.CUDAGraph()
    state = generator.get_state()
    try:
        if torch.__version__ < "2.14":  # compared as versions; a later torch registers a generator on its first use
            graph.register_generator_state(generator)
        options = {"stream": torch.cuda.Stream(device), "capture_error_mode": "thread_local"}
        current = torch.cuda.stream(torch.cuda.current_stream(device))  # restores it, which a failed capture does not
        with torch.cuda.device(device), current, torch.cuda.graph(graph, **options):
            m2n2._step()
    except RuntimeError as error:
        if rank_zero_only.rank == 0:
            tqdm.write(f"No CUDA graph, which is slower: the step cannot be captured ({str(error).splitlines()[0]})")
        m2n2._generator = torch.Generator(device)  # the other may still be in capture mode
        m2n2._generator.set_state(state)
        return m2n2._step
    return graph.replay


# --- Outputs ---
@rank_zero_only
def atomic_save(save: Callable[[IO], object], path: Path) -> None:
    """What `save` writes, to a temporary file that is moved into place: whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with explained(f"{path} could not be written", "Make room, then RESUME the last checkpoint."):
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)


@rank_zero_only
def plot_evolution(histories: Sequence[list[dict]], niches: Tensor, path: Path) -> None:
    """Left: mean ± SD of runs. Right: what tells members apart, `niches` `(archive, classes)` of `class_accuracies`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("No figure without matplotlib: `pip install matplotlib` to get evolution.png.")
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    (left, right), rows, runs = figure.subplots(1, 2), min(map(len, histories)), len(histories)
    children = [row["iteration"] / 1_000 for row in histories[0][:rows]]
    labels = {"coverage": "training coverage", "test_acc": "test accuracy", "diversity": "training diversity"}
    for key, label in labels.items():
        values = np.array([[100 * row[key] for row in history[:rows]] for history in histories])  # (runs, rows)
        mean, std = values.mean(axis=0), values.std(axis=0, ddof=min(1, runs - 1))
        left.plot(children, mean, label=label)
        left.fill_between(children, mean - std, mean + std, alpha=0.3)
    left.legend(loc="center right")
    title = f"Evolution, n = {runs}" if runs > 1 else "Evolution"
    left.set(xlabel="children evaluated (thousands)", ylabel="examples (%)", title=title)
    difference = 100 * (niches - niches.mean(dim=0)).numpy()
    limit = np.nanmax(np.abs(difference), initial=0.1)
    image = right.imshow(difference, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
    right.set(xlabel="class", ylabel="archive member", title="Niches: training accuracy", xticks=range(niches.shape[1]))
    figure.colorbar(image, label="points above the mean")
    atomic_save(partial(figure.savefig, format="png", dpi=200), path)


# --- What is accepted, said once for the classes above, the constants, the flags and --help ---
RULES = {  # (type, lowest, highest) or (type, *choices): the names it holds for
    (int, 0, 10**9): ("seed", "schedule", "eval_batch_size"),
    (int, 1, 10**9): ("runs", "iterations", "test_every"),
    (int, 1, 10**5): ("hidden_dim",),
    (int, 1, 28): ("crop_size", "image_size"),
    (int, 2, 10**4): ("archive_size",),
    (float, 1e-3, 1e3): ("temperature",),
    (float, 0.0, 3.0): ("alpha",),
    (float, 1e-12, 1e30): ("init_std",),
    (float, 0.0, 1e30): ("mutation_std", "final_mutation_std", "prior_std"),
    (bool, True, False): ("deskew", "use_crossover", "use_split_point", "use_attraction", "use_mirroring"),
    (str, "probability", "correct"): ("score",),
    (str, "MNIST", "FashionMNIST", "KMNIST"): ("dataset",),
    (str, "auto", "cpu", "cuda"): ("accelerator",),
    (Path,): ("resume", "data_dir", "output_dir"),
}
ACCEPTED = {name: rule for rule, names in RULES.items() for name in names}
CONSTANTS = [name for name in globals() if name.isupper() and name.lower() in ACCEPTED]


class UserError(Exception):
    """Something that only the user can mend; the message names it and the remedy."""


@contextlib.contextmanager
def explained(trouble: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library or the disk raises inside into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{trouble}: {error or type(error).__name__}\n{remedy}") from error


def in_words(name: str) -> str:
    """What an argument or constant takes."""
    kind, *limits = ACCEPTED[name.lower()]
    if kind in (int, float):
        return f"{'an integer' if kind is int else 'a number'} from {limits[0]} to {limits[1]}"
    return "a folder" if kind is Path else " | ".join(map(repr, limits))


def checked(name: str, value: object) -> int | float | bool | str:
    """`value` in the type that `name` has; ValueError that names it, the value and what is accepted.

    A whole float serves as an integer, the text of a number or of True as what it means, a `Path` as its text.
    """
    kind, *limits = ACCEPTED[name.lower()]
    with contextlib.suppress(ValueError, KeyError):
        if kind is Path and isinstance(value, str | Path):
            return str(os.path.expanduser(value))
        if kind in (str, bool) and isinstance(value, str | bool | np.bool_):
            choices = {str(choice).lower(): choice for choice in limits}  # "true": True, "mnist": "MNIST"
            return choices[str(value).strip().lower()]
        if kind in (int, float) and isinstance(value, str | Real) and not isinstance(value, bool):
            number = float(value) if isinstance(value, str) else value
            if limits[0] <= number <= limits[1] and (kind is float or number % 1 == 0):  # false for NaN
                return kind(number)
    on_one_line = " ".join(repr(value).split())
    raise ValueError(f"{name} is {on_one_line}, accepted is {in_words(name)}")


def checked_examples(split: str, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Both as tensors on the images' device; ValueError if they cannot be used."""
    images, labels = torch.as_tensor(images).contiguous(), torch.as_tensor(labels)
    usable = images.is_floating_point() and images.dim() and len(images) and images.isfinite().all()
    if not usable or labels.dtype != torch.long or labels.shape != images.shape[:1] or labels.min() < 0:
        found = f"{images.dtype} {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
        accepts = "floating-point (examples, ...), all finite, and int64 (examples,) from 0 up"
        raise ValueError(f"{split}_images and {split}_labels are {found}, accepted are {accepts}")
    return images, labels.to(images.device)


@torch.no_grad()
def checked_model(model: nn.Module, images: Tensor, classes: int) -> nn.Module:
    """A copy to be evaluated on these images; ValueError if its logits do not fit the labels."""
    model = deepcopy(model).to(images.device, images.dtype).eval()
    shape = functional_call(model, dict(model.named_parameters()), images[:1]).shape
    if len(shape) != 2 or shape[0] != 1 or shape[1] < classes:
        raise ValueError(f"model answers {tuple(shape)} to an image, accepted is (1, {classes}) or more classes")
    return model


# --- The command line ---
SOURCE = Path(__file__).read_bytes()  # as it runs: the file may be edited before a run's folder gets a copy


def parse_constants(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, object]]:
    """The constants at the top, overridden by flags, each checked; and those that were overridden."""
    layout = {"usage": "%(prog)s [--constant VALUE]...", "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, **layout)
    # The help for a flag is the comment beside its constant.
    comments = dict(re.findall(r"^([A-Z_]+)\b.*# *(.*?)\r?$", SOURCE.decode(errors="replace"), re.M))
    defaults = {name: globals()[name] for name in CONSTANTS}
    for name, default in defaults.items():
        meaning = f"{comments.get(name, '')} [{in_words(name)}] (default: {default!r})".strip().replace("%", "%%")
        flag = "--" + name.lower().replace("_", "-")
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=meaning)
    flags = vars(parser.parse_args(argv))
    try:
        flags = {name: checked(name, text) for name, text in flags.items()}
        constants = argparse.Namespace(**{name: checked(name, value) for name, value in defaults.items()} | flags)
        checked("SEED", constants.SEED + constants.RUNS - 1)  # the last run's
        return constants, flags
    except ValueError as error:
        parser.exit(2, f"Error: {error}\n")


def resume(constants: argparse.Namespace, flags: dict[str, object]) -> dict:
    """The checkpoint in RESUME, whose constants these become: the run goes on as it was.

    A flag may raise ITERATIONS and name other folders; UserError for any other that differs, or no whole checkpoint.
    """
    path = Path(constants.RESUME, "checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        then = {name: checked(name, checkpoint["constants"][name]) for name in vars(constants)}
    except Exception as error:  # whose message is withheld: torch's may advise weights_only=False
        raise UserError(f"{path} is no whole checkpoint of this script. RESUME wants a run's folder.") from error
    for name, value in flags.items():
        allowed = name in ("RESUME", "DATA_DIR", "OUTPUT_DIR") or (name == "ITERATIONS" and value > then[name])
        if value != then[name] and not allowed:
            raise UserError(f"{name} is {value!r}, but {then[name]!r} in the run to RESUME, which goes on as it was.")
    vars(constants).update(then | flags, RESUME=constants.RESUME)  # which may be set in the file, not by a flag
    return checkpoint


# --- A run ---
def launch(accelerator: str) -> Fabric:
    """The device and, under torchrun, the processes; each process that SLURM or MPI starts is a run of its own."""
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    environment, processes, nodes = LightningEnvironment(), 1, 1
    if dist.is_torchelastic_launched():
        environment, processes = TorchElasticEnvironment(), int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = environment.world_size() // processes
    with explained(f"ACCELERATOR is {accelerator!r}", "Set it to 'auto' or 'cpu'; a run goes on where it was made."):
        fabric = Fabric(accelerator=accelerator, devices=processes, num_nodes=nodes, plugins=[environment])
    fabric.launch()
    rank_zero_only.rank = fabric.global_rank  # Lightning would take SLURM's, by which only one run would speak
    return fabric


@contextlib.contextmanager
def noted_signals(fabric: Fabric) -> Iterator[Callable[[], int]]:
    """The first Ctrl-C or SIGTERM is noted, so that all is saved before the end; a second one is the end at once.

    Yields a function that returns the number of the signal, or 0, the same in all processes whichever caught it.
    """
    noted = [0]
    with contextlib.ExitStack() as handlers:

        def note(number: int, frame: object) -> None:
            noted.append(number)
            handlers.close()  # sets the previous handlers, so that a second signal ends all

        def caught() -> int:
            return int(fabric.all_reduce(max(noted), reduce_op="max")) if fabric.world_size > 1 else max(noted)

        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.signal(number, note)
                handlers.callback(signal.signal, number, previous)
        yield caught


@rank_zero_only
def new_folder(output_dir: str) -> str:
    """A new version_N with a copy of this script; making it claims it, as only one of several runs can."""
    parent = Path(output_dir, "m2n2_mnist")
    with explained(f"{parent} cannot be written", "Choose another OUTPUT_DIR."):
        for number in count():
            folder = parent / f"version_{number}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                (folder / Path(__file__).name).write_bytes(SOURCE)
                return str(folder)


def run(
    constants: argparse.Namespace, fabric: Fabric, data: MNISTDataModule, caught: Callable[[], int], state: dict | None
) -> tuple[M2N2, Path]:
    """A run from its folder to its last checkpoint: what evolved, and the folder."""
    folder = Path(constants.RESUME or fabric.broadcast(new_folder(constants.OUTPUT_DIR)))
    shared = [name for name in M2N2.__init__.__annotations__ if name.upper() in CONSTANTS]  # "seed", "alpha", …
    settings = {name: getattr(constants, name.upper()) for name in shared}
    model, examples = MLP(constants.IMAGE_SIZE**2, constants.HIDDEN_DIM), [x.to(fabric.device) for x in data.examples]
    m2n2 = M2N2(model, *examples, schedule=constants.ITERATIONS, **settings)
    if state:
        with explained(f"{folder} is of another model", "RESUME it with the script that lies in it."):
            m2n2.load_state_dict(state)
    logger = CSVLogger(folder, name="", version="")
    logger.log_hyperparams(vars(constants))
    # This run alone is what its checkpoint resumes, and from any working directory.
    resumable = vars(constants) | {"RUNS": 1, "DATA_DIR": os.path.abspath(constants.DATA_DIR)}

    def save(rows: Sequence[dict]) -> None:  # log these and write a checkpoint
        with explained(f"{folder} could not be written", "Make room, then RESUME the last checkpoint."):
            for row in rows:
                logger.log_metrics(row, row["iteration"])
            logger.save()
        checkpoint = {"constants": resumable, "checksum": data.checksum, "m2n2": m2n2.state_dict()}
        atomic_save(partial(torch.save, checkpoint), folder / "checkpoint.pt")

    def after_child(m2n2: M2N2) -> bool:
        if m2n2.history and m2n2.history[-1]["iteration"] == m2n2.iteration:
            save(m2n2.history[-1:])
        together = fabric.world_size == 1 or m2n2.iteration % 50 == 0  # all processes stop at the same child
        return together and caught() > 0

    save(m2n2.history)  # of a resumed run; the logger starts metrics.csv anew
    if (first := m2n2.iteration) < constants.ITERATIONS:
        started = time.perf_counter()
        m2n2.evolve(constants.ITERATIONS - first, constants.TEST_EVERY, after_child)
        seconds, children = time.perf_counter() - started, m2n2.iteration - first
        fabric.print(f"{children:,} children in {seconds:.1f} s, {children / seconds:.1f} a second")
        save([])
    return m2n2, folder


def report(fabric: Fabric, m2n2: M2N2, histories: list[list[dict]], folder: Path) -> float:
    """The best model, the figure, and the last lines of a run; the test accuracy of that model."""
    best, end = m2n2.best_model(), "Evolution finished."
    accuracy = m2n2.test_accuracy(get_params(best)[None])
    atomic_save(partial(torch.save, best.cpu().state_dict()), folder / "best_model.pt")
    plot_evolution(histories, m2n2.class_accuracies().cpu(), folder / "evolution.png")
    if m2n2.iteration < m2n2.schedule:  # which is ITERATIONS
        end = f"Evolution interrupted at iteration {m2n2.iteration}. To go on, give no flag but --resume {folder}"
    fabric.print(f"Test accuracy of the archive as an ensemble: {m2n2.test_accuracy(m2n2.archive):.2%}")
    fabric.print(f"Files: {folder}\n{end}\nFinal Test Accuracy of the best model: {accuracy:.2%}", flush=True)
    return accuracy


def run_all(constants: argparse.Namespace, flags: dict[str, object]) -> int:
    """All runs of the experiment; the number of the signal that interrupted it, or 0."""
    checkpoint = resume(constants, flags) if constants.RESUME else {}
    fabric = launch(constants.ACCELERATOR)
    constants.ACCELERATOR = fabric.device.type  # what "auto" was
    vars(constants).update(fabric.broadcast(vars(constants)))  # an expression may differ between processes
    prepared = (constants.DATASET, constants.DESKEW, constants.CROP_SIZE, constants.IMAGE_SIZE)
    data = MNISTDataModule(constants.DATA_DIR, *prepared)
    with fabric.rank_zero_first(local=True):
        data.prepare_data()
    data.setup()
    if checkpoint and checkpoint.get("checksum") != data.checksum:
        raise UserError("The images in DATA_DIR are not those of the run to RESUME. Point it at them, or start afresh.")
    histories, accuracies, left = [], [], constants.RUNS
    images = f"{len(data.train_labels):,} + {len(data.test_labels):,} images of {constants.DATASET}"
    with noted_signals(fabric) as caught:
        while left and not caught():
            fabric.print(f"M2N2 on {fabric.device}, {fabric.world_size} process(es); {images}; seed {constants.SEED}")
            m2n2, folder = run(constants, fabric, data, caught, checkpoint.get("m2n2"))
            histories.append(m2n2.history)
            accuracies.append(report(fabric, m2n2, histories, folder))
            constants.SEED, left = constants.SEED + 1, left - 1
        signaled = caught()
    if left:
        fabric.print(f"For the other runs, add --seed {constants.SEED} --runs {left}")
    elif len(accuracies) > 1 and not signaled:
        std, mean = torch.std_mean(100 * torch.tensor(accuracies))
        fabric.print(f"Mean Test Accuracy of {len(accuracies)} runs: {mean:.2f} ± {std:.2f}%")
    fabric.barrier()  # torchrun ends the others when the first leaves with an error code
    return signaled


def main(argv: Sequence[str] = ()) -> int:
    """The experiment of the constants and flags, and its exit code; what only the user can mend ends in one message."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  None where it was closed
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's have no reconfigure
            stream.reconfigure(errors="replace")  # where σ cannot be shown
    # CSVLogger warns that it deletes the metrics.csv of a resumed run, whose rows `run` logs again.
    warnings.filterwarnings("ignore", module="lightning_fabric|pytorch_lightning")
    try:
        signaled = run_all(*parse_constants(argv))
        return 128 + signaled if signaled else 0
    except (UserError, OSError) as error:
        sys.exit(f"Error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
