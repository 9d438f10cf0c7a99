"""What a GPU probe makes of NVML's readings, with readings made up: no card is needed."""

import math
import sys

import pytest
import torch
from torch import nn

import horizonplan as hp
from horizonplan.probes.isolated import CannotTravel, ChildFailed, ChildKilled, ChildTimeout
from horizonplan.probes.memory import FAILED, OUT_OF_MEMORY
from horizonplan.probes.nvml import Reading
from horizonplan.probes.sample import Sample
from horizonplan.settle import _room

module = sys.modules["horizonplan.probes.memory"]  # its name is a function's in horizonplan.probes


def sample(**detail):
    return Sample("memory", "bytes", 1, 1, 100, detail=detail)


def reading(used):
    return Reading(None, used, 10_000, None, None, "")


def test_a_child_that_hides_its_bytes_has_what_the_device_used_more():
    told = module._since(reading(300), sample(used_bytes=1000, nvml="hidden process")).detail
    assert (told["nvml_bytes"], told["nvml"], told["used_more_bytes"]) == (700, "device used minus baseline", 700)
    own = module._since(reading(300), sample(used_bytes=1000, nvml="process", nvml_bytes=650)).detail
    assert (own["nvml_bytes"], own["nvml"], own["used_more_bytes"]) == (650, "process", 700)
    for before, used in ((reading(300), None), (reading(None), 1000), (reading(2000), 1000)):
        assert "used_more_bytes" not in module._since(before, sample(used_bytes=used, nvml="hidden process")).detail


def chain():
    batch = torch.zeros(2, 4), torch.zeros(2, 4)
    return hp.Chain.from_model(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), batch), batch


@pytest.mark.parametrize(
    ("error", "source"),
    [
        (ChildFailed("OutOfMemoryError", "full", out_of_memory=True), OUT_OF_MEMORY),
        (ChildKilled(9), OUT_OF_MEMORY),
        (ChildKilled(11), FAILED),
        (ChildTimeout("too long"), FAILED),
    ],
)
def test_how_a_child_ended_is_told_apart_and_nothing_larger_is_tried(error, source, monkeypatch):
    tried = []

    def ends(function, *args, timeout_seconds):
        tried.append(args[4])
        raise error

    monkeypatch.setattr(module, "isolated", ends)
    made, batch = chain()
    found = hp.probes.memory(made, [batch], [1, 2, 3], in_children=True)
    assert [(s.horizon, s.source) for s in found] == [(1, source)]
    assert math.isnan(found[0].value)
    assert str(error) == found[0].detail["message"]
    assert tried == [(1, 1)]


@pytest.mark.parametrize("error", [CannotTravel("a lambda"), ChildFailed("RuntimeError", "device busy or unavailable")])
def test_what_cannot_go_to_a_child_is_measured_here_and_tried_once(error, monkeypatch):
    tried = []

    def refuses(function, *args, timeout_seconds):
        tried.append(args[4])
        raise error

    monkeypatch.setattr(module, "isolated", refuses)
    made, batch = chain()
    found = hp.probes.memory(made, [batch], [1, 2], in_children=True)
    here = hp.probes.memory(made, [batch], [1, 2], in_children=False)
    assert [s.value for s in found] == [s.value for s in here]
    assert all(str(error) in s.detail["in_process"] for s in found)
    assert len(tried) == 1


def test_an_error_of_the_child_s_own_is_raised(monkeypatch):
    def fails(function, *args, timeout_seconds):
        raise ChildFailed("ValueError", "the model rejects the batch")

    monkeypatch.setattr(module, "isolated", fails)
    made, batch = chain()
    with pytest.raises(ChildFailed, match="rejects the batch"):
        hp.probes.memory(made, [batch], [1], in_children=True)


class Told:
    """As much of a Probing as the room of a CUDA device is made from."""

    def __init__(self, samples):
        self.samples, self.full, self.too_large_bytes = samples, [], None
        self.frugal = type("Frugal", (), {"limit_bytes": 1000})()
        self.chain = type("Chain", (), {"device": torch.device("cuda", 0)})()


def test_what_a_card_needs_besides_tensors_is_the_largest_gap_that_was_seen(monkeypatch):
    import horizonplan.settle as settle

    monkeypatch.setattr(settle, "read", lambda device: Reading(80, 80, 10_000, None, None, ""))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    judge = hp.choice.Judge(hp.MemoryLimit(10), None, (1,), False, hp.candidates.Room())
    room = _room(Told([sample(nvml_bytes=160), sample(nvml_bytes=190)]), judge)
    assert room.limit_bytes == 1000 + 50  # what tensors may have, and the context that is there already
    assert room.holds(hp.Row(horizon=2, memory_bytes=500)).device_bytes == 590
    assumed = _room(Told([sample()]), judge)
    assert assumed.holds(hp.Row(horizon=2, memory_bytes=500)).device_bytes > 500 + 2**29
