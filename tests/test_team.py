"""Two processes are one process on their joint batches. What they run is in tests/team_jobs.py."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import team_jobs as jobs
import torch
from safetensors.torch import load_file
from team_jobs import CASES, batches, joint

import horizonplan as hp
from horizonplan.training.state import FOLDER

HERE = Path(__file__).parent
RUN = "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"


def start(*arguments, folder=HERE, run=RUN):
    """torchrun in two processes, in a group of its own."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, *run, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )


def ended(process, timeout=60):
    """Output, errors; no process is left."""
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What both processes saw."""
    folder = tmp_path_factory.mktemp("team")
    process = start(HERE / "team_jobs.py", "together", folder)
    _, errors = ended(process)
    assert process.returncode == 0, errors
    return folder, [torch.load(folder / f"together-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_on_the_joint_batch(name, seen):
    options = {**CASES[name], "cosine_every": 0, "accumulate": 1}
    alone = jobs.trained(joint(batches(), 2, CASES[name].get("accumulate", 1)), **options)
    for found in seen[1]:
        mine = found["equalities"][name]
        close(mine["model"], alone["model"])
        close(mine["losses"], alone["losses"])
    assert same(*(found["equalities"][name] for found in seen[1]))


def test_two_runs_are_equal_bit_for_bit(seen):
    for found in seen[1]:
        assert same(found["equalities"]["again"], found["equalities"]["horizon"])


def test_a_fused_step_is_the_plain_one_bit_for_bit(seen):
    for found in seen[1]:
        assert same(found["equalities"]["fused"], found["equalities"]["not fused"])


def test_a_batch_that_is_not_finite_is_one_for_all(seen, tmp_path):
    """It is process 1's last one, too, which it repeats with weight zero in the round after."""
    with pytest.warns(hp.training.TrainingWarning, match="skip"):
        alone = jobs.trained(joint(batches((4, 4, 4), wrong=[1]), 2), nonfinite="skip")
    options = {"nonfinite": "rollback", "save_every": 1, "run_dir": tmp_path}
    with pytest.warns(hp.training.TrainingWarning, match="rollback"):
        back = jobs.trained(joint(batches((4, 4, 4, 4), wrong=[3]), 2), **options)
    for found in seen[1]:
        close(found["equalities"]["skip"]["model"], alone["model"])
        close(found["equalities"]["skip"]["losses"], alone["losses"])
        close(found["equalities"]["rollback"]["model"], back["model"])
        assert "epoch 0, step 0: loss is nan" in found["equalities"]["raise"]


def test_all_processes_lower_the_scale_of_fp16_together(seen):
    """Process 1 has a batch whose gradient overflows."""
    folder, (one, other) = seen
    assert same(one["equalities"]["fp16"], other["equalities"]["fp16"])
    events = [json.loads(line) for line in (folder / "fp16" / "log.jsonl").read_text().splitlines()]
    updated = [event["updated"] for event in events if event["event"] == "step"]
    assert len(updated) == 6
    assert set(updated) == {True, False}


def test_batches_whose_samples_cannot_be_told_weigh_the_same(seen):
    """Also where one process could tell them."""
    alone = jobs.trained(jobs.untold(), compute_loss=jobs.squares, accumulate=2)
    for found in seen[1]:
        close(found["equalities"]["untold"]["model"], alone["model"])


def test_buffers_are_those_of_process_0_at_an_epochs_end(seen):
    one, other = (found["equalities"]["norm"]["model"] for found in seen[1])
    assert same(one, other)
    assert one["blocks.0.2.num_batches_tracked"] == 6  # three rounds, two epochs


def test_each_parameter_is_reduced_once_a_step(seen):
    """The head with the last loss, then from the last window to the first; a tied weight after its last use."""
    names = [name for name, _ in jobs.Tied().named_parameters()]
    for found in seen[1]:
        first, second, after = found["counts"]
        assert sorted(first) == sorted(names)
        assert first == second == seen[1][0]["counts"][0]
        assert after == []


def test_evaluation_shares_the_batches(seen, tmp_path):
    torch.manual_seed(0)
    alone = jobs.evaluations(tmp_path)
    for found in seen[1]:
        theirs = found["evaluations"]
        by_itself = theirs["shares by itself"]
        assert same(theirs, seen[1][0]["evaluations"])
        for name in ("list", "one batch", "own generator"):
            close(theirs[name], alone[name])
        for name in ("loss", "accuracy"):  # of equal batches, the mean does not depend on their order
            close(theirs["shuffled"][name], alone["shuffled"][name])
            close(by_itself[name], alone["shuffled"][name])
    validated = jobs.trained(joint(batches(), 2), epochs=1, val_data=batches((3, 2, 4)))
    for found in seen[1]:
        close(found["evaluations"]["trained"]["validations"], validated["validations"])


