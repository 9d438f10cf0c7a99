"""``horizonplan fits``: the exit code is the verdict, JSON is one object, and a model of any size is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import horizonplan as hp
from horizonplan.cli import app

USER = """
import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

DEPTH = 6

def model(width=16, depth=DEPTH):
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.Linear(width, 3))

def huge():
    return model(width=50_000, depth=11)

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = model()

    def forward(self, x):
        return self.body(x)

class Reads(Wrapped):
    def __init__(self):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, DEPTH)]

class Mixes(Wrapped):
    def __init__(self):
        super().__init__()
        self.scale = torch.from_numpy(numpy.ones(16, dtype=numpy.float32)) * torch.ones(16)

class Hides(Wrapped):
    def __init__(self):
        super().__init__()
        self.masks = [torch.ones(16)]

    def forward(self, x):
        return self.body(x * self.masks[0])

class Branches(Wrapped):
    def forward(self, x):
        return self.body(x) if x.sum().item() >= 0 else self.body(-x)

def loads():
    made = model()
    made.load_state_dict({name: torch.zeros(t.shape, device="cpu") for name, t in made.state_dict().items()})
    return made

def moves():
    return model().to("cpu")

def fails():
    raise KeyError("somewhere")

def batch(samples=512, width=16):
    return torch.zeros(samples, width), torch.zeros(samples, dtype=torch.long)

def broad():
    return batch(2, 50_000)

def wrong():
    return batch(8, 17)

def as_list():
    return list(batch(7))

def as_mapping():
    return dict(zip(("input", "labels"), batch(7)))

def dataset():
    return TensorDataset(*batch(70))

def loader():
    return DataLoader(dataset(), batch_size=7)

def batches():
    return [batch(7), batch(8)]

def both():
    return batches(), batches()

def empty():
    return []

def nothing():
    return None
"""
NAME = "horizonplan_asked"
ROOT = Path(__file__).parents[1]
SGD = ["--optimizer", "sgd"]


@pytest.fixture(autouse=True)
def _user_code(tmp_path, monkeypatch):
    """A folder of a user's, who stands in it: their code, and the record of a card that takes tensors only."""
    (tmp_path / f"{NAME}.py").write_text(USER)
    hp.Calibration("a bare card", None, 0, 0, 0.0, "measured").save(tmp_path / "bare.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop(NAME, None)


def run(*words, model="model", batch="batch", code=0):
    """What the command did; its exit code is checked."""
    command = ["fits", f"{NAME}:{model}", "--batch", f"{NAME}:{batch}", *map(str, words)]
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, command)
    assert result.exit_code == code, f"{command}: {result.output}\n{result.exception!r}"
    return result


def judged(*words, memory="1GiB", **options):
    """The JSON object that is all of standard output."""
    return json.loads(run("--device-memory", memory, "--json", *words, **options).stdout)


def fails_in_one_line(*words, **options):
    result = run(*words, code=2, **options)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


def users():
    """The user's module, as the command imported it."""
    return sys.modules[NAME]


@pytest.mark.parametrize(("memory", "code", "words"), [("1GiB", 0, "all; fits 1.0 GiB"), ("1MiB", 1, "too much for")])
def test_exit_code_is_the_verdict(memory, code, words):
    result = run("--device-memory", memory, code=code)
    assert words in result.stdout
    assert result.stderr == ""
    assert judged(memory=memory, code=code)["ok"] is (code == 0)


def test_words_and_json_are_those_of_the_library():
    printed = judged("--horizon", 3, "--stride", 2, *SGD)
    options = {"stride": 2, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    verdict = hp.fits(users().model(), users().batch(), "1GiB", 3, **options)
    assert printed == verdict.to_dict()
    assert run("--device-memory", "1GiB", "--horizon", 3, "--stride", 2, *SGD).stdout.strip() == verdict.explain()


def test_shorter_horizons_recomputing_and_leaner_optimizers_need_less():
    exact = judged("--horizon", 6, *SGD)["predicted_bytes"]
    assert judged(*SGD)["predicted_bytes"] <= exact  # plain back-propagation keeps no block's input twice
    assert judged("--horizon", 2, *SGD)["predicted_bytes"] < judged("--horizon", 4, *SGD)["predicted_bytes"] < exact
    assert judged("--recompute", 2, *SGD)["predicted_bytes"] < exact
    assert judged(*SGD)["optimizer_bytes"] == 0 < judged()["optimizer_bytes"]


def test_blocks_are_those_that_are_named():
    assert judged("--blocks", "[0-3]")["depth"] == 4


def test_a_calibrated_card_replaces_the_assumed_margin():
    assert judged()["margin_bytes"] > 2**29
    bare = judged("--calibration", "bare.json")
    assert (bare["margin_bytes"], bare["margin_source"]) == (0, "a bare card")


def test_sweep_finds_the_boundary_that_the_library_finds():
    words = ["--calibration", "bare.json", "--sweep", *SGD]
    printed = judged(*words, memory="350KiB")
    options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    found = hp.sweep(
        users().model(), users().batch(), "350KiB", calibration=hp.Calibration.load("bare.json"), **options
    )
    assert (printed["largest"], printed["smallest_too_large"]) == (found.largest, found.smallest_too_large)
    assert printed["largest"] + 1 == printed["smallest_too_large"]
    assert [one["batch_size"] for one in printed["tried"]] == [one.batch_size for one in found.tried]
    assert all(set(one) == {"batch_size", "predicted_bytes", "margin_bytes", "ok"} for one in printed["tried"])
    assert {one["batch_size"]: one["ok"] for one in printed["tried"]}[printed["largest"]] is True
    text = run("--device-memory", "350KiB", *words).stdout
    assert f"largest batch size that fits: {found.largest} ({found.largest + 1} does not fit)" in text
    assert len([line for line in text.splitlines() if line.endswith(("  yes", "  no"))]) == len(found.tried)


def test_exit_code_of_a_sweep_is_that_of_the_batch():
    printed = judged("--calibration", "bare.json", "--sweep", *SGD, memory="100KiB", code=1)
    assert not printed["ok"]
    assert 0 < printed["largest"] < 512


def test_a_sweep_says_when_its_limit_or_one_sample_decides():
    printed = judged("--sweep", "--limit", 8)
    assert (printed["largest"], printed["smallest_too_large"], printed["batch_size"]) == (8, None, 512)
    assert "raise --limit" in run("--device-memory", "1GiB", "--sweep", "--limit", 8).stdout
    assert "not even one sample fits" in run("--device-memory", "1MiB", "--sweep", "--limit", 8, code=1).stdout


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        *((name, []) for name in ("as_list", "as_mapping", "loader", "batches", "both")),
        ("dataset", ["--batch-size", 7]),
    ],
)
def test_one_batch_or_the_first_of_many(batch, words):
    assert judged(*words, batch=batch)["batch_size"] == 7


