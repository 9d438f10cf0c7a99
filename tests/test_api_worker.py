"""Workers: what comes of a job's process however it ends, its limits, and a database that is locked or full."""

import json
import os
import pwd
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from api_jobs import (
    PLAN,
    PROGRAM,
    TINY,
    check_ends,
    error_of,
    job,
    opened,
    settings_for,
    submit,
    told,
    wait_for,
    working,
)
from sqlalchemy import event

from horizonplan import Plan
from horizonplan.api import architectures, child, queue, worker
from horizonplan.api.architectures import JobRequest
from horizonplan.api.worker import Worker

DECODER = {
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
ENCODER = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4}
LINUX = sys.platform == "linux"


@pytest.fixture
def settings(tmp_path):
    return settings_for(tmp_path)


@pytest.fixture
def store(settings):
    with opened(settings) as store:
        yield store


def work(store, settings, program=PROGRAM):
    assert Worker(store, settings, program).work(threading.Event())


def test_a_plan_is_stored_with_the_end_of_its_job(store, settings):
    job_id = submit(store, steps=3)
    work(store, settings)
    rows = check_ends(store, [job_id])
    with store.read() as connection:
        text = connection.exec_driver_sql("SELECT data FROM plans").scalar()
    assert json.loads(text)["id"] == rows[job_id].plan_id
    assert Plan.from_dict(json.loads(text)).to_dict() == PLAN.to_dict()
    kinds = [kind for kind, _ in told(store, job_id)]
    assert kinds == ["queued", "running", "progress", "progress", "progress", "succeeded"]
    assert not Worker(store, settings).work(threading.Event())  # nothing is left to do


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        ({"do": "error", "error": {"kind": "infeasible", "message": "nothing fits"}}, "infeasible", "nothing fits"),
        ({"do": "nothing"}, "fault", "code 0 and no result"),
        ({"do": "leave"}, "fault", "code 3"),
        ({"do": "killed"}, "killed", "SIGKILL"),
        ({"do": "segfault"}, "killed", "SIGSEGV"),
        ({"do": "garbage"}, "fault", "no result"),
        ({"do": "flood"}, "fault", "more than 32.0 MiB"),
        ({"do": "no plan"}, "fault", "damaged"),
        ({"do": "allocate"}, "out-of-memory", "too little"),
        ({"do": "leave somebody"}, "fault", "code 0"),
    ],
    ids=lambda value: value["do"] if isinstance(value, dict) else "",
)
def test_failures_say_what_happened(store, settings, tmp_path, request_, kind, words):
    job_id = submit(store, **request_, path=str(tmp_path / "pid"))
    work(store, settings)
    check_ends(store, [job_id])
    error = error_of(store, job_id)
    assert error["kind"] == kind
    assert words in error["message"]
    if request_["do"] == "leave somebody":
        pid = next(data["pid"] for name, data in told(store, job_id) if "pid" in data)
        wait_for(lambda: not alive(pid))


def alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_that_takes_too_long_is_ended(tmp_path):
    settings = settings_for(tmp_path, seconds=0.3)
    with opened(settings) as store:
        job_id = submit(store, steps=1000, seconds=0.1)
        work(store, settings)
        assert error_of(store, job_id)["kind"] == "timeout"


def test_a_job_that_takes_too_much_cpu_time_is_ended(tmp_path):
    settings = settings_for(tmp_path, seconds=1.9)  # of CPU time that is 1 s, rounded down
    with opened(settings) as store:
        job_id = submit(store, do="spin")
        work(store, settings)
        assert error_of(store, job_id)["kind"] == "timeout"


@pytest.mark.parametrize(
    ("version", "open_to"), [(-1, "write wherever"), (0, "write wherever"), (3, "may open TCP"), (4, None), (6, None)]
)
def test_a_worker_says_what_its_kernel_does_not_forbid(tmp_path, monkeypatch, caplog, version, open_to):
    monkeypatch.setattr(child, "landlock_version", lambda: version)
    with opened(settings_for(tmp_path)) as store, working(store, settings_for(tmp_path)):
        pass
    told = [record.getMessage() for record in caplog.records if "Landlock" in record.getMessage()]
    assert [open_to in text for text in told] == ([] if open_to is None else [True])


@pytest.mark.skipif(not LINUX, reason="Landlock is Linux's")
def test_what_a_job_may_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HORIZONPLAN_DATABASE_URL", "a secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    settings = settings_for(tmp_path, file_bytes=2**20)
    with opened(settings) as store, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        job_id = submit(store, do="report", path=str(tmp_path / "foreign"), port=port, bytes=2**21)
        work(store, settings)
        found = next(data for _, data in told(store, job_id) if "environment" in data)
    assert "a secret" not in found["environment"].values()
    assert settings.database_url not in found["environment"].values()
    assert found["folder"] == found["environment"]["TMPDIR"] == found["environment"]["HOME"]
    assert not Path(found["folder"]).exists()
    assert found["pid"] == found["group"]
    assert found["umask"] == 0o077
    assert found["no new privileges"] == 1
    assert found["own file"] == "allowed"
    assert found["large file"] == "OSError"
    assert found["foreign file"] == ("PermissionError" if found["confined"] else "allowed")
    assert found["connect"] in (("PermissionError", "allowed") if found["confined"] else ("allowed",))
    assert (tmp_path / "foreign").exists() == (not found["confined"])


