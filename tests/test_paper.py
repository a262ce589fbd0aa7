"""The paper's own data, slow: scikit-learn's 8x8 digits, as Experiment 1 has them.

python -m pytest tests/test_paper.py -m slow -s          # the test: five seeds
python tests/test_paper.py --seeds 10                     # the README's table: ten seeds
"""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from m2n2_mnist import M2N2, MLP

METHODS = {  # the paper's names and what they change
    "M2N2": {},
    "without crossover": {"use_crossover": False},
    "without split point": {"use_split_point": False},
    "without attraction": {"use_attraction": False},
    "GA": {"alpha": 0.0, "use_attraction": False},
}
PAPER = {  # all else that Experiment 1 sets
    "archive_size": 20,
    "score": "correct",
    "init_std": 0.01,
    "mutation_std": 0.01,
    "final_mutation_std": 0.01,
}


def run(method: str, seed: int, children: int = 50_000) -> float:
    """Final test accuracy of one run on `load_digits`."""
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)  # a process for each core is faster on so little data
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images, train = images.float(), int(0.8 * len(images))  # raw values 0 to 16, split in order
    tensors = images[:train], labels[:train], images[train:], labels[train:]
    m2n2 = M2N2(MLP(64, 256, 10), *tensors, seed=seed, **PAPER, **METHODS[method])
    m2n2.evolve(children, test_every=children)
    return 100 * m2n2.history[-1]["test_acc"]


def table(methods: list[str], seeds: range, children: int = 50_000) -> dict[str, torch.Tensor]:
    """Accuracies of every method and seed, a process for each core; prints a row a method."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        jobs = [(method, seed, children) for method in methods for seed in seeds]
        accuracies = torch.tensor(pool.starmap(run, jobs, chunksize=1)).view(len(methods), -1)
    for method, row in zip(methods, accuracies, strict=True):
        each = " ".join(f"{accuracy:.1f}" for accuracy in row)
        print(f"{method:22}{row.mean():6.2f} ± {row.std():.2f}   {each}", flush=True)
    return dict(zip(methods, accuracies, strict=True))


@pytest.mark.slow
def test_experiment_1_of_the_paper() -> None:
    pytest.importorskip("sklearn")
    rows = table(["M2N2", "without crossover", "GA"], range(42, 47))
    assert abs(rows["M2N2"].mean() - 87) < 2.5
    assert rows["M2N2"].mean() > rows["without crossover"].mean() > rows["GA"].mean()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--children", type=int, default=50_000)
    arguments = parser.parse_args()
    table(list(METHODS), range(42, 42 + arguments.seeds), arguments.children)
