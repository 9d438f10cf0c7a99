"""``fits`` says what a step needs on a card, without the card and without the model's memory."""

import json
import subprocess
import sys

import families
import pytest
import torch
from test_simulation import Reads
from torch import nn

import horizonplan as hp
from horizonplan.devices import ASSUMED, Calibration
from horizonplan.models import ResidualMLP
from horizonplan.predict import step_bytes
from horizonplan.probes import LiveBytes, profile
from horizonplan.probes.simulation import simulated

EXACT = Calibration("none", None, 0, 0, 0.0, "assumed")


def task(rows=64):
    return ResidualMLP(16, 64, 4, depth=8), (torch.randn(rows, 16), torch.randint(0, 4, (rows,)))


@pytest.mark.parametrize("horizon", [1, 3, 8])
@pytest.mark.parametrize("recompute", [0, 2])
def test_the_prediction_is_the_fold_s_under_the_same_simulation(horizon, recompute):
    model, batch = task()
    found = hp.fits(model, batch, "1GiB", horizon, recompute=recompute)
    plan = hp.plan_horizon(model, [batch], device="simulated:1GiB", objective=hp.MemoryLimit("1GiB"), progress=False)
    row = next(r for r in plan.rows if (r.horizon, r.stride, r.recompute) == (horizon, 1, 0))
    if recompute:
        with simulated(model) as simulation:
            shapes = simulation.batch(batch)
            chain = hp.Chain.from_model(model, shapes)
            costs = profile(chain, shapes, simulation.optimizer(None), repeats=0)
        folded = step_bytes(hp.Schedule.horizon(8, horizon, 1, recompute), costs)
        assert found.predicted_bytes == pytest.approx(folded, rel=0.01)
    else:
        assert found.predicted_bytes == pytest.approx(row.memory_bytes, abs=4)  # the profile made a NaN before
        assert found.margin_bytes == pytest.approx(row.device_bytes - row.memory_bytes, abs=4)
    assert (found.depth, found.horizon, found.recompute, found.how) == (8, horizon, recompute, "fake tensors")


def test_back_propagation_is_plain():
    model, batch = task()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        state = [t for entry in optimizer.state.values() for t in entry.values()]
        with LiveBytes() as tracker:
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *batch, *state))
    assert hp.fits(model, batch, "1GiB").predicted_bytes == held + tracker.peak


def test_without_dropout_and_foreach_it_is_what_the_cpu_measures():
    model, batch = task()
    single = lambda params: torch.optim.AdamW(params, foreach=False)  # noqa: E731
    chain = hp.Chain.from_model(model, batch)
    for sample in hp.probes.memory(chain, [batch], [1, 4, 8], optimizer=single):
        found = hp.fits(model, batch, "1GiB", sample.horizon, optimizer=single)
        assert found.predicted_bytes == sample.value
    assert found.batch_size == 64


def test_the_verdict_turns_at_the_byte():
    model, batch = task()
    needed = hp.fits(model, batch, "1GiB", calibration=EXACT).predicted_bytes
    assert hp.fits(model, batch, needed, calibration=EXACT).ok
    short = hp.fits(model, batch, needed - 1, calibration=EXACT)
    assert not short.ok
    assert "does not fit: 1 B too much" in short.explain()
    margin = ASSUMED.margin_bytes(needed)
    assert [hp.fits(model, batch, needed + margin - d).ok for d in (0, 1)] == [True, False]


def test_smaller_horizons_and_recomputing_need_less():
    model, batch = task(rows=512)
    needed = [hp.fits(model, batch, "1GiB", h).predicted_bytes for h in (1, 2, 4, 8)]
    assert needed == sorted(needed)
    assert needed[0] < needed[-1]
    assert hp.fits(model, batch, "1GiB", recompute=1).predicted_bytes < needed[-1]
    assert hp.fits(model, batch, "1GiB", 4, stride=4).predicted_bytes <= needed[2]


