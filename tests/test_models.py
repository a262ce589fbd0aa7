"""Any model and any data that fits it is taken, copies go on to the same bits, and what does not fit is refused."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import make_m2n2
from torch import Tensor, nn

from m2n2_mnist import M2N2, MLP, get_params, set_params


class Answers(nn.Module):
    """Answers in a way of its own, `answer(images, weight)`, with a weight for each of 12 inputs and 3 classes."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.randn(3, 12))

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images.flatten(1), self.weight)


class Tied(nn.Module):
    """Three layers, of which two share one weight: 3 · 12 + 12 · 12 + 3 · 12 parameters and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.two.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.two(self.one(images.flatten(1)).relu()).relu())


class Recurrent(nn.Module):
    """The 3 rows of an image as a sequence for an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.lstm(images)[0][:, -1])


def convolutional() -> nn.Module:
    """With batch norm, whose buffers are no parameters, and dropout, which evaluation leaves out."""
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *layers, nn.Linear(8, 3), nn.Dropout())


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


LEARN = {  # models whose logits depend on all that they are given
    "MLP": lambda: MLP(12, 5, 3),
    "frozen": lambda: flat(nn.Linear(12, 3)).requires_grad_(False),
    "convolutional": convolutional,
    "channels last": lambda: convolutional().to(memory_format=torch.channels_last),
    "tied": Tied,
    "LSTM": Recurrent,
    "spectral norm": lambda: flat(nn.utils.parametrizations.spectral_norm(nn.Linear(12, 3))),
    "compiled": lambda: torch.compile(flat(nn.Linear(12, 3)), backend="eager"),
    "float64": lambda: MLP(12, 5, 3).double(),
}
ANSWER_ALIKE = {
    "a view of the input": lambda: Answers(lambda x, w: x[:, :3]),
    "expanded": lambda: Answers(lambda x, w: w[:, :1].T.expand(len(x), 3)),
    "NaN at zero": lambda: Answers(lambda x, w: x @ w.T / w.norm()),
}
SETTINGS = {"archive_size": 5, "init_std": 0.3, "mutation_std": 0.3, "prior_std": 0.0}


def learnable() -> tuple[Tensor, Tensor]:
    """30 images of 3 rows and 4 columns, and which of the first three values of the last row is the highest."""
    images = torch.randn(30, 3, 4, generator=torch.Generator().manual_seed(0))
    return images, images[:, 2, :3].argmax(dim=1)


def of_model(model: nn.Module, **settings: object) -> M2N2:
    return M2N2(model, *learnable() * 2, **SETTINGS | settings)


@pytest.fixture(autouse=True)
def _same_models() -> None:
    torch.manual_seed(0)


# --- Any model, precision, type ---
@pytest.mark.parametrize("score", ["correct", "probability"])
@pytest.mark.parametrize("name", LEARN | ANSWER_ALIKE)
def test_any_model(name: str, score: str) -> None:
    """All its parameters evolve, frozen ones too, its buffers stay; the model, the images and empty slots as well."""
    model, (images, labels) = (LEARN | ANSWER_ALIKE)[name](), learnable()
    before, params = {key: value.clone() for key, value in model.state_dict().items()}, len(get_params(model))
    m2n2, resumed = of_model(model, score=score), of_model(model, score=score, seed=9)
    assert not m2n2.scores[~m2n2.archive.any(dim=1)].any()
    resumed.load_state_dict(m2n2.state_dict())
    assert torch.equal(m2n2.scores, resumed.scores)  # an empty slot scores 0, whatever the model says
    start = m2n2.archive.clone()
    m2n2.evolve(150)
    assert m2n2.archive.isfinite().all() and (m2n2.archive != start).any(dim=0).all()
    assert torch.equal(m2n2.train_images, images) and m2n2.archive.shape == (5, params)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    best = m2n2.best_model()
    assert type(best) is type(model) and not best.training
    assert all(map(torch.equal, best.buffers(), m2n2.model.buffers()))
    if name in LEARN:  # the others answer all alike, or tie
        right = (best(images).argmax(dim=1) == labels).float().mean().item()
        assert m2n2.history[-1]["test_acc"] == pytest.approx(right) and right > 0.4


