"""Described cards are read or refused in words; a calibration is its arithmetic, and survives its file.

No card is at hand: what runs on one runs here on the CPU, and its readings are made up.
"""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horizonplan.devices import ASSUMED, Calibration, Card, calibrate, calibration_of, parse_device
from horizonplan.probes.card import Observed, exercise, networks, train_steps
from horizonplan.probes.nvml import Reading

MIB = 2**20
MEASURED = Calibration("NVIDIA A", 80 * 2**30, 500 * MIB, 70 * MIB, 0.125, "measured", "580.1", "2.13.0", "2026-11-25")


@pytest.mark.parametrize("kind", ["simulated", "emulated"])
@given(size=st.integers(1, 2**50))
def test_described_card_has_the_memory_it_is_given(kind, size):
    assert parse_device(f"{kind}:{size}") == parse_device(f"{kind}: {size}B") == Card(kind, size)


def test_described_card_takes_sizes_with_units():
    assert parse_device("simulated:24GiB") == Card("simulated", 24 * 2**30)
    assert parse_device("emulated:40MB") == Card("emulated", 40_000_000)


@pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:1", "meta", torch.device("cuda", 0), "24GiB"])
def test_real_devices_are_not_described(device):
    assert parse_device(device) is None


@pytest.mark.parametrize("size", ["", "lots", "0", "-1GiB", "24 apples", "nan"])
@pytest.mark.parametrize("kind", ["simulated", "emulated"])
def test_bad_size_is_named_with_the_remedy(kind, size):
    with pytest.raises(ValueError, match=f"device='{kind}:{size}': .* write '{kind}:24GiB'") as error:
        parse_device(f"{kind}:{size}")
    assert error.value.__cause__ is error.value.__context__ is None


def test_card_without_a_size_is_refused():
    with pytest.raises(ValueError, match="device='simulated': "):
        parse_device("simulated")


@given(st.integers(0, 2**45), st.integers(0, 2**45))
def test_margin_grows_with_what_is_predicted(first, second):
    low, high = sorted([first, second])
    assert ASSUMED.context_bytes + ASSUMED.workspace_bytes <= ASSUMED.margin_bytes(low) <= ASSUMED.margin_bytes(high)


def test_margin_is_context_workspaces_and_overhead_rounded_up():
    made = Calibration("x", None, 100, 20, 0.5, "measured")
    assert [made.margin_bytes(n) for n in (0, 1, 10)] == [120, 121, 125]
    assert ASSUMED.margin_bytes(0) == (512 + 64) * MIB
    assert ASSUMED.source == "assumed"


@pytest.mark.parametrize("made", [ASSUMED, MEASURED], ids=["assumed", "measured"])
def test_calibration_survives_its_file(tmp_path, made):
    made.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == made
    assert json.loads((tmp_path / "calibration.json").read_text())["schema_version"] == 1


def without(name):
    return {key: value for key, value in MEASURED.to_dict().items() if key != name}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no schema_version in it"),
        ([], "no schema_version in it"),
        ({"schema_version": 2}, "is newer than this horizonplan reads"),
        (without("overhead"), "damaged .*overhead.*; calibrate again"),
        (MEASURED.to_dict() | {"context_bytes": -1}, "damaged"),
        (MEASURED.to_dict() | {"workspace_bytes": "64MiB"}, "damaged"),
        (MEASURED.to_dict() | {"overhead": None}, "damaged"),
        (MEASURED.to_dict() | {"overhead": float("nan")}, "damaged"),
        (MEASURED.to_dict() | {"source": "guessed"}, "damaged"),
    ],
)
def test_damaged_or_newer_record_is_refused_with_its_path(tmp_path, data, message):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{path}: calibration: .*{message}"):
        Calibration.load(path)


def test_file_that_is_no_json_or_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "absent.json")
    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="text is no JSON file"):
        Calibration.load(tmp_path / "text")


def reading(process=None, used=None, fallback=None):
    """As NVML would give it; the driver's own peak, which covers other moments, must not count."""
    return Reading(process, used, 80_000, 7777, fallback, "")


# A context of 500; 300 more when libraries are loaded, beside 64 that torch allocated for them.
SEEN = Observed("NVIDIA A", 80_000, reading(520, 1520), 20, reading(1000, 2000), 200, 64, ((110, 100), (250, 200)))


@pytest.mark.parametrize(
    ("before", "seen"),
    [
        (reading(None, 900), SEEN),
        (reading(None, None), SEEN),
        (
            reading(None, 1000),
            replace(SEEN, first=reading(None, 1520), worked=reading(None, 2000)),
        ),
    ],
    ids=["process bytes", "no baseline", "device used minus baseline"],
)
def test_calibration_is_what_the_driver_sees_and_the_allocator_does_not(before, seen):
    made = calibration_of(before, seen)
    assert (made.context_bytes, made.workspace_bytes) == (500, 300 + 64)
    assert made.overhead == 0.25  # of the worse network
    assert (made.card, made.memory_bytes, made.source) == ("NVIDIA A", 80_000, "measured")


def test_calibration_has_no_negative_parts():
    odd = replace(SEEN, first=reading(10), worked=reading(100), kept_bytes=0, peaks=((99, 100),))
    made = calibration_of(reading(), odd)
    assert (made.context_bytes, made.workspace_bytes, made.overhead) == (0, 0, 0.0)


def test_nothing_to_calibrate_by_is_named():
    hidden = reading(fallback="hidden process")
    with pytest.raises(ValueError, match=r"NVML shows no bytes of NVIDIA A.*a container"):
        calibration_of(hidden, replace(SEEN, first=hidden, worked=hidden))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), *([] if torch.cuda.is_available() else ["cuda"])])
def test_calibrating_needs_a_card(device):
    with pytest.raises(ValueError, match=f"device='{device}': calibrating needs a CUDA card"):
        calibrate(device)


def test_what_calibration_runs_on_a_card_runs():
    cpu = torch.device("cpu")
    exercise(cpu)
    for model, inputs, targets in networks(cpu, batch=1):
        before = [p.detach().clone() for p in model.parameters()]
        train_steps(model, inputs, targets, torch.optim.AdamW(model.parameters()), steps=1)
        assert any((p != was).any() for p, was in zip(model.parameters(), before, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_card_is_calibrated():
    made = calibrate("cuda")
    assert made.source == "measured"
    assert 50 * MIB < made.context_bytes < 2**31
    assert 0 <= made.overhead < 0.5
    assert made.driver
    assert made.date
