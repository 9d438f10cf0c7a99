"""Two (and three) processes that share the layers are one process that does all; what happens when one is lost."""

import json
import os
import re

import parallel_jobs as jobs
import pytest
import torch
from safetensors.torch import load_file
from test_team import HERE, RUN, ended, same, start

import horizonplan as hp
from horizonplan.algorithms import BackPropagation


def launched(folder, processes):
    arguments = [str(processes) if a == "2" else a for a in RUN]
    process = start(HERE / "parallel_jobs.py", "together", folder, run=arguments)
    _, errors = ended(process, timeout=120)
    assert process.returncode == 0, errors
    return [torch.load(folder / f"together-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes saw, and the folder."""
    folder = tmp_path_factory.mktemp("two")
    return launched(folder, 2), folder


@pytest.mark.parametrize("name", jobs.CASES)
def test_two_processes_are_one_bit_for_bit(name, two):
    """Weights, running statistics, optimiser state, losses, metrics and prediction errors, on both."""
    alone = jobs.trained(name, 2)
    for seen in two[0]:
        assert same(seen["cases"][name], alone)


@pytest.mark.parametrize(("name", "optimizer"), [("exact", jobs.momentum), ("exact, AdamW", None)])
def test_two_processes_with_true_co_states_are_serial_back_propagation(name, optimizer, two):
    model = jobs.dense()
    made = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2))
    options = {"epochs": 2, "optimizer": made, "progress": False}
    hp.train(model, jobs.points(), algorithm=BackPropagation(), loss=torch.nn.functional.cross_entropy, **options)
    for seen in two[0]:
        assert same(dict(seen["cases"][name]["model"]), dict(model.state_dict()))


def test_a_run_of_two_processes_resumes_as_the_same_run(two):
    alone = jobs.trained("defaults", 2, epochs=3)
    for seen in two[0]:
        assert seen["resumed"]["first"] == 12  # asked to stop after step 11: the others hear of it a step later
        assert same(seen["resumed"]["second"], alone)
    saved = load_file(two[1] / "run" / "model.safetensors")
    assert same(saved, dict(two[0][0]["resumed"]["second"]["model"]))
    assert saved.keys() == alone["model"].keys()


def test_a_step_is_one_exchange(two):
    """The first process sends a state; the second a loss and a co-state, or a loss and the head."""
    first, second = (seen["messages"] for seen in two[0])
    assert set(first["ParallelInTime"]) == set(first["ParallelWindows"]) == {1}
    assert set(second["ParallelInTime"]) == set(second["ParallelWindows"]) == {2}


def test_runs_that_cannot_be_are_refused_on_both(two):
    for seen in two[0]:
        said = seen["refusals"]
        assert "parts=3: there are 2 processes" in said["parts"]
        assert "Horizon shares the samples" in said["mixed"]
        assert "had different batches" in said["batches"]


@pytest.mark.slow
def test_three_processes_are_one_bit_for_bit(tmp_path):
    for name, seen in launched(tmp_path, 3)[0]["cases"].items():
        assert same(seen, jobs.trained(name, 3)), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dies", "process 1 ended: see its own error|another process ended"),
        ("hangs", "did not answer within time_limit=5 seconds"),
        ("diverges", "FloatingPointError"),
    ],
)
def test_a_process_that_is_lost_ends_the_job_and_the_run_goes_on(kind, message, tmp_path, monkeypatch):
    process = start(HERE / "parallel_jobs.py", "troubled", tmp_path, kind)
    _, errors = ended(process, timeout=120)
    assert process.returncode != 0
    assert re.search(message, errors), errors
    events = [json.loads(line)["event"] for line in (tmp_path / kind / "log.jsonl").read_text().splitlines()]
    assert events.count("save") == 3
    monkeypatch.setenv("TROUBLE", "none")
    process = start(HERE / "parallel_jobs.py", "troubled", tmp_path, kind)
    _, errors = ended(process, timeout=120)
    assert process.returncode == 0, errors
    jobs.troubled(tmp_path / "alone", kind)
    assert same(*(torch.load(folder / f"{kind}.pt") for folder in (tmp_path, tmp_path / "alone")))
    assert os.environ["TROUBLE"] == "none"