def test_the_parts_are_those_of_the_step():
    model, batch = task()
    found = hp.fits(model, batch, "1GiB")
    assert found.parameter_bytes == sum(p.nbytes for p in model.parameters())
    steps = 4 * len(list(model.parameters()))  # AdamW counts them in a tensor each
    assert found.optimizer_bytes == 2 * found.parameter_bytes + steps
    assert found.batch_bytes == sum(t.nbytes for t in batch)
    momentum = hp.fits(model, batch, "1GiB", optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    assert momentum.optimizer_bytes == found.parameter_bytes
    given = torch.optim.SGD(model.parameters(), lr=0.1)
    assert hp.fits(model, batch, "1GiB", optimizer=given).optimizer_bytes == 0
    assert json.loads(json.dumps(found.to_dict()))["ok"] is True


class Around(nn.Module):
    """No chain: the second layer reads the input again."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.cat([x, self.first(x)], 1))


def test_back_propagation_through_any_module_and_horizons_of_chains_only():
    batch = torch.ones(8, 4), torch.ones(8, 4)
    found = hp.fits(Around(), batch, "1GiB", calibration=EXACT)
    assert (found.ok, found.depth, found.horizon) == (True, None, None)
    assert found.predicted_bytes > 4 * found.parameter_bytes
    with pytest.raises(hp.ChainError):
        hp.fits(Around(), batch, "1GiB", 1)


def test_a_model_that_reads_values_runs_on_the_cpu_if_it_has_any():
    batch = torch.ones(8, 4), torch.ones(8, 4)
    model = Reads()
    at_once = lambda params: torch.optim.AdamW(params, foreach=True)  # noqa: E731
    chain = hp.Chain.from_model(model, batch)
    for horizon in (None, 1):
        found = hp.fits(model, batch, "1GiB", horizon)
        assert found.how == "a run on the CPU"
        measured = hp.probes.memory(chain, [batch], [horizon or 3], optimizer=at_once)
        assert found.predicted_bytes <= measured[0].value  # plain back-propagation may keep a state less
        assert horizon is None or found.predicted_bytes == measured[0].value
    with pytest.raises(hp.SimulationError, match="needs values"):
        hp.fits(Reads().to("meta"), batch, "1GiB")


def test_a_model_in_eval_mode_is_judged_as_it_will_be_trained():
    case = families.bert()
    trained = hp.fits(case.model.train(), case.batch, "1GiB").predicted_bytes
    assert hp.fits(case.model.eval(), case.batch, "1GiB").predicted_bytes == trained
    assert not case.model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device_memory": "24 apples"}, "device_memory='24 apples'"),
        ({"horizon": 9}, "horizon=9.*between 1 and 8"),
        ({"horizon": 0}, "horizon=0"),
        ({"stride": 2, "horizon": 1}, "stride=2"),
        ({"stride": 2}, "stride=2: back-propagation has no windows"),
        ({"batch": (torch.ones(2, 3), torch.zeros(2, dtype=torch.long))}, "rejected a tuple of tensors"),
        ({"optimizer": "adam"}, "optimizer='adam'"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)}, "holds none of this model's"),
    ],
)
def test_bad_arguments_are_named(change, message):
    model, batch = task()
    with pytest.raises(ValueError, match=message):
        hp.fits(**{"model": model, "batch": batch, "device_memory": "1GiB", **change})


@pytest.mark.parametrize("memory", ["0.6GiB", "0.7GiB", "1GiB"])
@pytest.mark.parametrize("rows", [1, 37, 4096])
def test_a_sweep_finds_the_boundary(memory, rows):
    model, batch = task(rows)
    found = hp.sweep(model, batch, memory, 2, limit=5000)
    sizes = {verdict.batch_size: verdict.ok for verdict in found.tried}
    assert sizes[rows] is not None
    assert all(ok == (size <= found.largest) for size, ok in sizes.items())
    if found.smallest_too_large is None:
        assert found.largest == 5000
    else:
        assert found.smallest_too_large == found.largest + 1
    assert found == hp.sweep(model, batch, memory, 2, limit=5000)


def test_nothing_fits_and_batches_without_samples():
    model, batch = task()
    found = hp.sweep(model, batch, "100MiB")
    assert (found.largest, found.smallest_too_large) == (0, 1)
    with pytest.raises(ValueError, match="no batch size to search"):
        hp.sweep(model, (torch.ones(2, 16), torch.zeros(3, dtype=torch.long)), "1GiB")


SEVEN_BILLION = """
import json, resource, sys
import torch, transformers
import horizonplan as hp
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
ids = torch.zeros(1, 512, dtype=torch.long)
found = hp.fits(model, {"input_ids": ids, "labels": ids}, "80GiB", horizon=4)
json.dump({"bytes": found.predicted_bytes, "parameters": sum(p.numel() for p in model.parameters()),
    "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    "depth": found.depth, "ok": found.ok}, sys.stdout)
"""


@pytest.mark.slow
def test_seven_billion_parameters_are_judged_in_four_gib():
    ran = subprocess.run([sys.executable, "-c", SEVEN_BILLION], capture_output=True, text=True, check=True)
    told = json.loads(ran.stdout)
    assert told["parameters"] > 6.7e9
    assert told["bytes"] > 4 * 4 * told["parameters"]  # weights, gradients, two of AdamW, and a temporary of it
    assert (told["depth"], told["ok"]) == (32, False)
    assert told["peak"] < 4 * 2**30