def test_models_and_data_of_ours():
    words = ["fits", "residual-mlp", "--batch", "digits", "--batch-size", "9", "--device-memory", "1GiB", "--json"]
    printed = json.loads(CliRunner().invoke(app, words).stdout)
    assert (printed["batch_size"], printed["depth"], printed["how"]) == (9, None, "fake tensors")


def test_a_model_that_no_memory_here_holds_is_judged():
    result = run("--device-memory", "24GiB", "--json", model="huge", batch="broad", code=1)
    assert json.loads(result.stdout)["parameter_bytes"] > 100e9
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("model", "like", "reason"),
    [
        ("loads", "model", None),
        ("moves", "model", "NotImplementedError: Cannot copy out of meta tensor"),
        ("Reads", "Wrapped", "RuntimeError: Tensor.item() cannot be called on meta tensors"),
        ("Mixes", "Wrapped", "RuntimeError: "),
        ("Hides", "Wrapped", "masks keeps tensors in no buffer"),
    ],
)
def test_what_cannot_be_made_on_meta_is_made_with_values_and_judged_alike(model, like, reason):
    result = run("--device-memory", "1GiB", "--json", model=model)
    printed, plain = json.loads(result.stdout), judged(model=like)
    assert (printed["how"], printed["parameter_bytes"]) == ("fake tensors", plain["parameter_bytes"])
    product = 512 * 16 * 4 if model == "Hides" else 0  # of the input and the mask
    assert printed["predicted_bytes"] == plain["predicted_bytes"] + product
    if reason is None:
        assert result.stderr == ""
    else:
        assert result.stderr.startswith(f"note: model '{NAME}:{model}' was made with its values, ")
        assert reason in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_model_whose_flow_depends_on_values_is_run_and_that_is_said():
    result = run("--device-memory", "1GiB", "--json", model="Branches")
    assert json.loads(result.stdout)["how"] == "a run on the CPU"
    assert "is made with its values and run on the CPU" in result.stderr
    assert "x.sum().item()" in result.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--device-memory", "lots"], "device_memory='lots' is not a size"),
        (["--horizon", 7], "horizon=7: give a whole number between 1 and 6"),
        (["--horizon", 2, "--stride", 3], "stride=3"),
        (["--recompute", -1], "recompute=-1"),
        (["--blocks", "layer.*"], "layer.*"),
        (["--calibration", "absent.json"], "absent.json: No such file"),
        (["--calibration", f"{NAME}.py"], "is no JSON file"),
        (["--optimizer", "newton"], "there is no such name; give adamw"),
        (["--batch-size", 4], "returns whole batches; leave it out"),
    ],
)
def test_question_that_cannot_be(words, reason):
    assert reason in fails_in_one_line("--device-memory", "1GiB", *words)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ("wrong", "batch: Sequential rejected"),
        ("nothing", "no tensor in the NoneType it returned"),
        ("empty", "data has no batches"),
        ("fails", "raised KeyError: 'somewhere'; mend the function"),
        ("absent", "has no 'absent'; check the spelling"),
    ],
)
def test_batch_that_is_none(batch, reason):
    assert reason in fails_in_one_line("--device-memory", "1GiB", batch=batch)


@pytest.mark.parametrize(
    ("model", "reason"), [("fails", "raised KeyError: 'somewhere'"), ("nothing", "returned a NoneType"), ("modle", "")]
)
def test_model_that_is_none(model, reason):
    assert f"model '{NAME}:{model}'" in (message := fails_in_one_line("--device-memory", "1GiB", model=model))
    assert reason in message


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--device-memory", "1GiB", "--horizon", 0],
        ["--device-memory", "1GiB", "--stride", 1],
        ["--device-memory", "1GiB", "--limit", 8],
        ["--device-memory", "1GiB", "--sweep", "--limit", 0],
    ],
    ids=str,
)
def test_wrong_usage(words):
    assert "Usage: " in run(*words, code=2).stderr


def test_help_explains_every_option():
    text = run("--help").stdout
    options = "--batch --device-memory --horizon --stride --recompute --optimizer --lr --blocks --calibration --sweep"
    assert not [option for option in f"{options} --limit --batch-size --json --debug".split() if option not in text]


def test_as_a_process_a_rejected_batch_is_one_line():
    command = [sys.executable, "-m", "horizonplan", "fits", f"{NAME}:model", "--batch", f"{NAME}:wrong"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["--device-memory", "1GiB"]
    done = subprocess.run([*command, *words], env=environment, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
