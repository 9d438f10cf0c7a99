"""``horizonplan tune``."""

import json
import sys
from pathlib import Path

import optuna
import pytest
import tuner_job
from typer.testing import CliRunner

import horizonplan as hp
from horizonplan.cli import app

optuna.logging.set_verbosity(optuna.logging.WARNING)


USER = """
from tuner_job import dataset, harms, maker, model

def both():
    return dataset(), dataset(32)

def ends(trial):
    return {"model": {"harm": "raises"}}
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "tuned_user.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "tuned_user"
    sys.modules.pop("tuned_user", None)


def command(*words, code=0):
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["tune", *map(str, words)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_command_tunes_and_goes_on(user, tmp_path):
    here = [f"{user}:model", "--data", f"{user}:both", "--workers", 0, "--storage", "study.log"]
    text = command(*here, "--trials", 2, "--out", "plan.json", "--plot", "study.png").stdout
    assert [line.split()[-1] for line in text.splitlines()[1:3]] == ["finished"] * 2
    assert hp.Plan.load("plan.json").depth == tuner_job.DEPTH
    assert "--plan plan.json --optimizer adamw --lr 0.00" in text.splitlines()[-1]
    assert Path("study.png").stat().st_size > 0
    found = json.loads(command(*here, "--trials", 3, "--json").stdout)
    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 3
    assert found["best"] in found["best_trials"]


def test_picture_that_cannot_be_drawn_costs_nothing_else(user, tmp_path):
    words = [f"{user}:model", "--data", f"{user}:both", "--workers", 0, "--trials", 1, "--json"]
    result = command(*words, "--out", "plan.json", "--plot", "study.nonsense", code=1)
    assert "nonsense" in result.stderr
    assert hp.Plan.load("plan.json").to_dict() == json.loads(result.stdout)["plan"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--data", "tuned_user:dataset"], 1, "nothing to validate on"),
        (["--data", "tuned_user:both", "--learning-rates", "fast"], 2, "two numbers"),
        (["--data", "tuned_user:both", "--out", "nowhere/plan.json"], 2, "no folder nowhere"),
        (["--data", "tuned_user:both", "--plan", "absent.json"], 1, "absent.json"),
        (["--data", "tuned_user:both", "--storage", "nowhere/study.log"], 1, "no folder"),
        (["--data", "tuned_user:both", "--metric", "recall"], 1, "higher_is_better"),
        (["--data", "tuned_user:both", "--space", "tuned_user:absent"], 1, "no 'absent'"),
        (["--data", "tuned_user:both", "--trials", "0"], 2, "--trials"),
        (["--data", "tuned_user:both", "--plan", "p.json", "--blocks", "blocks"], 2, "exclude each other"),
    ],
)
def test_wrong_words_are_told_in_one_line(user, words, code, message):
    output = command(f"{user}:model", *words, "--workers", 0, code=code).output
    assert message in " ".join(output.split())
    assert "Traceback" not in output


def test_command_fails_where_no_trial_finishes(user):
    words = [f"{user}:maker", "--data", f"{user}:both", "--workers", 0, "--space", f"{user}:ends", "--trials", 2]
    result = command(*words, "--json", code=1)
    assert "a bug in the model" in result.stderr
    assert [trial["state"] for trial in json.loads(result.stdout)["trials"]] == ["failed"] * 2