@pytest.mark.parametrize("name", LEARN)
def test_a_vector_is_evaluated_as_the_model_that_has_it(name: str) -> None:
    """Not as the model that was given, nor as what was evaluated before."""
    model = LEARN[name]()
    m2n2, other = of_model(model), copy.deepcopy(model).to(torch.float32).eval()
    found = []
    for seed in (1, 2, 1):
        params = torch.randn(m2n2.archive.shape[1], generator=torch.Generator().manual_seed(seed)) / 2
        set_params(other, params)
        found.append(m2n2.logits(params, m2n2.train_images))
        torch.testing.assert_close(found[-1], other(m2n2.train_images).detach().T, atol=1e-5, rtol=1e-4)
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_of_another_precision(dtype: torch.dtype) -> None:
    """They are evaluated in it; archive and scores are float32, near to those of float32 images."""
    m2n2, single = make_m2n2(examples=400, dtype=dtype), make_m2n2(examples=400)
    params = torch.randn(m2n2.archive.shape[1], generator=torch.Generator().manual_seed(0)) / 2
    for one in (m2n2, single):
        one._evaluate(params)
    error = (m2n2._rows[-1] - single._rows[-1]).abs()
    assert m2n2.archive.dtype == m2n2.scores.dtype == torch.float32
    assert 0 < error.max() < (1e-5 if dtype == torch.float64 else 0.03)
    m2n2.evolve(20)
    best = m2n2.best_model()
    assert get_params(best).dtype == best(m2n2.train_images).dtype == dtype


def test_numpys_arrays() -> None:
    """They are taken as tensors are, to the same bits."""
    tensors = of_model(MLP(12, 5, 3))
    arrays = M2N2(MLP(12, 5, 3), *(x.numpy() for x in learnable() * 2), **SETTINGS)
    for m2n2 in (arrays, tensors):
        m2n2.evolve(20)
    assert torch.equal(arrays.archive, tensors.archive) and arrays.history == tensors.history


def test_deterministic_algorithms_and_autocast() -> None:
    """The first change no bit; the second evaluates in another precision, and learns."""
    plain, deterministic, autocast = (of_model(MLP(12, 5, 3)) for _ in range(3))
    plain.evolve(60)
    torch.use_deterministic_algorithms(True)
    deterministic.evolve(60)
    torch.use_deterministic_algorithms(False)
    with torch.autocast("cpu", torch.bfloat16):
        autocast.evolve(60)
    assert torch.equal(deterministic.scores, plain.scores)
    assert not torch.equal(autocast.scores, plain.scores) and autocast.history[-1]["train_acc"] > 0.4


# --- Copies and the best model ---
def evolved(m2n2: M2N2) -> M2N2:
    m2n2.evolve(20)
    return m2n2


@pytest.mark.parametrize(
    ("name", "iterations"), [("MLP", 0), ("MLP", 7), ("LSTM", 7), ("tied", 7), ("convolutional", 7)]
)
def test_a_copy_goes_on_to_the_originals_bits(name: str, iterations: int) -> None:
    """By deepcopy, pickle or a pool of processes, wherever the original stands, which is not touched."""
    m2n2 = of_model(LEARN[name](), schedule=50)
    if iterations:
        m2n2.evolve(iterations)
    before = m2n2.state_dict()
    copies = [evolved(copy.deepcopy(m2n2)), evolved(pickle.loads(pickle.dumps(m2n2)))]
    with multiprocessing.Pool(1) as pool:
        copies += pool.map(evolved, [m2n2, m2n2], chunksize=1)
    assert torch.equal(m2n2.archive, before["archive"]) and m2n2.iteration == iterations
    evolved(m2n2)
    assert not torch.equal(m2n2.archive, before["archive"])
    for one in copies:
        assert torch.equal(one.archive, m2n2.archive) and torch.equal(one.scores, m2n2.scores)
        assert one.history == m2n2.history and one.iteration == m2n2.iteration == iterations + 20
        assert torch.equal(get_params(one.best_model()), m2n2.best_params())