STOPS = {("on_step_end", 1): 1, ("on_step_end", 3): 3, ("on_epoch_end", 3): 3}


@pytest.mark.parametrize(("event", "step"), STOPS)
def test_a_stop_on_one_process_is_one_for_all(event, step, seen):
    for found in seen[1]:
        mine = found["stops"][event, step]
        assert mine["stopped"] == f"process 1 at {step}"
        assert len(mine["losses"]) == step
    assert same(*(found["stops"][event, step] for found in seen[1]))


def test_a_stop_where_only_process_0_is_called(seen):
    for found in seen[1]:
        assert found["stops"]["on_save"]["stopped"] == "process 0 at 3"
        assert len(found["stops"]["on_save"]["losses"]) == 3


def test_the_log_is_written_once(seen):
    folder, (found, _) = seen
    events = [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses == found["resumes"]["whole"]["losses"]
    assert [event["event"] for event in events].count("save") == 3


@pytest.mark.parametrize("step", [0, 3, 5])
def test_sigterm_to_one_process_saves_and_the_resumed_run_is_the_uninterrupted_one(step, seen):
    for found in seen[1]:
        code, words = found["resumes"][step, "ended"]
        assert code == 143
        assert words.startswith(f"SIGTERM: {step + 1} steps are made and saved")
        assert same(found["resumes"][step, "resumed"], found["resumes"]["whole"])
    assert same(*(found["resumes"]["whole"] for found in seen[1]))
    assert "there is a run in it already" in seen[1][1]["resumes"]["refused"]


REFUSALS = {
    "data": "data: for step 2 the processes have 1, 0 batches",
    "model": "model: process 1 has other weights than process 0",
    "metrics": "it has no method sync to bring them together",
    "no checkpoint": "there is no checkpoint in that folder",
    "sparse": "'words' has a sparse gradient",
    "branches": "gradient 0 of this step is that of 'head.bias' on process 0, 'rare.bias' on process 1",
    "fused branches": "gradient 0 of this step is that of 'head.bias' on process 0, 'rare.bias' on process 1",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_is_refused_on_all_processes(name, seen):
    for found in seen[1]:
        assert re.search(REFUSALS[name], found["refusals"][name]), found["refusals"][name]


def test_the_callers_process_group_stays(seen):
    assert [found["initialised"] for found in seen[1]] == [True, True]


# Launches of their own


def test_the_command_line_prints_one_object(tmp_path):
    options = "--data", "team_jobs:data", "--horizon", 2, "--epochs", 2, "--run-dir", tmp_path, "--json"
    process = start("-m", "horizonplan", "train", "team_jobs:model", *options)
    output, errors = ended(process)
    assert process.returncode == 0, errors
    printed = json.loads(output)
    assert printed["horizon"] == 2
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in steps if event["event"] == "step" and event["epoch"] == 1]
    assert printed["final_loss"] == pytest.approx(sum(losses) / 3)
    saved = load_file(tmp_path / "model.safetensors")
    assert not torch.equal(saved["head.weight"], jobs.Tied().head.weight)


WAYS = ["killed", "in backward", pytest.param("in a callback", marks=pytest.mark.slow)]


@pytest.mark.parametrize("way", WAYS)
def test_a_process_that_breaks_down_ends_the_job(way, tmp_path):
    process = start(HERE / "team_jobs.py", "breaks", tmp_path, way)
    output, errors = ended(process, timeout=45)
    assert process.returncode != 0
    assert "step 5" not in output
    if way != "killed":
        assert "KeyError: 'broken'" in errors
    assert (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_the_next_launch_goes_on(tmp_path):
    def launch(name):
        return start(HERE / "team_jobs.py", "breaks", tmp_path / name, "not at all")

    for name in ("whole", "ended"):
        (tmp_path / name).mkdir()
    whole = launch("whole")
    assert ended(whole)
    assert whole.returncode == 0
    process = launch("ended")
    for line in process.stdout:
        if line.strip() == "step 10":
            break
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert process.returncode != 0
    names = sorted(path.name for path in (tmp_path / "ended" / "run" / FOLDER).iterdir())
    events = [json.loads(line) for line in (tmp_path / "ended" / "run" / "log.jsonl").read_text().splitlines()]
    made = sum(event["event"] == "step" for event in events)
    assert names[-1] == f"step-{made:09d}"
    assert events[-1]["event"] == "terminated"
    again = launch("ended")
    assert ended(again)
    assert again.returncode == 0
    for rank in range(2):
        one, other = (torch.load(tmp_path / name / f"breaks-{rank}.pt") for name in ("whole", "ended"))
        assert same(one, other)
