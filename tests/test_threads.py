"""Any number of threads evaluates to the same bits, and leaves the caller's own as they were."""

import threading
import time

import pytest
import torch
from conftest import make_m2n2
from test_models import LEARN, Keeps, of_model
from torch import Tensor, nn

from m2n2_mnist import M2N2, MLP

within = []  # an entry for each forward pass of `Slow` that there is at the moment


class Slow(MLP):
    """Takes its time; `raised` is what it then raises, in the caller's thread or in another."""

    raised, in_caller = None, True

    def forward(self, images: Tensor) -> Tensor:
        within.append(self)
        caller = threading.current_thread() is threading.main_thread()
        try:
            if self.raised and len(images) > 1:  # not at the check of the model
                time.sleep(0.02 if caller == self.in_caller else 0.1)
                if caller == self.in_caller:
                    raise self.raised
            return super().forward(images)
        finally:
            within.pop()


def on_threads(threads: int, model: nn.Module, **settings: object) -> M2N2:
    """Made where PyTorch has so many threads; each evaluates some of 10 parts of the images."""
    torch.set_num_threads(threads)
    return of_model(model, eval_batch_size=3, **settings)


@pytest.mark.parametrize("name", [*LEARN, "large"])
def test_the_same_bits_for_any_number_of_threads(name):
    """And where sums are long enough for PyTorch to split them over its threads."""
    ends = []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        if name == "large":
            torch.set_num_threads(threads)
            m2n2 = make_m2n2(70_000, hidden=16, subset_size=60_000, subset_every=5)
        else:
            m2n2 = on_threads(threads, LEARN[name](), subset_size=20, subset_every=5)
        m2n2.evolve(8, test_every=4)
        ends.append(m2n2)
    for other in ends[1:]:
        assert torch.equal(other.archive, ends[0].archive)
        assert torch.equal(other.scores, ends[0].scores)
        assert other.history == ends[0].history


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_thread_takes_parts(threads):
    """As many as PyTorch has, the caller's among them, with no threads of PyTorch's within."""
    m2n2, seen = on_threads(threads, Keeps(12, 5, 3)), set()
    m2n2.evolve(1)

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.add((threading.get_ident(), torch.get_num_threads()))

    with nn.modules.module.register_module_forward_pre_hook(note):
        m2n2.logits(m2n2.best, m2n2.train_images)
    assert len(seen) == threads and (threading.get_ident(), 1) in seen
    assert {inner for _, inner in seen} == {1}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_callers_number_of_threads_stays(threads):
    m2n2 = on_threads(threads, MLP(12, 5, 3))
    assert torch.get_num_threads() == threads
    m2n2.evolve(3)
    m2n2.logits(m2n2.best, m2n2.train_images)
    m2n2.load_state_dict(m2n2.state_dict())
    assert torch.get_num_threads() == threads

    def interrupt(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        m2n2.evolve(3, 1, interrupt)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("in_caller", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_in_a_thread_ends_the_evolution(error, in_caller):
    """Which can go on, as no thread is left at work on what the next child is made of."""
    plain, m2n2 = (on_threads(2, model(12, 5, 3), schedule=20) for model in (MLP, Slow))
    state = m2n2.state_dict()
    Slow.in_caller, Slow.raised = in_caller, error
    try:
        with pytest.raises(error):
            m2n2.evolve(3)
        assert not within and torch.get_num_threads() == 2
    finally:
        Slow.raised = None
    m2n2.load_state_dict(state)
    for each in (plain, m2n2):
        each.evolve(20)
    assert torch.equal(plain.archive, m2n2.archive)


def test_autocast_reaches_all_threads_or_none():
    """It is set for a thread, and those that help are not the caller's."""
    scores = []
    for threads in (1, 3):
        m2n2 = on_threads(threads, Keeps(12, 5, 3))
        with torch.autocast("cpu", torch.bfloat16):
            m2n2.evolve(5)
        scores.append(m2n2.scores)
    assert torch.equal(*scores)
