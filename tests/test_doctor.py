"""``horizonplan doctor``: what NVML reads or what hides it, and the calibration record."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from horizonplan import devices
from horizonplan.cli import app
from horizonplan.devices import Calibration
from horizonplan.probes import nvml
from horizonplan.probes.nvml import FALLBACKS, Reading

MADE = Calibration("NVIDIA A", 80 * 2**30, 500 * 2**20, 70 * 2**20, 0.125, "measured", "580.1", "2.13.0", "2026-11-25")
NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


@pytest.fixture(autouse=True)
def _planning_works(tmp_path, monkeypatch):
    """In a folder of its own; whether planning works on a device is another file's test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["horizonplan.cli.doctor"], "_tried", lambda device: None)


def run(*words, code=0):
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        app, ["doctor", *map(str, words)]
    )
    assert result.exit_code == code, f"{words}: {result.output}\n{result.exception!r}"
    return result


@pytest.fixture
def cards(monkeypatch):
    """Two cards: one that NVML reads, one whose process it hides."""
    readings = {
        0: Reading(3 * 2**30, 5 * 2**30, 80 * 2**30, None, None, "NVML lists this process"),
        1: Reading(None, 7 * 2**30, 80 * 2**30, None, "hidden process", "NVML lists no process 1 on this card"),
    }

    class Properties:
        name, total_memory = "NVIDIA A", 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(nvml, "read", lambda device: readings[device.index])


@NO_CARD
def test_without_a_card_it_is_said_why_there_are_no_bytes():
    seen = json.loads(run("--json").stdout)["nvml"]["cuda"]
    assert seen["fallback"] == "no gpu"
    assert seen["meaning"] == FALLBACKS["no gpu"]
    assert seen["process_bytes"] is seen["used_bytes"] is None
    assert "torch (built " in seen["reason"]
    assert FALLBACKS["no gpu"] in run().stdout


@pytest.mark.usefixtures("cards")
def test_readings_of_each_card_are_shown():
    found = json.loads(run("--json").stdout)
    assert set(found["devices"]) == {"cpu", "cuda:0", "cuda:1"}
    assert found["nvml"]["cuda:0"]["process_bytes"] == 3 * 2**30
    assert found["nvml"]["cuda:0"]["fallback"] is found["nvml"]["cuda:0"]["meaning"] is None
    assert found["nvml"]["cuda:1"]["fallback"] == "hidden process"
    assert found["nvml"]["cuda:1"]["used_bytes"] == 7 * 2**30
    text = run().stdout
    assert "process 3.0 GiB, used 5.0 GiB, total 80.0 GiB" in text
    assert (
        f"fallback hidden process, reason NVML lists no process 1 on this card, meaning {FALLBACKS['hidden process']}"
        in text
    )
    assert "None" not in text


@pytest.mark.parametrize(("words", "name"), [([], "calibration.json"), (["--out", "card.json"], "card.json")])
def test_calibration_is_written_and_shown(tmp_path, monkeypatch, words, name):
    monkeypatch.setattr(devices, "calibrate", lambda device: MADE)
    shown = json.loads(run("--calibrate", *words, "--json").stdout)["calibration"]
    assert shown == MADE.to_dict() | {"path": name}
    assert Calibration.load(tmp_path / name) == MADE
    assert "context 500.0 MiB, workspace 70.0 MiB, overhead 0.125" in run("--calibrate", *words).stdout


def test_calibration_is_not_asked_for():
    assert json.loads(run("--json").stdout)["calibration"] is None


@NO_CARD
def test_calibrating_without_a_card_fails_in_one_line(tmp_path):
    result = run("--calibrate", "--json", code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: device='cuda': calibrating needs a CUDA card")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--out", "card.json"], ["--calibrate", "--out", "no/folder/card.json"]])
def test_wrong_usage(words):
    assert "Usage: " in run(*words, code=2).stderr


def test_help_explains_calibrating():
    text = run("--help").stdout
    assert "--calibrate" in text
    assert "--out" in text
