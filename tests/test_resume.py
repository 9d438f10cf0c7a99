"""A run that is broken off and resumed is the run that was not, bit for bit.

The oracle is the uninterrupted run: its weights, optimiser, history and random numbers.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

import horizonplan as hp
from horizonplan import algorithms
from horizonplan.training import EXIT_TERMINATED, CheckpointError, CheckpointWarning, Terminated
from horizonplan.training.state import FOLDER


class Noisy(Dataset):
    """Samples that are augmented with all the generators that people use."""

    def __init__(self, count):
        torch.manual_seed(5)
        self.x, self.y = torch.randn(count, 4), torch.randint(0, 3, (count,))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return self.x[i] + 0.1 * noise, self.y[i]


def make():
    torch.manual_seed(2)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(4, 3))


class Broken(Exception):
    """What ends a run in the middle."""


class BreakAt:
    """Raises after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, run, step):
        if step["step"] == self.step:
            raise Broken


def run(data, folder, callbacks=(), resume=False, **options):
    model = make()
    kept = []

    class Keep:
        def on_train_end(self, run):
            kept.append(run.optimizer.state_dict())

    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2), "epochs": 3, "save_every": 2, **options}
    result = hp.train(
        model, data(), run_dir=folder, resume=resume, callbacks=[*callbacks, Keep()], progress=False, **options
    )
    return model, kept[0], result


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or one != one


def scramble():
    torch.rand(7)
    random.random()
    np.random.rand(3)


def batches():
    torch.manual_seed(6)
    return [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(4)]


DATA = {
    "dataset": lambda: Noisy(80),
    "loader": lambda: DataLoader(Noisy(40), batch_size=8, shuffle=True),
    "batches": batches,
}
OPTIONS = {
    "plain": {},
    "horizon": {"algorithm": algorithms.Horizon(2), "max_grad_norm": 0.5},
    "fp16": {"precision": "fp16", "scheduler": lambda o: CosineAnnealingLR(o, 9), "scheduler_every": "step"},
    "accumulate": {"accumulate": 2, "precision": "bf16", "scheduler": lambda o: CosineAnnealingLR(o, 3)},
    "warm-up": {"warmup": 2, "fused": True, "scheduler": hp.DecayOnGrowth},
    "plateau": {"scheduler": lambda o: ReduceLROnPlateau(o, patience=0), "val_data": batches()},
    "by epoch": {"save_every": None, "cosine_every": 3, "algorithm": algorithms.Horizon(2, 2, 1)},
}


QUICK = {("dataset", name) for name in OPTIONS} | {("loader", "plain"), ("batches", "accumulate")}
CASES = [
    pytest.param(
        DATA[data], OPTIONS[name], id=f"{data}, {name}", marks=[] if (data, name) in QUICK else pytest.mark.slow
    )
    for data in DATA
    for name in OPTIONS
]


