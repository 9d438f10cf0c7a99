"""``horizonplan plan --server``: measured here, judged by a service in a process of its own."""

import json
import sys

import pytest
from served import served
from typer.testing import CliRunner

import horizonplan as hp
from horizonplan.cli import app
from horizonplan.client import Client
from horizonplan.measured import measurements_of, plan_from_measurements

USER = """
import torch
from torch import nn

def model():
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5)), nn.Linear(6, 3))

def data():
    inputs = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(inputs, inputs[:, :3].argmax(1))
"""
WORDS = ["plan", "horizonplan_served:model", "--data", "horizonplan_served:data", "--batches", "1"]


@pytest.fixture(autouse=True)
def _user_code(tmp_path, monkeypatch):
    (tmp_path / "horizonplan_served.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("horizonplan_served", None)


def run(*words, code=0):
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [*WORDS, *map(str, words)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 8])
def test_the_service_s_plan_of_what_was_measured_here(tmp_path, steps):
    words = ["--horizons", "1,2,3,4,5", "--rollout-steps", steps, "--epsilon", "0.5", "--unit-cost", "3", "--json"]
    here = hp.Plan.from_dict(json.loads(run(*words).stdout))
    with served(tmp_path) as (address, _):
        result = run(*words, "--server", address, "--out", tmp_path / "plan.json")
        kept = result.stderr.partition("keeps this plan as ")[2].split()[0]
        with Client(address) as client:
            stored = client.get_plan(kept)
    there = hp.Plan.load(tmp_path / "plan.json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "plan.json").read_text())
    expected = plan_from_measurements(**measurements_of(here), objective=here.objective, cost=hp.LinearCost(3.0))
    assert [(r.memory_bytes, r.memory_source) for r in there.rows] == [
        (r.memory_bytes, r.memory_source) for r in expected.rows
    ]
    assert [r.cosine for r in there.rows] == pytest.approx([r.cosine for r in expected.rows])
    assert (there.objective, there.cost) == (expected.objective, expected.cost)
    assert there.block_names == here.block_names
    assert "Measured with adamw" in there.explain()
    assert stored.rows == there.rows


def test_a_service_that_is_not_there_is_told_in_one_line():
    result = run("--rollout-steps", "0", "--server", "http://127.0.0.1:9", code=1)
    assert result.stderr.count("\n") == 1
    assert "error: http://127.0.0.1:9: no answer" in result.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["--device", "simulated:1GiB"], "nothing is measured"), (["--candidates", "all"], "leave --candidates out")],
)
def test_what_a_service_is_not_sent(words, reason):
    assert reason in run(*words, "--server", "http://127.0.0.1:9", code=2).stderr
