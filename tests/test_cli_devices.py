"""``horizonplan plan`` and ``train`` on cards that are described: emulated on the CPU, or simulated without values."""

import gc
import json
import sys

import pytest
from typer.testing import CliRunner

from horizonplan import Calibration, Plan
from horizonplan.cli import app

USER = """
import torch
from torch import nn

def model(width=16, depth=6):
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.Linear(width, 3))

def huge():
    return model(width=50_000, depth=11)

def data():
    inputs = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))
    return [(inputs[:512], inputs[:512, :3].argmax(1)), (inputs[512:], inputs[512:, :3].argmax(1))]

def broad():
    return [(torch.zeros(2, 50_000), torch.zeros(2, dtype=torch.long))]
"""
NAME = "horizonplan_described"
QUICK = ["--rollout-steps", "2", "--batches", "1", "--optimizer", "sgd"]
SIMULATED = ["--device", "simulated:1GiB"]


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """The probes collect garbage often; what is alive now need not be looked at each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _user_code(tmp_path, monkeypatch):
    """A folder of a user's, who stands in it, with the record of a card that takes tensors only."""
    (tmp_path / f"{NAME}.py").write_text(USER)
    Calibration("a bare card", None, 0, 0, 0.0, "measured").save(tmp_path / "bare.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop(NAME, None)


def run(command, *words, model="model", data="data", code=0):
    """What a command did; its exit code is checked."""
    words = [command, f"{NAME}:{model}", "--data", f"{NAME}:{data}", *map(str, words)]
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, words)
    assert result.exit_code == code, f"{words}: {result.output}\n{result.exception!r}"
    return result


def planned(*words, **options):
    """The plan that is all of standard output."""
    return Plan.from_dict(json.loads(run("plan", *QUICK, "--json", *words, **options).stdout))


def fails_in_one_line(*words, **options):
    result = run(*words, code=1, **options)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_a_plan_for_an_emulated_card_trains_there(tmp_path):
    plan = planned("--device", "emulated:40MiB", "--memory-limit", "40MiB", "--out", tmp_path / "plan.json")
    assert plan.row.fits is True
    assert plan.row.memory_source == "measured"
    words = ["--device", "emulated:40MiB", "--plan", tmp_path / "plan.json", "--optimizer", "sgd", "--json"]
    result = json.loads(run("train", *words).stdout)
    assert plan.horizon == plan.depth  # trained by back-propagation itself, which holds a little less than the engine
    assert 0.8 * plan.row.memory_bytes < result["peak_bytes"] <= plan.row.memory_bytes


def test_an_emulated_card_takes_a_shorter_horizon_where_the_whole_network_is_too_much():
    exact = planned("--device", "emulated:40MiB", "--memory-limit", "40MiB")
    assert exact.horizon == exact.depth
    tight = f"{exact.row.memory_bytes - 1}B"
    plan = planned("--device", f"emulated:{tight}", "--memory-limit", tight)
    assert 1 <= plan.horizon < plan.depth
    assert plan.row.memory_bytes < exact.row.memory_bytes


@pytest.mark.parametrize("command", ["plan", "train"])
def test_an_emulated_card_that_holds_nothing_runs_out_of_memory(command):
    assert "out of memory: " in fails_in_one_line(command, "--device", "emulated:64KiB", *(QUICK * (command == "plan")))


def test_a_memory_limit_plans_a_simulated_card_for_a_model_that_no_memory_here_holds():
    words = ["--device", "simulated:500GiB", "--memory-limit", "500GiB", "--json"]
    result = run("plan", *words, *QUICK, model="huge", data="broad")
    plan = Plan.from_dict(json.loads(result.stdout))
    assert plan.horizon == plan.depth == 11
    assert plan.row.memory_bytes > 200e9
    assert {row.memory_source for row in plan.rows} == {"predicted"}


def test_simulated_bytes_are_those_that_the_emulated_card_measures():
    limit = ["--memory-limit", "1GiB"]
    simulated, emulated = planned(*SIMULATED, *limit), planned("--device", "emulated:1GiB", *limit)
    measured = {(r.horizon, r.stride, r.recompute): r.memory_bytes for r in emulated.rows}
    for row in simulated.rows:
        assert row.memory_bytes == pytest.approx(measured[row.horizon, row.stride, row.recompute], rel=0.05)


def test_cosines_of_a_measured_plan_serve_a_simulated_card(tmp_path):
    planned("--memory-limit", "1GiB", "--out", tmp_path / "small.json")
    plan = planned(*SIMULATED, "--epsilon", "0.9", "--cosine-from", tmp_path / "small.json")
    assert {row.cosine_source for row in plan.rows if row.stride == 1 and row.horizon < 6} == {"fitted"}


def test_without_cosines_a_simulated_card_names_the_remedy():
    message = fails_in_one_line("plan", *SIMULATED, "--epsilon", "0.1")
    assert "cosine_from=None" in message
    assert "give a measured plan" in message
    assert "MemoryLimit" in message


def test_memory_of_the_card_is_that_of_tensors_and_the_margin():
    limit = [*SIMULATED, "--memory-limit", "1GiB"]
    tensors, card, bare = (
        planned(*limit, *more).row.memory_bytes
        for more in ([], ["--memory", "nvml"], ["--memory", "nvml", "--calibration", "bare.json"])
    )
    assert bare == tensors < card - 2**29


def test_the_planner_is_told_what_probing_may_cost(monkeypatch):
    def told(*_, probe_steps, **__):
        raise ValueError(f"told: {probe_steps}")

    monkeypatch.setattr("horizonplan.cli.plan.plan_horizon", told)
    assert "told: 7.5" in fails_in_one_line("plan", "--probe-steps", "7.5")
    assert "told: 60" in fails_in_one_line("plan")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--device", "simulated:lots"], "'lots' is not a size; write 'simulated:24GiB'"),
        (["--device", "emulated:"], "'' is not a size; write 'emulated:24GiB'"),
        (["--memory", "all"], "memory='all': give 'allocated' or 'nvml'"),
        (["--memory", "nvml", "--device", "emulated:1GiB"], "give memory='allocated'"),
        (["--probe-steps", "-1"], "probe_steps=-1.0"),
        ([*SIMULATED, "--cosine-from", "absent.json"], "absent.json: No such file"),
        ([*SIMULATED, "--calibration", "absent.json"], "absent.json: No such file"),
    ],
)
def test_plan_that_cannot_be(words, reason):
    assert reason in fails_in_one_line("plan", *words, *QUICK)


def test_nothing_is_trained_on_a_simulated_card():
    assert "nothing runs on a simulated device; give an emulated or a real one" in fails_in_one_line(
        "train", *SIMULATED
    )


@pytest.mark.parametrize("option", ["--cosine-from", "--calibration"])
@pytest.mark.parametrize("device", [[], ["--device", "cpu"], ["--device", "emulated:1GiB"]], ids=" ".join)
def test_what_a_simulated_card_needs_is_for_no_other(option, device):
    assert "Usage: " in run("plan", option, "bare.json", *device, code=2).stderr


def test_help_explains_the_devices_and_their_options():
    text = run("plan", "--help").stdout
    words = "--memory --probe-steps --cosine-from --calibration emulated:40MiB simulated:24GiB"
    assert not [word for word in words.split() if word not in text]