@pytest.mark.parametrize(("data", "options"), CASES)
def test_a_resumed_run_is_the_uninterrupted_one(data, options, tmp_path):
    whole, optimizer, result = run(data, tmp_path / "whole", **options)
    last = len(result.history) - 1
    for step in sorted({0, 1, last // 2, last}):
        folder = tmp_path / f"broken-{step}"
        with pytest.raises(Broken):
            run(data, folder, [BreakAt(step)], **options)
        scramble()
        model, resumed, again = run(data, folder, resume=True, **options)
        assert same(model.state_dict(), whole.state_dict()), step
        assert same(resumed, optimizer)
        assert again.history == result.history
        assert same(again.validations, result.validations)
        assert again.final_loss == result.final_loss
        assert same(load_file(folder / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors"))


def test_a_run_that_is_broken_off_again_and_again_ends_alike(tmp_path):
    whole, _, result = run(DATA["loader"], tmp_path / "whole")
    folder = tmp_path / "broken"
    for step in (3, 4, 9):
        with pytest.raises(Broken):
            run(DATA["loader"], folder, [BreakAt(step)], resume=True)
    model, _, again = run(DATA["loader"], folder, resume=True)
    assert same(model.state_dict(), whole.state_dict())
    assert again.history == result.history
    steps = [e["step"] for e in events_of(folder) if e["event"] == "step"]
    assert steps == list(range(len(result.history)))


def events_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_finished_run_is_not_trained_again(tmp_path):
    whole, _, result = run(DATA["loader"], tmp_path)
    model, _, again = run(DATA["loader"], tmp_path, resume=True)
    assert again.history == result.history
    assert again.final_loss == result.final_loss
    assert same(model.state_dict(), whole.state_dict())


def test_more_epochs_go_on_where_the_run_ended(tmp_path):
    whole, _, _ = run(DATA["loader"], tmp_path / "whole", epochs=4)
    run(DATA["loader"], tmp_path / "two", epochs=2)
    model, _, result = run(DATA["loader"], tmp_path / "two", epochs=4, resume=True)
    assert same(model.state_dict(), whole.state_dict())
    assert len(result.history) == 20


def test_early_stopping_waits_on(tmp_path):
    def options():
        return {"epochs": 9, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "save_every": None}

    def stop():
        return hp.EarlyStopping(patience=3, metric="loss", min_delta=1e9)

    _, _, result = run(DATA["batches"], tmp_path / "whole", [stop()], **options())
    assert len(result.history) == 4 * 4
    with pytest.raises(Broken):
        run(DATA["batches"], tmp_path / "b", [stop(), BreakAt(9)], **options())
    _, _, again = run(DATA["batches"], tmp_path / "b", [stop()], resume=True, **options())
    assert again.history == result.history
    assert again.stopped == result.stopped


def test_a_run_goes_on_elsewhere_from_another_one_s_checkpoint(tmp_path):
    whole, _, result = run(DATA["loader"], tmp_path / "whole")
    with pytest.raises(Broken):
        run(DATA["loader"], tmp_path / "first", [BreakAt(7)])
    before = sorted(str(path) for path in (tmp_path / "first").rglob("*"))
    log = (tmp_path / "first" / "log.jsonl").read_bytes()
    for number, where in enumerate((tmp_path / "first", max((tmp_path / "first" / FOLDER).iterdir()))):
        model, _, again = run(DATA["loader"], tmp_path / f"second-{number}", resume=where)
        assert same(model.state_dict(), whole.state_dict())
        assert again.history == result.history
    assert sorted(str(path) for path in (tmp_path / "first").rglob("*")) == before
    assert (tmp_path / "first" / "log.jsonl").read_bytes() == log


def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path):
    whole, _, _ = run(DATA["loader"], tmp_path / "whole")
    with pytest.raises(Broken):
        run(DATA["loader"], tmp_path / "b", [BreakAt(9)])
    newest = max((tmp_path / "b" / FOLDER).iterdir())
    weights = newest / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.warns(CheckpointWarning, match=re.escape(newest.name)):
        model, _, _ = run(DATA["loader"], tmp_path / "b", resume=True)
    assert same(model.state_dict(), whole.state_dict())


def test_a_folder_with_a_run_in_it_is_not_overwritten(tmp_path):
    run(DATA["batches"], tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="there is a run in it already; go on with it by resume=True"):
        run(DATA["batches"], tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == before


CHANGES = [
    ({"precision": "bf16"}, "precision='fp32', this run has 'bf16'"),
    ({"accumulate": 2}, "accumulate=1, this run has 2"),
    ({"algorithm": algorithms.Horizon(1)}, "algorithm="),
    ({"optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)}, "optimizer='AdamW', this run has 'SGD'"),
    ({"scheduler": hp.DecayOnGrowth}, "scheduler=None"),
    (
        {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)},
        "optimizer settings={'lr': '0.01'}, this run has {'lr': '0.001'}",
    ),
]


@pytest.mark.parametrize(("options", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_another_setting_is_refused(options, message, tmp_path):
    with pytest.raises(Broken):
        run(DATA["batches"], tmp_path, [BreakAt(5)])
    with pytest.raises(ValueError, match=re.escape(message)):
        run(DATA["batches"], tmp_path, resume=True, **options)
    run(DATA["batches"], tmp_path, resume=True)


def test_another_model_is_refused(tmp_path):
    with pytest.raises(Broken):
        run(DATA["batches"], tmp_path, [BreakAt(5)])
    wider = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"is of another model: 'model\.0\.1\.bias' is in one of them only"):
        hp.train(
            wider,
            DATA["batches"](),
            epochs=3,
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
            run_dir=tmp_path,
            resume=True,
            progress=False,
        )


def test_nothing_to_resume_from(tmp_path):
    _, _, result = run(DATA["batches"], tmp_path / "new", resume=True)  # a first start with the same command
    assert len(result.history) == 12
    with pytest.raises(ValueError, match="there is no checkpoint in that folder"):
        run(DATA["batches"], tmp_path / "other", resume=tmp_path / "nowhere")
    assert not (tmp_path / "other" / "log.jsonl").exists()


def test_a_schedule_for_other_epochs_is_refused(tmp_path):
    def options(epochs):
        return {"epochs": epochs, "scheduler": lambda o: CosineAnnealingLR(o, epochs)}

    run(DATA["batches"], tmp_path, **options(2))
    with pytest.raises(ValueError, match=r"scheduler settings=\{'T_max': '2'\}, this run has \{'T_max': '4'\}"):
        run(DATA["batches"], tmp_path, resume=True, **options(4))
    with pytest.raises(ValueError, match="epochs=1: the run is in epoch 1 already"):
        run(DATA["batches"], tmp_path, resume=True, **options(2) | {"epochs": 1})


def test_patience_may_grow(tmp_path):
    def options(patience):
        return [hp.EarlyStopping(patience, metric="loss", min_delta=1e9)]

    still = {"epochs": 9, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "save_every": None}
    _, _, first = run(DATA["batches"], tmp_path, options(1), **still)
    assert len(first.history) == 2 * 4
    _, _, same_again = run(DATA["batches"], tmp_path, options(1), resume=True, **still)
    assert len(same_again.history) == 2 * 4
    _, _, more = run(DATA["batches"], tmp_path, options(3), resume=True, **still)
    assert len(more.history) == 4 * 4
    _, _, all_of_it = run(DATA["batches"], tmp_path, resume=True, **still)
    assert len(all_of_it.history) == 9 * 4
    assert all_of_it.stopped is None


def test_a_run_that_a_callback_stopped_in_an_epoch_goes_on_there(tmp_path):
    whole, _, result = run(DATA["dataset"], tmp_path / "whole")

    class Stop:
        def on_step_end(self, run, step):
            if step["step"] == 4:
                run.stop("out of time")

    _, _, stopped = run(DATA["dataset"], tmp_path / "b", [Stop()], val_data=DATA["batches"]())
    assert (len(stopped.history), len(stopped.validations)) == (5, 2)
    assert stopped.stopped == "out of time"
    model, _, again = run(DATA["dataset"], tmp_path / "b", resume=True)
    assert same(model.state_dict(), whole.state_dict())
    assert again.history == result.history


def test_validation_changes_nothing_of_the_training(tmp_path):
    whole, _, _ = run(DATA["dataset"], None, save_every=None)
    model, _, _ = run(DATA["dataset"], None, save_every=None, val_data=DATA["loader"]())
    assert same(model.state_dict(), whole.state_dict())


def test_going_back_in_a_run_leaves_the_later_checkpoints_aside(tmp_path):
    whole, _, _ = run(DATA["batches"], tmp_path / "whole", epochs=4)
    run(DATA["batches"], tmp_path / "b")
    earlier, later = sorted((tmp_path / "b" / FOLDER).iterdir())
    with pytest.raises(Broken):
        run(DATA["batches"], tmp_path / "b", [BreakAt(10)], resume=earlier, save_every=100, epochs=4)
    names = sorted(path.name for path in (tmp_path / "b" / FOLDER).iterdir())
    assert names[0].startswith(f"abandoned-{later.name}")
    assert names[1:] == [earlier.name]
    model, _, result = run(DATA["batches"], tmp_path / "b", resume=True, epochs=4)
    assert same(model.state_dict(), whole.state_dict())
    assert [entry["step"] for entry in result.history] == list(range(16))


def test_a_run_is_not_continued_into_the_folder_of_another(tmp_path):
    run(DATA["batches"], tmp_path / "a")
    run(DATA["batches"], tmp_path / "b", epochs=4)
    before = sorted((str(p), p.stat().st_size) for p in (tmp_path / "b").rglob("*"))
    with pytest.raises(ValueError, match="there is a run in it already"):
        run(DATA["batches"], tmp_path / "b", resume=tmp_path / "a", epochs=4)
    assert sorted((str(p), p.stat().st_size) for p in (tmp_path / "b").rglob("*")) == before


def test_where_all_checkpoints_are_damaged_nothing_is_started_afresh(tmp_path):
    run(DATA["batches"], tmp_path)
    for path in (tmp_path / FOLDER).iterdir():
        (path / "state.pt").write_bytes(b"")
    log = (tmp_path / "log.jsonl").read_bytes()
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match="none of its 2 checkpoints is valid, so the run cannot go on"),
    ):
        run(DATA["batches"], tmp_path, resume=True)
    assert (tmp_path / "log.jsonl").read_bytes() == log


class Counts(nn.Module):
    """Keeps a number that is in no tensor, and a buffer that appears in its first forward."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.register_buffer("seen", None, persistent=False)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.count += 1
            self.seen = x.detach().mean() if self.seen is None else 0.5 * (self.seen + x.detach().mean())
        return x if self.seen is None else x * (1 + 0.1 * self.seen)

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def test_state_that_is_no_parameter_is_saved_too(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)), nn.Linear(4, 3), Counts())

    def train(folder, callbacks=(), resume=False):
        made = model()
        hp.train(made, batches(), epochs=2, run_dir=folder, resume=resume, callbacks=callbacks, progress=False)
        return made

    whole = train(tmp_path / "whole")
    with pytest.raises(Broken):
        train(tmp_path / "b", [BreakAt(5)])
    again = train(tmp_path / "b", resume=True)
    assert whole[-1].count == again[-1].count
    assert torch.equal(whole[-1].seen, again[-1].seen)
    assert same(again.state_dict(), whole.state_dict())


def test_a_run_s_folder_is_where_it_was(tmp_path, monkeypatch):
    """...though the working directory changes meanwhile."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    class Move:
        def on_step_end(self, run, step):
            os.chdir(tmp_path / "elsewhere")

    run(DATA["batches"], "mine", [Move()])
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "checkpoints",
        "log.jsonl",
        "model.safetensors",
    ]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_sigterm_in_the_last_validation_ends_the_process_after_the_run(tmp_path):
    class End:
        def on_epoch_end(self, run, epoch):
            if epoch["epoch"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated, match="when all steps were made; the weights are saved"):
        run(DATA["batches"], tmp_path, [End()])
    assert load_file(tmp_path / "model.safetensors")


def test_a_lost_log_is_an_error(tmp_path):
    with pytest.raises(Broken):
        run(DATA["batches"], tmp_path, [BreakAt(5)])
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match="bring the whole log back"):
        run(DATA["batches"], tmp_path, resume=True)


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_leaves_the_last_checkpoint(what, tmp_path, monkeypatch):
    whole, _, result = run(DATA["loader"], tmp_path / "whole")
    write = os.write

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Fill:
        def on_step_end(self, run, step):
            if step["step"] == 8 and what == "checkpoint":
                monkeypatch.setattr(os, "write", fail)
            elif step["step"] == 8:
                run.log.file.close()
                run.log.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115

    intact = {
        "checkpoint": "no space left on device.*The last intact checkpoint is .*step-000000008.*resume=True",
        "log": "no space left on device; the checkpoints beside it are intact: make room, .* resume=True",
    }
    with pytest.raises(CheckpointError, match=intact[what]):
        run(DATA["loader"], tmp_path / "b", [Fill()])
    monkeypatch.setattr(os, "write", write)
    model, _, again = run(DATA["loader"], tmp_path / "b", resume=True)
    assert same(model.state_dict(), whole.state_dict())
    assert again.history == result.history


class Terminate:
    """Sends SIGTERM in a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, run, step):
        if step["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_finishes_the_step_saves_and_ends_with_its_code(tmp_path):
    whole, _, result = run(DATA["loader"], tmp_path / "whole", save_every=100)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="SIGTERM: 7 steps are made and saved; go on with resume=True") as caught:
        run(DATA["loader"], tmp_path / "b", [Terminate(6)], save_every=100)
    assert caught.value.code == EXIT_TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) is before
    model, _, again = run(DATA["loader"], tmp_path / "b", resume=True, save_every=100)
    assert same(model.state_dict(), whole.state_dict())
    assert again.history == result.history


SCRIPT = """
    import sys, time
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    import horizonplan as hp

    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.1)) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(16, 3))
    data = DataLoader(TensorDataset(torch.randn(240, 16), torch.randint(0, 3, (240,))), batch_size=8, shuffle=True)

    class Slow:
        def on_train_begin(self, run):
            print("ready", flush=True)

        def on_step_end(self, run, step):
            print(step["step"], flush=True)
            time.sleep(float(sys.argv[2]))

    hp.train(model, data, epochs=4, run_dir=sys.argv[1], save_every=3, resume=True, callbacks=[Slow()], progress=False,
             algorithm=hp.algorithms.Horizon(2))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "run.py"
    path.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    return path


