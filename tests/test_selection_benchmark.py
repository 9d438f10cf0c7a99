"""The selection benchmark judges as Eq. 19 says, and a killed run of it goes on where it was."""

import importlib
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import horizonplan as hp
from horizonplan.models import ResidualLinear

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a benchmark's module, and forget it afterwards: tests have modules of such names too."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.startswith("selection"):
            del sys.modules[name]


def cell(way, losses, memory, **more):
    return {"way": way, "losses": losses, "peak_bytes": memory, "diverged": False, "steps": 32, **more}


LOSSES = {  # of steps in fours; the last quarter of 32 steps is two of them
    "h=3,s=1": [2.0, 1.0, 0.5, 0.4, 0.3, 0.3, 0.30, 0.20],
    "h=1,s=1": [2.0, 1.5, 1.5, 1.4, 1.3, 1.2, 1.10, 0.90],
    "h=2,s=1": [2.0, 1.2, 0.8, 0.6, 0.5, 0.4, 0.40, 0.36],
    "h=2,s=2": [2.0, 1.1, 0.7, 0.5, 0.4, 0.3, 0.28, 0.18],
    "loco 3": [2.0, 1.2, 0.9, 0.7, 0.6, 0.5, 0.45, 0.35],
}
MEMORY = {"h=3,s=1": 1000, "h=1,s=1": 300, "h=2,s=1": 700, "h=2,s=2": 640, "loco 3": 800}
START = [2.0, 2.1, 1.9, 2.0, 2.0, 2.0, 2.2, 1.8]


def truths(module):
    judge = module("selection_judge")
    cells = [cell(way, losses, MEMORY[way]) for way, losses in LOSSES.items()]
    cells[0]["start"] = START
    cells.append(cell("h=1,s=9", [2.0], 100) | {"diverged": True})
    return judge, judge.truths_of(cells, tail=4, thin=4)


def transcription(kind, number, price):
    """O of every way by the book, `None` where it is infeasible: rates are logarithms of the means' ratios."""
    base = math.log((0.30 + 0.20) / 2 / 2.0)
    values = {}
    for way, losses in LOSSES.items():
        rate = math.log((losses[-2] + losses[-1]) / 2 / 2.0) / base
        cost = MEMORY[way] / 1000 if price == "linear" else math.ceil(MEMORY[way] / 300)
        if kind == "rate":
            values[way] = cost if rate >= 1 - number else None
        else:
            values[way] = -rate + number * cost
    return values | {"h=1,s=9": None}


@pytest.mark.parametrize("price", ["linear", "ladder"])
@pytest.mark.parametrize(("kind", "number"), [("rate", 0.05), ("rate", 0.3), ("lambda", 0.25), ("lambda", 1.0)])
def test_scores_equal_the_slow_transcription(kind, number, price, module):
    judge, found = truths(module)
    objective = hp.AccuracyConstraint(number) if kind == "rate" else hp.Weighted(number)
    cost = judge.costs(found)[price]
    values = transcription(kind, number, price)
    known = [value for value in values.values() if value is not None]
    for way, value in values.items():
        score = judge.score(way, found, objective, cost)
        if value is None:
            assert score == judge.Score(1.5, None, False)
            continue
        assert score.feasible
        assert score.rel == pytest.approx((value - min(known)) / (max(known) - min(known)), abs=1e-12)
        assert score.regret == pytest.approx(value - min(known), abs=1e-12)
    among = {way: value for way, value in values.items() if way.startswith("h=") and value is not None}
    assert values[judge.best(found, objective, cost)] == min(among.values())


def test_no_answer_is_infeasible_and_ties_count_nothing(module):
    judge, found = truths(module)
    cost = judge.costs(found)["linear"]
    assert judge.score(None, found, hp.AccuracyConstraint(0.1), cost).rel == 1.5
    only = {"h=3,s=1": found["h=3,s=1"]}
    assert judge.score("h=3,s=1", only, hp.AccuracyConstraint(0.1), cost) == judge.Score(0.0, 0.0, True)


def test_rank_correlation(module):
    spearman = module("selection_judge").spearman
    assert spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert spearman([1, 1, 2], [3, 3, 9]) == pytest.approx(1.0)
    assert spearman([1, 1, 1], [3, 4, 5]) is None


class Killed(BaseException):
    pass


def test_a_killed_truth_run_goes_on_where_it_was(module, tmp_path, monkeypatch):
    tasks, truth, store = module("selection_tasks"), module("selection_truth"), module("selection_store")
    monkeypatch.setattr(truth, "LOCO", (3,))

    def data(seed):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, x), TensorDataset(x[:8], x[:8])

    task = tasks.Task("tiny", "tiny", lambda: ResidualLinear(4, 4, 4, 3), data, torch.optim.SGD, 0.1, 8, 16)
    path, written = tmp_path / "truth-tiny.jsonl", []

    def fsync(_):  # the third cell is written beside the file, and not yet in its place
        written.append(None)
        if len(written) == 3:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(Killed):
            truth.run(["tiny"], [0], tmp_path, {"tiny": task})
    kept = path.read_text()
    assert len(kept.splitlines()) == 2

    truth.run(["tiny"], [0], tmp_path, {"tiny": task})
    assert path.read_text().startswith(kept)
    resumed = store.Store(path).cells
    truth.run(["tiny"], [0], tmp_path / "whole", {"tiny": task})
    whole = store.Store(tmp_path / "whole" / "truth-tiny.jsonl").cells
    assert list(whole) == ["0 h=3,s=1", "0 h=1,s=1", "0 h=2,s=1", "0 h=2,s=2", "0 loco 3"]
    assert all(found["loss"] == whole[name]["loss"] for name, found in resumed.items())
    assert all(found["losses"] == whole[name]["losses"] for name, found in resumed.items())
    assert list(resumed) == list(whole)
