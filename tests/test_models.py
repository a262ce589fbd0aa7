"""Any model and data that fit are taken, others refused; copies go on to the same bits."""

import copy
import multiprocessing
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import all_models, all_scores, make_m2n2
from torch import Tensor, nn

from m2n2_mnist import M2N2, MLP, MNISTDataModule, get_params, set_params


class Answers(nn.Module):
    """Answers in a way of its own, `answer(images, weight)`; the weight is `(3, 12)`."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.randn(3, 12))

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images.flatten(1), self.weight)


class Keeps(MLP):
    """Leaves what it computes on itself and comes back to it later, as not a few models do."""

    def forward(self, images: Tensor) -> Tensor:
        self.units = self.hidden(images.flatten(1)).relu()
        time.sleep(0.001)  # another thread's turn
        return self.output(self.units)


class Tied(nn.Module):
    """Three layers, of which two share one weight, or have their own."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        if tied:
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
    """With BatchNorm, whose buffers are no parameters, and dropout, which evaluation leaves out."""
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *layers, nn.Linear(8, 3), nn.Dropout())


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


LEARN = {  # models whose logits depend on all that they are given
    "MLP": lambda: MLP(12, 5, 3),
    "keeps its units": lambda: Keeps(12, 5, 3),
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
    """30 images of 3 x 4, and which of the first three values of the last row is the highest."""
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
def test_any_model(name, score):
    """All its parameters evolve, frozen ones too; buffers, model, images and empty slots stay."""
    model, (images, labels) = (LEARN | ANSWER_ALIKE)[name](), learnable()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    params = len(get_params(model))
    m2n2, resumed = of_model(model, score=score), of_model(model, score=score, seed=9)
    resumed.load_state_dict(m2n2.state_dict())
    assert torch.equal(m2n2.scores, resumed.scores)
    assert not m2n2.scores[~m2n2.archive.any(dim=1)].any()  # whatever the model says
    start = m2n2.archive.clone()
    m2n2.evolve(150, test_every=1)
    assert m2n2.history[0]["diversity"] >= 0  # nor is it right anywhere
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
def test_a_vector_is_evaluated_as_the_model_that_has_it(name):
    """Not as the model that was given, nor as what was evaluated before, or beside it."""
    torch.set_num_threads(3)
    model = LEARN[name]()
    m2n2, other = of_model(model, eval_batch_size=4), copy.deepcopy(model).to(torch.float32).eval()
    found = []
    for seed in (1, 2, 1):
        generator = torch.Generator().manual_seed(seed)
        params = torch.randn(m2n2.archive.shape[1], generator=generator) / 2
        set_params(other, params)
        found.append(m2n2.logits(params, m2n2.train_images))
        expected = other(m2n2.train_images).detach().T
        torch.testing.assert_close(found[-1], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_of_another_precision(dtype):
    """They are evaluated in it; archive and scores are float32, near to those of float32 images."""
    m2n2, single = make_m2n2(examples=400, dtype=dtype), make_m2n2(examples=400)
    params = torch.randn(m2n2.archive.shape[1], generator=torch.Generator().manual_seed(0)) / 2
    for one in (m2n2, single):
        one._evaluate(params)
    assert m2n2.archive.dtype == m2n2.scores.dtype == m2n2.best.dtype == torch.float32
    assert torch.equal(all_models(m2n2)[-1], params)
    error = (all_scores(m2n2)[-1] - all_scores(single)[-1]).abs()
    assert 0 < error.max() < (1e-5 if dtype == torch.float64 else 0.03)
    if dtype == torch.bfloat16:  # their softmax is not rounded to its 8 bits
        assert not torch.equal(all_scores(m2n2)[-1], all_scores(m2n2)[-1].to(dtype).float())
    m2n2.evolve(20)
    best = m2n2.best_model()
    assert get_params(best).dtype == best(m2n2.train_images).dtype == dtype


def test_deterministic_algorithms_change_no_bit():
    plain, deterministic = (of_model(MLP(12, 5, 3), subset_size=20) for _ in range(2))
    plain.evolve(60)
    torch.use_deterministic_algorithms(True)
    try:
        deterministic.evolve(60)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(deterministic.archive, plain.archive)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_no_bit(dtype, data_dir, request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    ends = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        data = MNISTDataModule(data_dir)
        data.setup()
        settings = {"init_std": 0.3, "mutation_std": 0.1, "subset_size": 100, "subset_every": 9}
        m2n2 = M2N2(MLP(64, 8), *data.examples, **settings)
        m2n2.evolve(40, test_every=20)
        ends.append((m2n2, data.examples))
    (one, examples), (two, other) = ends
    assert all(map(torch.equal, examples, other))
    assert torch.equal(one.archive, two.archive) and torch.equal(one.scores, two.scores)
    assert one.history == two.history and one.history[-1]["train_acc"] > 0.1
    assert get_params(two.best_model()).dtype == torch.float32


def test_a_runs_data_and_models_are_its_own():
    """Tensors or NumPy's arrays: what becomes of them afterwards changes no bit."""
    ends = []
    for kind, change in ((Tensor.clone, False), (Tensor.clone, True), (Tensor.numpy, True)):
        model, first = MLP(12, 5, 3), MLP(12, 5, 3)
        set_params(first, torch.linspace(-1, 1, len(get_params(first))))
        given = [kind(x.clone()) for x in learnable() * 2]
        m2n2 = M2N2(model, *given, **SETTINGS, initial_models=[first, first.state_dict()])
        if change:
            for values in (*given, *(p.data for p in (*model.parameters(), *first.parameters()))):
                values[:] = 0
        m2n2.evolve(30, test_every=10)
        ends.append(m2n2)
    for other in ends[1:]:
        assert torch.equal(ends[0].archive, other.archive) and ends[0].history == other.history


# --- Copies and the best model ---
def evolved(m2n2: M2N2) -> M2N2:
    m2n2.evolve(20)
    return m2n2


@pytest.mark.parametrize(
    ("name", "iterations", "threads"),
    [("MLP", 0, 1), ("MLP", 7, 1), ("LSTM", 7, 1)]
    + [(name, 7, 2) for name in ("tied", "convolutional", "keeps its units")],
)
def test_a_copy_goes_on_to_the_originals_bits(name, iterations, threads):
    """By deepcopy, pickle or a pool of processes, where threads do not live on."""
    torch.set_num_threads(threads)
    settings = {"schedule": 50, "eval_batch_size": 8, "subset_size": 20, "subset_every": 10}
    m2n2 = of_model(LEARN[name](), **settings)
    m2n2.evolve(iterations)
    before = m2n2.state_dict()
    copies = [evolved(copy.deepcopy(m2n2)), evolved(pickle.loads(pickle.dumps(m2n2)))]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        copies += pool.map_async(evolved, [m2n2, m2n2], chunksize=1).get(timeout=100)
    assert torch.equal(m2n2.archive, before["archive"]) and m2n2.iteration == iterations
    evolved(m2n2)
    assert not torch.equal(m2n2.archive, before["archive"])
    for one in copies:
        assert torch.equal(one.archive, m2n2.archive) and torch.equal(one.scores, m2n2.scores)
        assert one.history == m2n2.history and one.iteration == m2n2.iteration == iterations + 20
        assert torch.equal(get_params(one.best_model()), m2n2.best)


@pytest.mark.parametrize("name", ["MLP", "LSTM", "tied", "convolutional", "spectral norm"])
def test_the_best_model_can_be_fine_tuned(name):
    """By gradient, without a trace in the M2N2 it came from; and then be put into another one."""
    (images, labels), m2n2 = learnable(), of_model(LEARN[name]())
    m2n2.evolve(20)
    before, best = m2n2.archive.clone(), m2n2.best_model()
    nn.functional.cross_entropy(best(images), labels).backward()
    torch.optim.SGD(best.parameters(), lr=0.1).step()
    assert all(parameter.grad is not None for parameter in best.parameters())
    tuned = get_params(best)
    assert torch.equal(m2n2.archive, before) and not torch.equal(tuned, m2n2.best)
    m2n2.evolve(20)
    assert torch.equal(get_params(best), tuned)
    merged = of_model(m2n2.best_model(), initial_models=[best, m2n2.best_model()])
    assert tuned.tolist() in merged.archive[:2].tolist()


MLPS = LEARN["MLP"]


def with_buffers(running_mean: float = 0.5) -> nn.Module:
    model = flat(nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[2].running_mean.fill_(running_mean)
    return model


def normalising(mean: float = 0.5) -> nn.Module:
    """With a buffer that no state_dict holds."""
    model = MLPS()
    model.register_buffer("mean", torch.tensor(mean), persistent=False)
    return model


def older(model: nn.Module) -> dict[str, Tensor]:
    """A state_dict from before BatchNorm counted its batches."""
    state = dict(model.state_dict())
    del state["2.num_batches_tracked"]
    return state


TAKEN = {  # how models are made, and what of them is given
    "modules": (MLPS, lambda model: model),
    "state_dicts": (MLPS, nn.Module.state_dict),
    "in another order": (MLPS, lambda model: dict(reversed(model.state_dict().items()))),
    "of another precision": (LEARN["float64"], lambda model: model),
    "of equal buffers": (with_buffers, lambda model: model),
    "of equal buffers that are not saved": (normalising, lambda model: model),
    "without buffers that are not saved": (normalising, nn.Module.state_dict),
    "older": (with_buffers, older),
    "tied": (Tied, nn.Module.state_dict),
}


@pytest.mark.parametrize("how", TAKEN)
def test_initial_models_answer_as_before(how):
    make, given = TAKEN[how]
    models = [make().eval(), make().eval()]
    m2n2 = of_model(make(), initial_models=[given(model) for model in models])
    for params in m2n2.archive[:2]:
        answers = m2n2.logits(params, m2n2.train_images).T
        own = [model.float()(m2n2.train_images) for model in models]
        assert any(torch.allclose(answers, x, rtol=1e-4, atol=1e-5) for x in own)
    assert not torch.equal(*m2n2.archive[:2])


# --- Refusals ---
def tensors() -> dict[str, Tensor]:
    images, labels = torch.randn(40, 6), torch.arange(40) % 10
    given = {"train_images": images, "train_labels": labels}
    return given | {"test_images": images[:20].clone(), "test_labels": labels[:20].clone()}


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
def test_wrong_examples(how, split):
    kind, change, says = WRONG[how]
    given, name = tensors(), f"{split}_{kind}"
    given[name] = change(given[name])
    says = rf"^{split}_images and {split}_labels are .*{says}.*, accepted are .* from 0 up"
    with pytest.raises(ValueError, match=says):
        M2N2(MLP(6, 5), **given)


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_beyond_the_models_classes(split):
    """One of them is enough: an index beyond the logits would be read otherwise."""
    given = tensors()
    given[f"{split}_labels"][3] = 10
    says = r"^model answers \(1, 10\) to an image, accepted is \(1, 11\)"
    with pytest.raises(ValueError, match=says):
        M2N2(MLP(6, 5), **given)
    M2N2(MLP(6, 5, 11), **given).evolve(2)


def answers(answer: Callable[[Tensor], object]) -> nn.Module:
    return Answers(lambda x, w: answer(x @ w.T))


def changes(change: Callable[[Tensor], Tensor]) -> nn.Module:
    return Answers(lambda x, w: change(x) @ w.T)


ODD = {  # what `of_model` is given, and what the message says of it
    "one answer for all": (answers(Tensor.flatten), r"answers \(3,\) to an image"),
    "one more dimension": (answers(lambda y: y[None]), r"answers \(1, 1, 3\) to an image"),
    "two tensors": (answers(lambda y: (y, y)), "answers tuple to an image, accepted is"),
    "a name and a tensor": (answers(lambda y: {"logits": y}), "answers dict to an image"),
    "no parameters": (nn.Flatten(), "has no parameters"),
    "other images": (MLP(11, 5, 3), r"cannot take images \(30, 3, 4\): mat1 and mat2"),
    "more dimensions": (answers(lambda y: y.flatten(2)), "cannot take images"),
    "subtracts": (changes(lambda x: x.sub_(1)), "changes its input"),
    "normalises": (changes(lambda x: x.sub_(0.1).div_(0.3)), "changes its input"),
    "in-place ReLU": (flat(nn.ReLU(inplace=True), nn.Linear(12, 3)), "changes its input"),
    "no value, yet": (changes(lambda x: x.clamp_(-9, 9)), "changes its input"),
    "subtracts from x.data": (changes(lambda x: x.data.sub_(1)), "changes its input"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_model(name):
    model, says = ODD[name]
    with pytest.raises(ValueError, match=f"^model {says}"):
        of_model(model)


def unbiased(inputs: int = 12, outputs: int = 3) -> nn.Module:
    return flat(nn.Linear(inputs, outputs, bias=False))


def changed(model: nn.Module, name: str, value: float) -> nn.Module:
    model.state_dict()[name].view(-1)[0] = value
    return model


MISFIT, NOT_FINITE = r"does not fit model: Error.*[\s\S]*", "has .* not finite"
ODD_FIRST = {  # how `model` and a second model to be merged are made, and what the message says
    "a path": (MLPS, lambda: Path("best.pt"), "does not fit model: .*Path"),
    "another size": (MLPS, lambda: MLP(12, 4, 3), f"{MISFIT}hidden.weight"),
    "other names": (MLPS, Tied, f"{MISFIT}hidden.weight"),
    "other shapes": (unbiased, lambda: unbiased(3, 12), f"{MISFIT}1.weight"),
    "one more": (unbiased, lambda: flat(nn.Linear(12, 3)), f"{MISFIT}1.bias"),
    "NaN": (MLPS, lambda: changed(MLPS(), "output.bias", torch.nan), NOT_FINITE),
    "infinite": (MLPS, lambda: changed(MLPS(), "hidden.bias", -torch.inf), NOT_FINITE),
    "too large": (MLPS, lambda: changed(MLPS().double(), "output.bias", 1e300), NOT_FINITE),
    "BatchNorm": (
        with_buffers,
        lambda: with_buffers(0.6),
        "has another .*2.running_mean than model",
    ),
    "buffers that are not saved": (
        normalising,
        lambda: normalising(0.6),
        "has another mean than model",
    ),
    "spectral norm": (LEARN["spectral norm"],) * 2 + (r"has another .*1.*\._u than model",),
    "untied": (Tied, lambda: Tied(False), "has another one.weight"),
}


@pytest.mark.parametrize("name", ODD_FIRST)
def test_initial_models_that_would_not_be_themselves(name):
    make, second, says = ODD_FIRST[name]
    model = make()
    with pytest.raises(ValueError, match=rf"^initial_models\[1\] {says}"):
        of_model(model, initial_models=[model, second()])
