"""What experiments and tests share: settings, the paper's data and trained models, the script."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import m2n2_mnist as script
from m2n2_mnist import MLP, get_params, set_params

PAPER = {  # Experiment 1 from scratch
    "archive_size": 20,
    "score": "correct",
    "init_std": 0.01,
    "mutation_std": 0.01,
    "final_mutation_std": 0.01,
    "prior_std": 0.0,
    "subset_size": 0,
}
MERGING = PAPER | {"mutation_std": 0.0, "final_mutation_std": 0.0}  # from pre-trained models
GA = {
    "alpha": 0.0,
    "use_attraction": False,
}  # what it changes in M2N2: no competition, no attraction


def digits() -> list[Tensor]:
    """scikit-learn's 8x8 digits, the paper's data: training images, labels, test images, labels.

    Raw values 0 to 16, the first 80 % for training.
    """
    from sklearn.datasets import load_digits

    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    train = int(0.8 * len(images))
    return [images[:train].float(), labels[:train], images[train:].float(), labels[train:]]


def mnist(data_dir: str, **settings: object) -> list[Tensor]:
    """The script's data, by the defaults or the given settings of its data module, so ordered."""
    data = script.MNISTDataModule(data_dir, **settings)
    data.prepare_data()
    data.setup()
    return list(data.examples)


def train_specialists(images: Tensor, labels: Tensor, seed: int) -> list[MLP]:
    """Two MLPs, trained as the authors do on digits 0 to 4 and on 5 to 9.

    Theirs are one pair for all runs. A pair decides more than the method does, so here each seed
    has its own.
    """
    models, generator = [MLP(64, 256), MLP(64, 256)], torch.Generator().manual_seed(seed)
    for model, half in zip(models, (labels < 5, labels > 4), strict=True):
        set_params(model, 0.01 * torch.randn(len(get_params(model)), generator=generator))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[half]), labels[half]).backward()
            optimizer.step()
    return models
