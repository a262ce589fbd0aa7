"""On CUDA: a graph captured of an iteration computes the same bits, the host waits for nothing.

The first part needs no GPU: PyTorch's fake tensors say they are on one, and compute shapes only.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from conftest import all_models, all_scores, make_m2n2
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import m2n2_mnist as script
from m2n2_mnist import M2N2, MLP, ForwardPass, captured_step

SWITCHES = ["use_crossover", "use_split_point", "use_attraction"]
every_setting = pytest.mark.parametrize(
    "switches", [{}, *({switch: False} for switch in SWITCHES)], ids=str
)
every_score = pytest.mark.parametrize("score", ["correct", "probability"])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


# --- Without a GPU ---
class NoHost(TorchDispatchMode):
    """Fails where a tensor of the host takes part, or a kernel waits though its fake does not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # inference mode hands over whole what is composed of other operations
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        assert all(x.is_cuda for x in tensors), f"{func} with a tensor of the host"
        indices = tree_leaves(args[1]) if "index_put" in func._opname else []
        masks = [x for x in indices if x is not None and x.dtype == torch.bool]
        assert not masks, f"{func} with a mask"
        assert func._opname != "multinomial", f"{func} waits"
        return result


@contextmanager
def fake_cuda(m2n2: M2N2) -> Iterator[None]:
    """Put all its tensors on a GPU that need not exist: to ask for their values raises."""
    with FakeTensorMode():
        for name, value in vars(m2n2).items():
            if isinstance(value, Tensor):
                like = {"dtype": value.dtype, "device": "cuda"}
                setattr(m2n2, name, torch.empty_strided(value.shape, value.stride(), **like))
        with torch.device("cuda"):
            m2n2.model = MLP(6, 5)
            m2n2.logits = ForwardPass(m2n2.model, m2n2.logits.part_size)
            m2n2.logits._copies = [m2n2.model]  # deepcopy gives fake tensors another mode
        m2n2._generator = None  # one on CUDA needs a GPU
        with NoHost():
            yield


@every_score
@every_setting
def test_an_iteration_never_waits_for_the_host(score, switches):
    m2n2 = make_m2n2(score=score, eval_batch_size=16, subset_size=35, **switches)
    with fake_cuda(m2n2):
        m2n2._score_members()
        m2n2._step()


