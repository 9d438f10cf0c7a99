"""Where a study's trials are kept: journals, databases, owners, and what a kill costs."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import tuner_job
from postgresql import postgresql

from horizonplan.tuner import owner, work
from horizonplan.tuner.ledger import MOST_DEATHS, VOID, Ledger
from horizonplan.tuner.storage import opened

optuna.logging.set_verbosity(optuna.logging.WARNING)


def sqlite(path):
    """A database with line ends among its bytes."""
    with contextlib.closing(sqlite3.connect(path)) as base:
        base.execute("create table t(a)")
        base.executemany("insert into t values (?)", [(f"row {i}\nnote",) for i in range(300)])
        base.commit()


@pytest.mark.parametrize(
    "text",
    [
        b"Dear diary,\nnothing happened.\n",
        b"my only notes, no line end",
        b'{"lr": 0.1}',
        b'{"epoch": 1}\n{"epoch": 2}\n{"epo',
        b'{"op_code": 0} and more\n',
        sqlite,
    ],
)
def test_file_that_is_no_journal_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "study.db"
    text(path) if callable(text) else path.write_bytes(text)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"study\.db.*no journal"), opened(path):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("length", [0, 1, 5, 11, 30])
def test_journal_whose_first_record_was_cut_off_is_one(tmp_path, length):
    path = tmp_path / "study.log"
    with opened(path) as storage:
        optuna.create_study(storage=storage, study_name="s")
    path.write_bytes(path.read_bytes().partition(b"\n")[0][:length])
    with opened(path) as storage:
        assert optuna.get_all_study_names(storage) == []
        optuna.create_study(storage=storage, study_name="s")
    with opened(path) as storage:
        assert optuna.get_all_study_names(storage) == ["s"]


def ledger(path, total):
    """A ledger on a study of no models."""
    with opened(path) as storage:
        study = optuna.create_study(storage=storage, study_name="s", directions=["minimize"] * 3, load_if_exists=True)
    return Ledger(study, total, 0, None)


def draw(trial):
    return trial.suggest_float("x", 0, 1)


def test_trial_of_a_dead_owner_is_made_again_until_it_has_failed(tmp_path):
    seen = []
    for _ in range(MOST_DEATHS):
        with ledger(tmp_path / "log", total=1) as left:
            seen.append(left.take(draw)[1])
            assert left.take(draw) is None  # one is all there are to be
    assert len(set(seen)) == 1
    with ledger(tmp_path / "log", total=1) as last:
        assert last.take(draw) is None
        assert last.settled()
        (trial,) = last.begun()
    assert "died 3 times" in trial.user_attrs["found"]["reason"]


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="tells namespaces apart by /proc")
@pytest.mark.parametrize(
    "where", [lambda: os.readlink("/proc/self/ns/pid"), lambda: Path("/proc/sys/kernel/random/boot_id").read_text()]
)
def test_process_number_says_nothing_in_another_container_or_after_a_reboot(where):
    me = owner.begin()
    assert not owner.dead(me)
    owner.end(me)
    assert owner.dead(me)
    assert not owner.dead(me.replace(where().strip(), "another"))


@pytest.mark.parametrize("dies", [1, 3])
def test_owner_that_dies_in_a_trial_changes_no_draw(tmp_path, dies):
    def make(one, count):
        for _ in range(count):
            trial, value = one.take(draw)
            one.finish(trial, work.Found(state="finished"), (value, 0.0, 0.0))

    with ledger(tmp_path / "whole", total=5) as one:
        make(one, 5)
    with ledger(tmp_path / "broken", total=5) as first:
        make(first, dies)
        first.take(draw)
    with ledger(tmp_path / "broken", total=5) as second:
        make(second, 5 - dies)
    assert [t.params for t in second.begun()] == [t.params for t in one.begun()]


def test_trial_of_a_living_owner_is_left_to_it(tmp_path):
    with ledger(tmp_path / "log", total=1) as one, ledger(tmp_path / "log", total=1) as two:
        trial, _ = one.take(draw)
        assert two.take(draw) is None
        assert not two.settled()
        one.finish(trial, work.Found(state="finished"), (1.0, 2.0, 3.0))
        assert two.settled()
        assert two.begun()[0].values == [1.0, 2.0, 3.0]


def test_many_at_once_make_as_many_as_asked_for(tmp_path):
    ledgers = [ledger(tmp_path / "log", total=20) for _ in range(3)]

    def make(one):
        while not one.settled():
            if (taken := one.take(draw)) is not None:
                one.finish(taken[0], work.Found(state="finished"), (taken[1], 0.0, 0.0))

    threads = [threading.Thread(target=make, args=(one,)) for one in ledgers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    counted = ledgers[0].begun()
    assert len(counted) == 20
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in counted)
    assert len({trial.params["x"] for trial in counted}) == 20  # no two drew the same numbers


def started(storage, trials, workers):
    command = [sys.executable, tuner_job.__file__, str(storage), str(trials), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kept(place):
    """The trials in a storage; none if there is no study yet."""
    with opened(place) as storage:
        if "horizonplan" not in optuna.get_all_study_names(storage):
            return []
        return optuna.load_study(study_name="horizonplan", storage=storage).trials


def finished(place):
    """Number -> values and parameters of the trials that are complete."""
    complete = [trial for trial in kept(place) if trial.state == optuna.trial.TrialState.COMPLETE]
    return {trial.number: (tuple(trial.values), trial.params) for trial in complete}


def killed_often(storage, trials, workers, times, rng):
    """Kill a study again and again, then let it come to its end; no finished trial may change or be lost."""
    known = {}
    for _ in range(times):
        process = started(storage, trials, workers)
        time.sleep(rng.uniform(2.0, 14.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = finished(storage)
        assert known.items() <= now.items()
        known = now
    last = started(storage, trials, workers)
    output, errors = last.communicate(timeout=300)
    assert (last.returncode, output.strip()) == (0, str(trials)), errors
    now = finished(storage)
    assert known.items() <= now.items()
    begun = [t for t in kept(storage) if t.state != optuna.trial.TrialState.WAITING and VOID not in t.user_attrs]
    assert len(begun) == trials
    assert all(trial.state.is_finished() for trial in begun)
    return len(known)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_study_loses_no_finished_trial(tmp_path, workers):
    killed_often(tmp_path / "study.log", 8, workers, 5, random.Random(workers))


@pytest.mark.slow
def test_two_processes_share_a_database():
    with postgresql() as (url, _):
        both = [started(url, 6, 1) for _ in range(2)]
        outputs = [process.communicate(timeout=300) for process in both]
        assert [output.strip() for output, _ in outputs] == ["6", "6"], outputs
        assert len(finished(url)) == 6
        assert len({trial.user_attrs["owner"] for trial in kept(url) if "owner" in trial.user_attrs}) == 2
        killed_often(url, 9, 1, 2, random.Random(0))