@pytest.mark.parametrize("name", ["MLP", "LSTM", "tied", "convolutional", "spectral norm"])
def test_the_best_model_can_be_fine_tuned(name: str) -> None:
    """By gradient, without a trace in the M2N2 it came from; and then be put into another one."""
    (images, labels), m2n2 = learnable(), of_model(LEARN[name]())
    m2n2.evolve(20)
    before, best = m2n2.archive.clone(), m2n2.best_model().train()
    nn.functional.cross_entropy(best(images), labels).backward()
    torch.optim.SGD(best.parameters(), lr=0.1).step()
    assert all(parameter.grad is not None for parameter in best.parameters())
    assert torch.equal(m2n2.archive, before) and not torch.equal(get_params(best), m2n2.best_params())
    assert torch.equal(get_params(m2n2.best_model()), m2n2.best_params())
    merged = of_model(LEARN[name](), initial_models=[best, m2n2.best_model()])
    assert torch.equal(merged.archive[0], get_params(best)) or torch.equal(merged.archive[1], get_params(best))


# --- Refusals ---
def tensors() -> dict[str, Tensor]:
    images, labels = torch.randn(40, 6), torch.arange(40) % 10
    given = {"train_images": images, "train_labels": labels, "test_images": images[:20], "test_labels": labels[:20]}
    return {name: tensor.clone() for name, tensor in given.items()}


WRONG = {  # what becomes of the images or labels, and what the message says of it
    "fewer labels": ("labels", lambda x: x[:-1], r"int64 \(\d+,\)"),
    "one-hot labels": ("labels", nn.functional.one_hot, r"int64 \(\d+, 10\)"),
    "int32 labels": ("labels", Tensor.int, "int32"),
    "negative labels": ("labels", lambda x: x - 1, "int64"),
    "integer images": ("images", lambda x: x.byte().numpy(), "uint8"),
    "an empty set": ("images", lambda x: x[:0], r"\(0, 6\)"),
    "a number": ("images", lambda x: x[0, 0], r"\(\)"),
    "one NaN": ("images", lambda x: x.where(x != x[3, 3], torch.nan), "float32"),
    "one infinite": ("images", lambda x: x.where(x != x[3, 3], -torch.inf), "float32"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("how", WRONG)
def test_wrong_examples(how: str, split: str) -> None:
    kind, change, says = WRONG[how]
    given, name = tensors(), f"{split}_{kind}"
    given[name] = change(given[name])
    with pytest.raises(
        ValueError, match=rf"^{split}_images and {split}_labels are .*{says}.*, accepted are .* from 0 up"
    ):
        M2N2(MLP(6, 5), **given)


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_beyond_the_models_classes(split: str) -> None:
    """One of them is enough: an index beyond the logits would be read otherwise."""
    given = tensors()
    given[f"{split}_labels"][3] = 10
    with pytest.raises(ValueError, match=r"^model answers \(1, 10\) to an image, accepted is \(1, 11\)"):
        M2N2(MLP(6, 5), **given)
    M2N2(MLP(6, 5, 11), **given).evolve(2)


ODD = {
    "one answer for all": (nn.Flatten(0), r"\(10,\)"),
    "one more dimension": (nn.Unflatten(1, (10, 1)), r"\(1, 10, 1\)"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_logits(name: str) -> None:
    layer, shape = ODD[name]
    with pytest.raises(ValueError, match=rf"^model answers {shape} to an image"):
        M2N2(flat(nn.Linear(6, 10), layer), **tensors())


def test_initial_models_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"^initial_models is \[95, 44\] parameters, accepted is 95 each"):
        M2N2(MLP(6, 5), **tensors(), initial_models=[MLP(6, 5), MLP(6, 2)])
