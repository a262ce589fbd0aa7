"""What one would pick instead, from EvoTorch, on real MNIST with the script's model and budget.

    pip install -r tests/requirements-peers.txt
    python tests/peers.py --methods PGPE --seeds 42 43 44

Each evaluates as many models as M2N2 and starts from N(0, 0.01^2), on the same kind of subset
(MAP-Elites on all images: its cells count them).
`--set subset_size=0 --children 50000` is on all images. What counts is the centre of the last
distribution or the best model ever evaluated, whichever has the higher training accuracy; of M2N2
and the GAs it is the best in the archive. Adam is no peer but the reference: the same MLP by
gradient descent. Any other run, when done, writes its test accuracy every 1,000 children to
runs/peers/METHOD-SEED.csv, beside what it has cost: passes over all training images, and seconds.
`--plot` draws these.
"""

import argparse
import ast
import csv
import logging
import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from settings import GA, PAPER, mnist, script
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from m2n2_mnist import M2N2, MLP, get_params, slerp

# Chosen on the last 10,000 training images; RESULTS.md says how many were tried.
SETTINGS = {
    "PGPE": {
        "popsize": 50,
        "center_learning_rate": 0.01,
        "final_center_learning_rate": 0.005,  # it falls as M2N2's σ does
        "stdev_learning_rate": 0.1,
        "stdev_init": 0.03,
    },
    "SNES": {"popsize": 50, "stdev_init": 0.05},
    "separable CMA-ES": {"popsize": 32, "stdev_init": 0.02},
    "MAP-Elites": {"mutation_std": 0.02},
    "M2N2": {},
    "M2N2, the paper's setting": PAPER,
    "GA": GA,
    "GA on log-likelihood": {"use_attraction": False},
    "M2N2 without crossover": {"use_crossover": False},
    "M2N2 without split point": {"use_split_point": False},
    "M2N2 without attraction": {"use_attraction": False},
    "M2N2 without competition": {"alpha": 0.0},
    "M2N2 without prior": {"prior_std": 0.0},
    "Adam": {"epochs": 40},
}
MILESTONES = (90, 95, 97, 98)  # % of test accuracy
ROW_EVERY = 1_000  # children between two rows of a run's CSV