def start(script, folder, pause):
    command = [sys.executable, str(script), str(folder), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sigterm_to_a_process(script, tmp_path):
    process = start(script, tmp_path, 0.01)
    for line in process.stdout:
        if line.strip() == "4":
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_TERMINATED, errors
    names = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    made = sum(event["event"] == "step" for event in events_of(tmp_path))
    assert names[-1] == f"step-{made:09d}"


def test_a_second_sigterm_ends_at_once(script, tmp_path):
    process = start(script, tmp_path, 30)
    for line in process.stdout:
        if line.strip() == "0":
            break
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None  # the step is not over
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == EXIT_TERMINATED
    assert time.monotonic() - started < 25  # long before the step's end


@pytest.mark.slow
def test_killed_at_random_moments_the_final_weights_are_those_of_an_uninterrupted_run(script, tmp_path):
    whole = tmp_path / "whole"
    process = start(script, whole, 0)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    expected = load_file(whole / "model.safetensors")
    steps = [event["loss"] for event in events_of(whole) if event["event"] == "step"]
    assert len(steps) == 120
    chance, kills, finished, folder = random.Random(0), 0, 0, tmp_path / "killed"
    while kills < 50:
        process = start(script, folder, 0.004)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        try:
            process.wait(timeout=chance.uniform(0.0, 0.35))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            assert same(load_file(folder / "model.safetensors"), expected)
            finished += 1
            shutil.rmtree(folder)
        else:
            assert process.returncode == -signal.SIGKILL, errors
    process = start(script, folder, 0)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert same(load_file(folder / "model.safetensors"), expected)
    assert [event["loss"] for event in events_of(folder) if event["event"] == "step"] == steps
    assert not [path for path in Path(folder, FOLDER).iterdir() if not path.name.startswith("step-")]
