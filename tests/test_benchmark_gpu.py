"""The benchmark for a card, dry-run without one: its file has every row, every prediction and what is missing."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.slow


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The dry run's report and what it printed."""
    out = tmp_path_factory.mktemp("benchmark") / "gpu.json"
    ended = run("--device", "cpu", "--tiny", "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    return json.loads(out.read_text()), ended.stdout


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("gpu")


def test_file_says_where_and_with_what(dry):
    report, _ = dry
    assert {"card", "nvml", "versions", "settings", "calibration", "summary", "skipped", "minutes", "seconds"} <= set(
        report
    )
    assert {"name", "memory_bytes", "free_bytes", "driver"} <= set(report["card"])
    assert report["versions"]["torch"] == torch.__version__
    assert report["calibration"]["source"] == "assumed"
    assert report["skipped"] == []


def test_every_row_is_measured_and_predicted_twice(dry):
    report, _ = dry
    assert [model["name"] for model in report["models"]] == ["tiny ViT", "tiny ResNet", "tiny GPT-2"]
    for model in report["models"]:
        depth = model["depth"]
        pairs = [(row["horizon"], row["stride"], row["recompute"]) for row in model["rows"]]
        assert pairs[:2] == [(depth, 1, 0), (depth, 1, 1)]
        assert len(set(pairs)) >= 5
        assert model["rows"][0]["isolated"]
        for row in model["rows"]:
            assert row["status"] == "measured"
            assert row["fake_bytes"] < row["device_bytes"]
            assert abs(row["fold_error_percent"]) <= 3


def test_steps_are_timed_against_back_propagation(dry):
    for model in dry[0]["models"]:
        ratios = {(t["horizon"], t["stride"], t["recompute"]): t["ratio"] for t in model["times"]["rows"]}
        assert ratios[model["depth"], 1, 0] == 1
        assert {(r["horizon"], r["stride"], r["recompute"]) for r in model["rows"]} <= set(ratios)
        assert min(ratios.values()) > 0


def test_summary_and_table_tell_the_same(dry):
    report, printed = dry
    fold = report["summary"]["fold"]
    assert fold["ok"]
    assert (fold["rows"], fold["missing"]) == (sum(len(model["rows"]) for model in report["models"]), 0)
    assert f"fold: median {fold['median']:.1f} %" in printed
    assert all(row["name"] in printed for model in report["models"] for row in model["rows"])


def test_what_the_time_does_not_allow_is_named(tmp_path):
    ended = run("--device", "cpu", "--tiny", "--minutes", "0", "--out", str(tmp_path / "gpu.json"))
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert ended.returncode == 0
    assert [model["status"] for model in report["models"]] == ["skipped: the time was up"] * 3
    assert len(report["skipped"]) == 3
    assert ended.stdout.count("not there: ") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_card_it_ends_with_one_line(tmp_path):
    ended = run("--out", str(tmp_path / "gpu.json"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines() == [
        "error: torch sees no CUDA device here; for a dry run without one give --device cpu --tiny"
    ]
    assert not (tmp_path / "gpu.json").exists()


def test_batch_is_halved_until_back_propagation_fits(gpu, monkeypatch):
    case, cpu, clock = gpu.cases(tiny=True)[0], torch.device("cpu"), gpu.Clock(minutes=1)
    model = case.build()
    assert gpu.fitting_samples(case, model, "24GiB", gpu.ASSUMED) == 8
    assert gpu.fitting_samples(case, model, "1MiB", gpu.ASSUMED) == 1
    tried = []

    def runs_out(chain, batch, way, clock, isolated):
        tried.append(len(batch["labels"]))
        return {"status": gpu.MEASURED if tried[-1] <= 2 else gpu.OUT_OF_MEMORY}

    monkeypatch.setattr(gpu, "measured", runs_out)
    _, batch, samples, exact = gpu.begun(case, model, 8, cpu, clock)
    assert (tried, samples, len(batch["labels"]), exact["status"]) == ([8, 4, 2], 2, 2, "measured")


@pytest.mark.parametrize(
    ("message", "status"),
    [("CUDA out of memory.", "out of memory"), ("no result after timeout_seconds=120", "skipped: the time was up")],
)
def test_what_has_no_bytes_says_why(gpu, monkeypatch, message, status):
    case = gpu.cases(tiny=True)[0]
    chain, batch = gpu.Chain.from_model(case.build(), case.batch(2)), case.batch(2)
    sample = gpu.probes.Sample(
        "memory", "bytes", 1, 1, float("nan"), source="out of memory", detail={"message": message}
    )
    monkeypatch.setattr(gpu.probes, "memory", lambda *args, **kwargs: [sample])
    found = gpu.measured(chain, batch, (1, 1, 0), gpu.Clock(minutes=1), isolated=True)
    assert (found["status"], found["message"]) == (status, message)


def test_probe_that_fails_does_not_end_the_benchmark(gpu, monkeypatch):
    case = gpu.cases(tiny=True)[0]
    chain, batch = gpu.Chain.from_model(case.build(), case.batch(2)), case.batch(2)

    def fails(*args, **kwargs):
        raise RuntimeError("CUDA error:\nan illegal memory access")

    monkeypatch.setattr(gpu.probes, "memory", fails)
    found = gpu.measured(chain, batch, (1, 1, 0), gpu.Clock(minutes=1), isolated=True)
    assert found["status"] == "failed: RuntimeError: CUDA error: an illegal memory access"