def runs_as_nobody(python):
    """Whether the user nobody can run an interpreter as the worker does."""
    try:
        return not subprocess.run([python, "-P", "-c", ""], user="nobody", stderr=subprocess.DEVNULL).returncode
    except (OSError, LookupError):
        return False


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else")
def test_jobs_run_as_another_user(tmp_path, monkeypatch):
    python = next((one for one in (sys.executable, "/usr/bin/python3") if runs_as_nobody(one)), None)
    if python is None:
        pytest.skip("the user nobody can run no Python here")
    monkeypatch.setattr(sys, "executable", python)
    settings = settings_for(tmp_path, user="nobody")
    with opened(settings) as store, TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        program = Path(folder) / "program.py"
        program.write_text(
            "import json, os, sys\n"
            "found = {'user': os.getuid(), 'groups': os.getgroups(), 'folder': os.stat('.').st_uid}\n"
            "os.write(int(sys.argv[1]), json.dumps({'progress': found}).encode() + b'\\n')\n"
        )
        job_id = submit(store)
        work(store, settings, program)
        nobody = pwd.getpwnam("nobody").pw_uid
        assert ("progress", {"user": nobody, "groups": [], "folder": nobody}) in told(store, job_id)


def test_a_process_that_cannot_be_started_fails_the_job(tmp_path):
    settings = settings_for(tmp_path, user="no such user")
    with opened(settings) as store:
        job_id = submit(store)
        work(store, settings)
        assert "no such user" in error_of(store, job_id)["message"]


def test_a_cancelled_job_is_ended(store, settings):
    job_id = submit(store, steps=1000, seconds=0.1)
    with working(store, settings):
        wait_for(lambda: any(kind == "progress" for kind, _ in told(store, job_id)))
        for _ in range(2):
            with store.write() as connection:
                assert queue.cancel(connection, job_id, time.time())
        wait_for(lambda: job(store, job_id).state == "cancelled")
    check_ends(store, [job_id])


def test_a_worker_that_stops_hands_its_job_back(store, settings):
    job_id = submit(store, steps=1000, seconds=0.1)
    with working(store, settings):
        wait_for(lambda: job(store, job_id).state == "running")
    row = job(store, job_id)
    assert (row.state, row.attempts, row.lease_owner) == ("queued", 0, None)
    with store.read() as connection:
        assert queue.last_seen(connection) is None


def test_a_lease_is_renewed_while_its_job_runs(tmp_path):
    settings = settings_for(tmp_path, lease_seconds=0.3)
    with opened(settings) as store:
        job_id = submit(store, steps=10, seconds=0.1)
        with working(store, settings), working(store, settings):  # the other one would take it
            wait_for(lambda: job(store, job_id).state in queue.FINAL)
        assert job(store, job_id).attempts == 1
        check_ends(store, [job_id])


def test_a_job_that_was_taken_away_is_let_go(store, settings):
    """A worker was away for longer than its lease: another one has the job, and this one's result is none."""
    job_id = submit(store, steps=1000, seconds=0.05)
    slow = Worker(store, settings, PROGRAM)
    thread = threading.Thread(target=slow.work, args=(threading.Event(),))
    thread.start()
    wait_for(lambda: job(store, job_id).state == "running")
    with store.write() as connection:
        later = time.time() + 3600
        assert queue.rescue(connection, 2, 60.0, later) == 1
        mine = queue.claim(connection, "another", 60.0, time.time())
    thread.join(20)
    assert not thread.is_alive()
    with store.write() as connection:
        assert queue.succeed(connection, mine, PLAN, time.time())
    check_ends(store, [job_id])


def test_readiness_follows_the_workers(store, settings):
    assert "no worker" in worker.check(store, settings)
    with working(store, settings):
        wait_for(lambda: worker.check(store, settings) is None)
    assert "no worker" in worker.check(store, settings)