FAULTS = {
    "item": lambda x: x.sum().item(),
    "cpu": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.__setitem__(x > 0, torch.zeros_like(x)[0, 0]),
    "upload": lambda x: x + torch.ones(1).to(x.device),
    "multinomial": lambda x: x.multinomial(1),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_check_itself_fails_where_it_should(fault, mode):
    m2n2 = make_m2n2()
    with fake_cuda(m2n2), mode(), pytest.raises((AssertionError, RuntimeError)):
        fault(m2n2.scores)


# --- With a GPU ---
def make_cuda(model: nn.Module | None = None, device: str = "cuda", **settings: object) -> M2N2:
    """`make_m2n2`'s on the GPU."""
    twin = make_m2n2(1_437)  # no multiple of 4: rows of different alignment
    examples = (twin.train_images, twin.train_labels, twin.test_images, twin.test_labels)
    settings = {"init_std": 0.5, "mutation_std": 0.1, "seed": 1} | settings
    settings = {"archive_size": 4, "subset_size": 1_001, "subset_every": 30} | settings
    return M2N2(model or twin.model, *(x.to(device) for x in examples), **settings)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each attempt at a graph from now on, whether it is one."""
    found = []

    def watched(m2n2: M2N2) -> Callable:
        replay = captured_step(m2n2)
        found.append(replay != m2n2._step)
        return replay

    monkeypatch.setattr(script, "captured_step", watched)
    return found


def assert_equal(one: M2N2, two: M2N2) -> None:
    assert torch.equal(one.archive, two.archive) and torch.equal(one.scores, two.scores)
    assert torch.equal(one.subset, two.subset) and torch.equal(one.best, two.best)
    assert torch.equal(one._generator.get_state(), two._generator.get_state())


@needs_cuda
@every_score
@every_setting
def test_replays_compute_the_same_bits(score, switches, captures, monkeypatch):
    """On the last GPU, which need not be the current one. CUDA captures nothing that waits."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    graph, steps = (make_cuda(device=last, score=score, **switches) for _ in range(2))
    start = graph.archive.clone()
    graph.evolve(300, test_every=70)
    monkeypatch.setattr(script, "captured_step", lambda m2n2: m2n2._step)
    steps.evolve(300, test_every=70)
    assert captures == [True] and torch.cuda.current_device() == 0
    assert_equal(graph, steps)
    assert graph.history == steps.history
    assert not torch.equal(graph.archive, start)


@needs_cuda
def test_an_evolution_is_captured_once_and_without_a_word(captures, capfd):
    m2n2 = make_cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m2n2.evolve(3)
        assert not captures
        m2n2.evolve(20)
    out, err = capfd.readouterr()
    assert captures == [True]
    assert not out and "Warning" not in err  # C++ writes its own past Python's filters


@needs_cuda
@pytest.mark.parametrize("children", [2, 3, 40])  # before, at and long after the capture
def test_a_checkpoint_or_a_copy_between_replays_goes_on_to_the_same_bits(children):
    whole, halves, resumed = (make_cuda(schedule=100) for _ in range(3))
    whole.evolve(100, test_every=25)
    halves.evolve(children)
    resumed.evolve(7)  # a graph of its own, which goes on with the state it is given
    state, copied = halves.state_dict(), deepcopy(halves)
    halves.evolve(5)  # changes nothing in what was handed out
    resumed.load_state_dict(state)
    for m2n2 in (resumed, copied):
        m2n2.evolve(100 - children, test_every=25)
        assert_equal(whole, m2n2)


@needs_cuda
def test_memory_does_not_grow_with_replays_and_goes_with_the_evolution():
    m2n2, held = make_cuda(), []
    for _ in range(4):
        m2n2.evolve(10)
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[3]  # with the first one, cuBLAS gets a workspace that it keeps
    replay = captured_step(m2n2)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1_000):
        replay()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@needs_cuda
@pytest.mark.parametrize("archive_size", [2, 4, 9, 20])
def test_of_equals_the_first_member_goes(archive_size):
    m2n2 = make_cuda(archive_size=archive_size)
    all_models(m2n2)[:] = torch.arange(archive_size + 1.0, device="cuda")[:, None]
    all_scores(m2n2)[:] = torch.rand(1_001, device="cuda")
    m2n2._update_archive()
    assert m2n2.archive[:, 0].tolist() == [archive_size, *range(1, archive_size)]


HABITS = {
    "waits for a value": lambda images: images * (images.sum() * 0 + 1).item(),
    "has a shape of values": lambda images: images[images[:, 0] > -torch.inf],
    "looks at the host's copy": lambda images: images.cpu().to(images.device),
}


class Habitual(nn.Linear):
    """A linear model with a habit, which changes no bit."""

    habit = staticmethod(lambda images: images)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.habit(images))


@needs_cuda
@pytest.mark.parametrize("habit", HABITS.values(), ids=HABITS)
def test_a_model_that_cannot_be_captured(habit, captures, capfd):
    """It runs step by step to the same archive, says so in a line, and spoils no other capture."""
    plain, model = make_cuda(Habitual(6, 10)), Habitual(6, 10)
    model.habit = habit
    m2n2, stream = make_cuda(model), torch.cuda.current_stream()
    after = make_cuda(Habitual(6, 10))
    for each in (plain, m2n2, after):
        each.evolve(100, test_every=30)
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("No CUDA graph")
    assert torch.cuda.current_stream() == stream
    assert captures == [True, False, True]
    assert_equal(plain, m2n2)
    assert_equal(plain, after)


@needs_cuda
@pytest.mark.slow
def test_the_default_run_reaches_the_cpus_accuracy(real_mnist, main):
    code, out, err = main(f"--data-dir={real_mnist}", "--accelerator=cuda", "--runs=3")
    assert code == 0 and "No CUDA graph" not in out, err
    (mean,) = re.findall(r"Mean Test Accuracy of 3 runs: ([\d.]+)", out)
    assert float(mean) >= 98.0