class LogLikelihoodGA(M2N2):
    """The GA with another fitness, exp(mean_j log s_ij), a geometric mean: nothing is shared.

    To first order M2N2 selects by the same with alpha = 1, and so does the cross-entropy.
    """

    def _update_fitness(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.double().clamp(min=1e-12).log().mean(dim=1).exp(), torch.ones_like(scores[0])


OURS = {method: M2N2 for method in SETTINGS if method.startswith("M2N2")}
OURS |= {"GA": M2N2, "GA on log-likelihood": LogLikelihoodGA}


class Evaluator:
    """A model of parameters `(params,)` on training and test examples; counts its evaluations."""

    def __init__(self, m2n2: M2N2) -> None:
        self.m2n2, self.children = m2n2, 0
        self.odd = m2n2.train_labels % 2 == 1

    def choose_subset(self, params: Tensor) -> None:
        """The subset that M2N2 would choose, were this model its archive."""
        self.m2n2.archive.zero_()
        self.m2n2.archive[0] = params
        self.m2n2._choose_subset()

    def loss(self, params: Tensor) -> float:
        """Cross-entropy on the subset."""
        self.children += 1
        logits = self.m2n2.logits(params, self.m2n2._images)
        return -logits.log_softmax(dim=0).gather(0, self.m2n2._labels[None]).mean().item()

    def train_right(self, params: Tensor) -> Tensor:
        self.children += 1
        logits = self.m2n2.logits(params, self.m2n2.train_images)
        return (script.margins(logits, self.m2n2.train_labels) > 0).float()

    def accuracy(self, params: Tensor) -> float:
        """On all training examples."""
        return self.train_right(params).mean().item()

    def by_cell(self, params: Tensor) -> list[float]:
        """Training accuracy, and the tenths, 0 to 9, of that on odd and that on even digits."""
        right = self.train_right(params)
        parts = (right[self.odd].mean(), right[~self.odd].mean())
        return [right.mean().item(), *(min(9, int(10 * part)) for part in parts)]

    def test_accuracy(self, params: Tensor) -> float:
        return 100 * self.m2n2.test_accuracy(params[None])


def passes(m2n2: M2N2, children: int, models: int) -> float:
    """Over all training images: of so many children, and of the models that choose subsets."""
    share = m2n2.subset_size / len(m2n2.train_labels)
    if share == 1:
        return float(children)
    return children * share + math.ceil(children / m2n2.subset_every) * models * (1 + share)


def make_problem(
    evaluate: Callable[[Tensor], float | list[float]],
    length: int,
    seed: int,
    sense: str,
    extra: int = 0,
):
    """An EvoTorch problem, evaluated one by one; `extra` figures follow the objective."""
    logging.disable(logging.INFO)
    from evotorch import Problem

    class Classifier(Problem):
        def _evaluate_batch(self, solutions) -> None:
            solutions.set_evals(
                torch.tensor([evaluate(x) for x in solutions.values.as_subclass(Tensor)])
            )

        def _fill(self, values: Tensor) -> None:
            values.zero_()  # each search is given its start

    return Classifier(sense, solution_length=length, eval_data_length=extra or None, seed=seed)


def search(
    method: str,
    evaluator: Evaluator,
    start: Tensor,
    children: int,
    seed: int,
    by_loss: bool,
    after: Callable[[Tensor], None] = lambda params: None,
    **settings: object,
) -> Tensor:
    """Best parameters that PGPE, SNES or the separable CMA-ES finds; `after` sees its centres."""
    evaluate, sense = (evaluator.loss, "min") if by_loss else (evaluator.accuracy, "max")
    problem = make_problem(evaluate, len(start), seed, sense)
    from evotorch.algorithms import CMAES, PGPE, SNES

    if method == "PGPE":
        final = settings.pop("final_center_learning_rate")
        searcher = PGPE(problem, center_init=start, optimizer="adam", **settings)
    elif method == "SNES":
        searcher = SNES(problem, center_init=start, **settings)
    else:
        searcher = CMAES(problem, center_init=start, separable=True, **settings)
    centre, chosen = start, 0
    while evaluator.children + settings["popsize"] <= children:
        if by_loss and evaluator.children >= chosen:
            evaluator.choose_subset(centre)
            chosen += evaluator.m2n2.subset_every
        if method == "PGPE":  # by half a cosine
            wave = (1 + np.cos(np.pi * evaluator.children / children)) / 2
            rate = final + (settings["center_learning_rate"] - final) * wave
            searcher.optimizer.param_groups[0]["lr"] = rate
        searcher.step()
        centre = searcher.status["center"].as_subclass(Tensor)
        if evaluator.children % ROW_EVERY < settings["popsize"]:
            after(centre)
    found = [
        x.as_subclass(Tensor) for x in (searcher.status["center"], searcher.status["best"].values)
    ]
    return max(found, key=evaluator.accuracy)


def merge(a: Tensor, b: Tensor, mutation_std: float, generator: torch.Generator) -> Tensor:
    """Child `(params,)` by the paper's crossover and mutation."""
    w, split_point = (
        torch.rand(1, generator=generator),
        torch.randint(len(a), (1,), generator=generator),
    )
    before, after = slerp(torch.stack([w, 1 - w]), a, b)
    child = torch.where(torch.arange(len(a)) < split_point, before, after)
    return child + mutation_std * torch.randn(len(a), generator=generator)


def map_elites(
    evaluator: Evaluator,
    params: int,
    children: int,
    seed: int,
    mutation_std: float,
    start: Sequence[Tensor] = (),
    after: Callable[[Tensor], None] = lambda params: None,
) -> Tensor:
    """Best parameters that MAP-Elites finds, with the authors' cells, on all images.

    The cells are accuracy on odd and on even digits, 10 x 10. `start` are the first models, by
    default two random ones, evaluated on top of the children as M2N2's are. EvoTorch makes a child
    for each cell a generation, where the authors make one at a time; a part of a generation is not
    made. It also copies all solutions for each cell, so they are not the models but their keys in a
    dictionary.
    """
    evaluate = cache(lambda key: evaluator.by_cell(models[key]))  # each model once
    problem = make_problem(lambda key: evaluate(int(key)), 1, seed, "max", extra=2)
    from evotorch.algorithms import MAPElites
    from evotorch.operators import CopyingOperator

    models = dict(enumerate(start or 0.01 * torch.randn(2, params, generator=problem.generator)))
    new_keys = count(len(models))

    class Merge(CopyingOperator):
        def _do(self, batch):
            filled = searcher.filled.as_subclass(Tensor)
            if not filled.any():
                return batch  # the first models find their cells
            keys = batch.values[:, 0].int().tolist()
            elites = [models[key] for key in keys]
            models.clear()
            models.update(zip(keys, elites, strict=True))
            quality = filled * batch.evals[:, 0].as_subclass(Tensor).clamp(min=1e-12)
            born = list(islice(new_keys, len(batch)))
            for key in born:
                a, b = quality.multinomial(
                    2, replacement=bool(filled.sum() < 2), generator=problem.generator
                )
                models[key] = merge(elites[a], elites[b], mutation_std, problem.generator)
            children = batch.clone()
            children.set_values(torch.tensor(born)[:, None])
            return children

    tenths = MAPElites.make_feature_grid(torch.full((2,), 0.5), torch.full((2,), 8.5), num_bins=10)
    searcher = MAPElites(
        problem, operators=[Merge(problem)], feature_grid=tenths, re_evaluate=False
    )
    population = searcher.population
    population.set_values(torch.arange(len(population))[:, None] % len(models))
    for generation in range(1 + children // len(population)):
        searcher.step()
        if generation % (ROW_EVERY // len(population)) == 0 and generation:
            after(models[int(population.values[population.evals[:, 0].argmax()])])
    return models[int(population.values[population.evals[:, 0].argmax()])]


class ByGradient(LightningModule):
    """A classifier as Lightning trains it, by Adam on the cross-entropy."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def train_by_adam(m2n2: M2N2, epochs: int) -> Tensor:
    """Parameters after some epochs of gradient descent, batches of 128, `nn.Linear`'s own start."""
    model = deepcopy(m2n2.model)
    for layer in model.children():
        layer.reset_parameters()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    examples = DataLoader(TensorDataset(m2n2.train_images, m2n2.train_labels), 128, shuffle=True)
    Trainer(accelerator="cpu", max_epochs=epochs, barebones=True).fit(ByGradient(model), examples)
    return get_params(model)


def run(
    method: str, m2n2: M2N2, seed: int, children: int, by_loss: bool = True, **settings: object
) -> dict:
    """Test and training accuracy in %, seconds in all and to each of MILESTONES, rows."""
    if method not in (*OURS, "Adam"):
        import evotorch  # noqa: F401  which takes a second that is not the method's
    torch.manual_seed(seed)
    evaluator, params, rows = Evaluator(m2n2), m2n2.archive.shape[1], []
    started = time.perf_counter()

    def add_row(children: int, models: int, test_acc: float) -> None:
        on_all_images = method in ("MAP-Elites", "Adam")
        cost = {"passes": float(children) if on_all_images else passes(m2n2, children, models)}
        cost["seconds"] = time.perf_counter() - started
        rows.append({"children": children} | cost | {"test_acc": test_acc})

    def after_row(row: dict) -> None:
        add_row(row["iteration"], m2n2.archive_size, 100 * row["test_acc"])

    def after(params: Tensor) -> None:
        add_row(evaluator.children, 1, evaluator.test_accuracy(params))

    if method in OURS:
        m2n2.evolve(children, ROW_EVERY, after_row)
        best = m2n2.best
    elif method == "Adam":
        best = train_by_adam(m2n2, **settings)
        add_row(settings["epochs"], 0, evaluator.test_accuracy(best))
    elif method == "MAP-Elites":
        best = map_elites(evaluator, params, children, seed, after=after, **settings)
    else:
        start = 0.01 * torch.randn(params)
        best = search(method, evaluator, start, children, seed, by_loss, after, **settings)
    seconds = time.perf_counter() - started
    reached = {goal: [r["seconds"] for r in rows if r["test_acc"] >= goal] for goal in MILESTONES}
    return {
        "test": evaluator.test_accuracy(best),
        "train": 100 * evaluator.accuracy(best),
        "seconds": seconds,
        "milestones": {goal: times[0] for goal, times in reached.items() if times},
        "rows": rows,
    }


SHOWN = {  # in the README's picture, in colours of Okabe & Ito
    "M2N2": "#0072b2",
    "PGPE": "#d55e00",
    "GA on log-likelihood": "#009e73",
    "GA": "#cc79a7",
    "M2N2, the paper's setting": "#56b4e9",
}


def plot(folder: Path, path: str) -> object:
    """Axes with test accuracy against passes over all training images, means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    ends = []
    for method, colour in SHOWN.items():
        paths = sorted(folder.glob(f"{method}-[0-9]*.csv"))
        if not paths:
            continue
        runs = [np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2) for path in paths]
        rows = min(map(len, runs))
        passes = runs[0][:rows, 1]
        mean = np.mean([run[:rows, 3] for run in runs], axis=0)
        axes.plot(passes / 1_000, mean, color=colour, linewidth=2)
        label = f"{method}: {mean[-1]:.2f} % (n = {len(runs)})"
        ends.append((mean[-1], passes[-1] / 1_000, label, colour))
    adam = [np.loadtxt(p, delimiter=",", skiprows=1) for p in folder.glob("Adam-[0-9]*.csv")]
    if adam:
        level = np.mean([run[3] for run in adam])
        axes.axhline(level, color="grey", linewidth=0.8)
        ends.append((level, 0, f"Adam, by gradient: {level:.2f} % (n = {len(adam)})", "grey"))
    axes.set(xlabel="passes over the 60,000 training images (thousands)")
    axes.set(ylabel="test accuracy (%)")
    # By the error, or the end could not be seen.
    spread = (lambda y: -np.log10(100.5 - y), lambda x: 100.5 - 10**-x)
    axes.set_yscale("function", functions=spread)
    axes.set(xlim=(0, None), ylim=(80, 98.8), yticks=(80, 85, 90, 93, 95, 96, 97, 98, 98.5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    # Labels at the right, from the top down, each at its line's end but not over the one above.
    height = 1.0
    for accuracy, _, label, colour in sorted(ends, reverse=True):
        at_end = axes.transAxes.inverted().transform(axes.transData.transform((0, accuracy)))[1]
        height = min(height - 0.055, max(at_end, 0.02))
        place = {"xycoords": "axes fraction", "va": "center", "annotation_clip": False}
        axes.annotate(label, (1.02, height), color=colour, fontsize=9, **place)
    figure.savefig(path, dpi=160)
    return axes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--children", type=int, default=script.ITERATIONS)
    parser.add_argument("--data-dir", default=script.DATA_DIR)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(script.OUTPUT_DIR, "peers"),
        help="folder of the CSVs",
    )
    parser.add_argument(
        "--plot", metavar="PNG", help="draw the CSVs that are there, and run nothing"
    )
    parser.add_argument(
        "--validation",
        type=int,
        default=0,
        help="train on the first so many, test on the last 10,000",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings instead of SETTINGS'"
    )
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.output_dir, arguments.plot)
        return
    tensors = mnist(arguments.data_dir)
    if part := arguments.validation:
        tensors = tensors[0][:part], tensors[1][:part], tensors[0][-10_000:], tensors[1][-10_000:]
    changed = dict(pair.split("=") for pair in arguments.set)
    for name, text in changed.items():
        value = script.from_text(name.upper(), text)
        known = name.upper() in script.ACCEPTED
        changed[name] = script.check(name.upper(), value) if known else ast.literal_eval(text)
    subset = {name: value for name, value in changed.items() if name.startswith("subset_")}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for method in arguments.methods:
        for seed in arguments.seeds:
            settings = SETTINGS[method] | changed
            own = settings if method in OURS else subset
            search_settings = {n: v for n, v in settings.items() if n not in own}
            m2n2 = OURS.get(method, M2N2)(MLP(tensors[0][0].numel()), *tensors, seed=seed, **own)
            row = run(method, m2n2, seed, arguments.children, **search_settings)
            if row["rows"] and not arguments.validation:
                with open(arguments.output_dir / f"{method}-{seed}.csv", "w", newline="") as file:
                    writer = csv.DictWriter(file, row["rows"][0])
                    writer.writeheader()
                    writer.writerows(row["rows"])
            goals = row["milestones"].items()
            times = ", ".join(f"{name} % in {value:.0f} s" for name, value in goals)
            figures = f"test {row['test']:.2f}, train {row['train']:.2f}"
            figures += f", {row['seconds']:.0f} s ({times})"
            for last in m2n2.history[-1:]:
                figures += f"; coverage {last['coverage']:.2%}, diversity {last['diversity']:.2%}"
            print(f"{method:20} {settings} seed {seed}: {figures}", flush=True)


if __name__ == "__main__":
    main()