def test_a_locked_database_is_waited_for(store, settings, caplog):
    """Somebody else holds the write lock for longer than a worker waits, from before the job's end until after it."""
    job_id = submit(store, steps=3, seconds=0.1)
    with working(store, settings):
        wait_for(lambda: job(store, job_id).state == "running")
        with sqlite3.connect(store.file, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            wait_for(lambda: "waiting to write how it ended" in caplog.text)
            assert job(store, job_id).state == "running"
            other.execute("ROLLBACK")
        other.close()
        wait_for(lambda: job(store, job_id).state == "succeeded")
    check_ends(store, [job_id])
    assert [data["done"] for kind, data in told(store, job_id) if kind == "progress"] == [0, 1, 2]  # none is missing


def test_a_full_disk_fails_the_job_and_stores_no_half(store, settings):
    """A real quota: the database may have so many pages and no more, and the plan does not fit."""
    job_id = submit(store, do="large plan")
    with store.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    store.engine.dispose()
    event.listen(store.engine, "connect", lambda made, _: made.execute(f"PRAGMA max_page_count = {pages + 10}"))
    work(store, settings)
    error = error_of(store, job_id)
    assert error["kind"] == "disk-full"
    assert "disk" in error["message"]
    check_ends(store, [job_id])
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def test_a_disk_without_any_room_is_waited_for(store, settings):
    """Nothing at all can be written for a while, not even that the job failed."""
    job_id = submit(store)
    full = threading.Event()

    def refuse(connection, cursor, statement, *rest):
        if full.is_set() and not statement.startswith(("SELECT", "BEGIN", "PRAGMA")):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

    refused = []
    event.listen(store.engine, "before_cursor_execute", refuse)
    event.listen(store.engine, "handle_error", lambda context: refused.append(context))
    taken = queue.claim

    def claim(*args):
        mine = taken(*args)
        if mine is not None:
            wait_later.start()
        return mine

    wait_later = threading.Timer(0.0, full.set)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "claim", claim)
        with working(store, settings):
            wait_for(lambda: len(refused) > 5)
            assert job(store, job_id).state == "running"
            full.clear()
            wait_for(lambda: job(store, job_id).state in queue.FINAL)
    check_ends(store, [job_id])
    assert error_of(store, job_id)["kind"] == "disk-full"


@pytest.mark.slow
def test_a_real_job_that_needs_too_much(store, settings):
    request = {"architecture": {"kind": "residual-cnn", "channels": [256], "image_size": 256}, "batch_size": 16}
    with store.write() as connection:
        job_id = queue.submit(connection, json.dumps(request), 1, time.time())
    work(store, settings, worker.PROGRAM)
    assert error_of(store, job_id)["kind"] == "out-of-memory"
    assert "512.0 MiB" in error_of(store, job_id)["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [
        {"kind": "GPT2Config", "numbers": {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 50}, "length": 8},
        {"kind": "LlamaConfig", "numbers": DECODER, "length": 8},
        {"kind": "Qwen2Config", "numbers": DECODER, "length": 8},
        {"kind": "BertConfig", "numbers": ENCODER | {"vocab_size": 50}, "length": 8},
        {"kind": "ViTConfig", "numbers": ENCODER | {"image_size": 8, "patch_size": 4}},
        {"kind": "residual-cnn", "channels": [2, 4], "blocks_per_stage": 2, "image_size": 8},
        {"kind": "transformer", "depth": 3, "width": 8},
        {"kind": "character-gpt", "depth": 3, "width": 8, "context": 8},
        {"kind": "registered", "id": "ours"},
    ],
    ids=lambda architecture: architecture["kind"],
)
@pytest.mark.parametrize("device", ["cpu", "simulated:1GiB"])
def test_every_kind_of_job(tmp_path, monkeypatch, architecture, device):
    (tmp_path / "ours.py").write_text(
        "import torch\nfrom horizonplan.models import ResidualMLP\n"
        "def model():\n    return ResidualMLP(4, 8, 3, depth=3)\n"
        "def data():\n    return torch.utils.data.TensorDataset(torch.randn(16, 4), torch.randint(0, 3, (16,))), None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = settings_for(tmp_path, memory_bytes=2**30, models={"ours": {"model": "ours:model", "data": "ours:data"}})
    request = {
        "architecture": architecture,
        "batch_size": 4,
        "device": device,
        "objective": {"kind": "memory", "limit_bytes": 2**30},
        "options": {"batches": 1, "probe_steps": 1},
    }
    with opened(settings) as store:
        asked = JobRequest.model_validate_json(json.dumps(request))
        architectures.check(asked, settings.jobs)
        with store.write() as connection:
            job_id = queue.submit(connection, asked.model_dump_json(), 1, time.time())
        work(store, settings, worker.PROGRAM)
        row = check_ends(store, [job_id])[job_id]
        assert row.state == "succeeded", row.error
        with store.read() as connection:
            plan = json.loads(connection.exec_driver_sql("SELECT data FROM plans").scalar())
    random_data = architecture["kind"] != "registered" and device == "cpu"
    assert (architectures.RANDOM_DATA in plan["notes"]) == random_data


@pytest.mark.slow
def test_a_real_job(store, settings):
    """The whole way: a small network, measured by the real program within the real limits."""
    asked = JobRequest.model_validate_json(json.dumps(TINY))
    architectures.check(asked, settings.jobs)
    with store.write() as connection:
        job_id = queue.submit(connection, asked.model_dump_json(), 1, time.time())
    work(store, settings, worker.PROGRAM)
    row = check_ends(store, [job_id])[job_id]
    assert row.state == "succeeded", row.error
    with store.read() as connection:
        plan = json.loads(connection.exec_driver_sql("SELECT data FROM plans").scalar())
    assert plan["depth"] == 3
    assert plan["notes"][-1] == architectures.RANDOM_DATA
    assert all(row["rate_source"] != "measured" for row in plan["rows"])  # no short runs on random data
    assert told(store, job_id)[2] == ("progress", {"message": "make the model", "done": 0, "total": 4})
