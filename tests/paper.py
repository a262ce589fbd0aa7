"""Experiment 1 of the paper on its own data, 8x8 digits: from scratch, and from two trained models.

python tests/paper.py --table scratch --seeds 10
python tests/paper.py --table pretrained --seeds 10
"""

import argparse
import contextlib
import io
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice

import torch
from peers import Evaluator, map_elites, search
from settings import GA, MERGING, PAPER, digits, train_specialists
from torch import Tensor, nn

from m2n2_mnist import M2N2, MLP, slerp

PASSES = {"scratch": 50_000, "pretrained": 10_000}
FIGURES = {  # test accuracy in %, read off the paper's plot; None: not in it, or not to be read off
    "scratch": {
        "M2N2": 87,
        "M2N2 without crossover": 77,
        "M2N2 without split point": None,
        "M2N2 without attraction": None,
        "GA": 68,
        "GA without crossover": 71,
        "separable CMA-ES": 86,  # the paper's has the full covariance, here 3 GB
        "MAP-Elites": 60,
    },
    "pretrained": {
        "M2N2": 68,
        "M2N2 without attraction": 66,
        "M2N2 without split point": 58,
        "GA": 52,
        "MAP-Elites": None,
        "brute force": None,
    },
}
VARIANTS = {  # what the paper's names change in M2N2
    "M2N2": {},
    "M2N2 without crossover": {"use_crossover": False},
    "M2N2 without split point": {"use_split_point": False},
    "M2N2 without attraction": {"use_attraction": False},
    "GA": GA,
    "GA without crossover": GA | {"use_crossover": False},
}
NEED_EVOTORCH = {"separable CMA-ES", "MAP-Elites"}


class MLPByPixel(nn.Module):
    """The same function as an `MLP`, its parameters in the paper's order: a split point cuts it.

    `nn.Linear` keeps the weights of a hidden unit together, the paper's those of an input pixel.
    """

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.transposed = nn.ParameterList(
            p.detach().t().contiguous().clone() for p in mlp.parameters()
        )

    def forward(self, images: Tensor) -> Tensor:
        hidden_weight, hidden_bias, weight, bias = self.transposed
        return (images @ hidden_weight + hidden_bias).relu() @ weight + bias


ORDERS = {"by hidden unit": lambda mlp: mlp, "by input pixel": MLPByPixel}


def experiment(method: str, order: str, pretrained: bool, seed: int) -> M2N2:
    """M2N2 as Experiment 1 has it, but for what the method changes; its peers start like it."""
    tensors, settings = digits(), (MERGING if pretrained else PAPER) | VARIANTS.get(method, {})
    specialists = train_specialists(*tensors[:2], seed) if pretrained else []
    first = [ORDERS[order](mlp) for mlp in specialists]
    return M2N2(ORDERS[order](MLP(64, 256)), *tensors, initial_models=first, seed=seed, **settings)


def brute_force(evaluator: Evaluator, a: Tensor, b: Tensor, points: int = 10_000) -> Tensor:
    """The authors' grid: the SLERP, without a split point, of the highest training accuracy."""
    return max((slerp(w, a, b) for w in torch.linspace(0, 1, points)), key=evaluator.accuracy)


def run(table: str, children: int, job: tuple[str, str, int]) -> float:
    """Final test accuracy in % of a method, parameter order and seed."""
    method, order, seed = job
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars, and warnings of imports
        m2n2 = experiment(method, order, table == "pretrained", seed)
        if method in VARIANTS:
            m2n2.evolve(children, test_every=children)
            return 100 * m2n2.history[-1]["test_acc"]
        evaluator, start = Evaluator(m2n2), list(m2n2.archive[:2].clone())
        if method == "brute force":
            best = brute_force(evaluator, *start)
        elif method == "MAP-Elites":
            best = map_elites(evaluator, len(start[0]), children, seed, m2n2.mutation_std, start)
        else:
            best = search(
                method,
                evaluator,
                start[0],
                children,
                seed,
                by_loss=False,
                popsize=20,
                stdev_init=0.01,
            )
        return evaluator.test_accuracy(best)


def rows_of(
    table: str, methods: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, str, list[tuple]]]:
    """The label of each row, the paper's figure, and its jobs for `run`."""
    for method in methods:
        both = table == "pretrained" and method not in (
            "brute force",
            "M2N2 without split point",
        )  # else the same
        orders = list(ORDERS) if both else ["by hidden unit"]
        for order in orders:
            label = f"{method}, {order}" if len(orders) > 1 else method
            figure = (
                FIGURES[table][method] if order == orders[-1] else None
            )  # the paper has one order
            yield label, figure or "–", [(method, order, seed) for seed in seeds]


def show_table(
    table: str, methods: Sequence[str], seeds: Sequence[int], children: int
) -> dict[str, Tensor]:
    """Accuracies of each row, printed in Markdown as they come; a process for each core."""
    gone = [method for method in methods if method in NEED_EVOTORCH and not find_spec("evotorch")]
    if gone:
        print(f"Without {' and '.join(gone)}: pip install -r tests/requirements-peers.txt")
    rows = list(rows_of(table, [method for method in methods if method not in gone], seeds))
    print("| method | paper | ours, mean ± SD | each seed |\n| --- | --- | --- | --- |", flush=True)
    accuracies = {}
    with multiprocessing.get_context("spawn").Pool(
        os.cpu_count(), torch.set_num_threads, (1,)
    ) as pool:
        results = pool.imap(
            partial(run, table, children), [job for *_, jobs in rows for job in jobs]
        )
        for label, figure, jobs in rows:
            accuracies[label] = row = torch.tensor(list(islice(results, len(jobs))))
            ours = f"{row.mean():.1f} ± {row.std():.1f}" if len(jobs) > 1 else f"{row[0]:.1f}"
            each = " ".join(f"{accuracy:.1f}" for accuracy in row)
            print(f"| {label} | {figure} | {ours} | {each} |", flush=True)
        pool.close()
        pool.join()  # a worker that is ended leaks
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=list(FIGURES), default="scratch")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="some of the table's, in quotes; all by default",
    )
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds, from 42")
    parser.add_argument(
        "--children", type=int, help="forward passes of a run; the paper's by default"
    )
    arguments = parser.parse_args()
    known = FIGURES[arguments.table]
    methods = arguments.methods or list(known)
    if unknown := set(methods) - set(known):
        parser.error(f"{', '.join(unknown)}: {arguments.table} has {', '.join(known)}")
    seeds = range(42, 42 + arguments.seeds)
    show_table(arguments.table, methods, seeds, arguments.children or PASSES[arguments.table])


if __name__ == "__main__":
    main()
