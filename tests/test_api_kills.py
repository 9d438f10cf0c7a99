"""``kill -9`` of workers, servers and jobs' processes: every accepted job ends once all the same."""

import json
import os
import random
import signal
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from api_jobs import TINY, check_ends, job, opened, settings_for, submit, told, wait_for, working
from served import free_port, start
from sqlalchemy import select
from worker_process import worker_process

from horizonplan.api import database, queue
from horizonplan.api.database import Database

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")]


def children(pid):
    """Processes that a process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def ended(store, job_id):
    """Whether a job has ended."""
    return job(store, job_id).state in queue.FINAL


def test_a_killed_worker_leaves_nothing_and_its_job_is_run_again(tmp_path):
    settings = settings_for(tmp_path, lease_seconds=0.5)
    with opened(settings) as store:
        job_id = submit(store, steps=20, seconds=0.05)
        with worker_process(settings) as worker:
            wait_for(lambda: any(kind == "progress" for kind, _ in told(store, job_id)))
            [child] = children(worker.pid)
            folder = Path(f"/proc/{child}/cwd").readlink()
            assert folder.is_dir()
            worker.kill()
            worker.join()
        wait_for(lambda: not Path(f"/proc/{child}").exists())
        assert not folder.exists()
        with working(store, settings):
            wait_for(lambda: ended(store, job_id))
        row = check_ends(store, [job_id])[job_id]
        assert (row.state, row.attempts) == ("succeeded", 2)
        assert ("requeued", {"reason": "its worker was lost"}) in told(store, job_id)


@pytest.mark.parametrize("cancel", [False, True], ids=["", "cancelled"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_transaction(tmp_path, when, cancel):
    """A worker dies before its first commit, or after it; the next at its second, ...; until one does not live so long.

    A job is cancelled as soon as it runs, or its worker died before it did.
    """
    settings = settings_for(tmp_path, lease_seconds=0.6)
    jobs, states, died = [], set(), True
    with opened(settings) as store:
        while died:
            jobs.append(submit(store, steps=2, seconds=0.2))
            with worker_process(settings, f"{when} {len(jobs)}") as worker:
                died = follow(store, jobs[-1], worker, cancel)
            states.add(job(store, jobs[-1]).state)
            with working(store, settings):
                wait_for(lambda: ended(store, jobs[-1]))
        rows = check_ends(store, jobs)
    assert len(jobs) > 4
    end = "cancelled" if cancel else "succeeded"
    assert states == {"running", end} | (set() if cancel else {"queued"})  # in these a worker died
    assert {row.state for row in rows.values()} == {end}


def follow(store, job_id, worker, cancel):
    """Wait until a job has ended, or its worker has died; whether it has, soon."""
    if cancel:
        wait_for(lambda: job(store, job_id).state == "running" or not worker.is_alive())
        with store.write() as connection:
            queue.cancel(connection, job_id, time.time())
    wait_for(lambda: ended(store, job_id) or not worker.is_alive())
    worker.join(0.5)
    return not worker.is_alive()


class Service:
    """``horizonplan serve`` with a worker, killed and started again."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        jobs = {"lease_seconds": 1.0, "poll_seconds": 0.1, "requeues": 100, "max_queued": 1000}
        self.environment = {"HORIZONPLAN_JOBS": json.dumps(jobs), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        self.store = Database(f"sqlite:///{folder}/served.sqlite3")
        self.start()

    def start(self):
        self.server = start(self.folder, self.port, **self.environment)

    def ask(self, path, body=None):
        """An answer's JSON; ``None``: the server is away."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        request.add_header("content-type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    def kill(self, what):
        """Kill the server, its worker, or the process of the worker's job, if there is one."""
        workers = children(self.server.pid)
        victims = {
            "server": [self.server.pid],
            "worker": workers,
            "job": [child for worker in workers for child in children(worker)],
            "server and worker": [self.server.pid, *workers],
        }[what]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.server.pid in victims:
            self.server.wait()

    def alive(self):
        return self.server.poll() is None

    def close(self):
        self.server.terminate()
        self.server.wait(10)
        self.store.close()


def states(store):
    with store.read() as connection:
        return dict(connection.execute(select(database.jobs.c.id, database.jobs.c.state)).all())


def somebody_works(store):
    """Whether a job is held by a worker that is not known to be lost."""
    with store.read() as connection:
        held = select(database.jobs.c.id).where(database.jobs.c.lease_expires > time.time())
        return connection.execute(held).first() is not None


def test_twelve_kills_at_random_moments(tmp_path):
    """Real jobs, measured within limits. A job takes about three seconds, a restart as long; at most of the moments
    a job runs.
    """
    chance = random.Random(0)
    service = Service(tmp_path)
    accepted, cancels = [], []
    try:
        for _ in range(12):
            made = service.ask("/v1/jobs", TINY | {"seed": len(accepted)})
            accepted.append(made["id"])
            if chance.random() < 0.7:
                wait_for(lambda: somebody_works(service.store), seconds=60)
            time.sleep(chance.uniform(0, 2))
            if chance.random() < 0.2 and service.ask(f"/v1/jobs/{accepted[-1]}/cancel", {}) is not None:
                cancels.append(accepted[-1])
            service.kill(chance.choice(["server", "worker", "job", "server and worker"]))
            if not service.alive():
                service.start()
        wait_for(lambda: set(states(service.store).values()) <= queue.FINAL, seconds=400)
        rows = check_ends(service.store, accepted)
        for job_id, row in rows.items():
            allowed = {"cancelled", "succeeded"} if job_id in cancels else {"succeeded"}
            killed = row.state == "failed" and json.loads(row.error)["kind"] == "killed"
            assert row.state in allowed or killed, row
            if row.plan_id:
                assert service.ask(f"/v1/plans/{row.plan_id}")["depth"] == 3
        met = [kind for job_id in accepted for kind, _ in told(service.store, job_id) if kind in ("requeued", "failed")]
        assert len(met) >= 4  # the kills did meet jobs
    finally:
        service.close()


def test_serve_runs_jobs_and_is_ready(tmp_path):
    service = Service(tmp_path)
    try:
        wait_for(lambda: service.ask("/readyz") is not None)
        assert service.ask("/readyz")["checks"]["worker"] == "ok"
        made = service.ask("/v1/jobs", TINY)
        stream = urllib.request.urlopen(f"http://127.0.0.1:{service.port}/v1/jobs/{made['id']}/events", timeout=60)
        with stream:
            assert b"event: succeeded" in stream.read()
        made = service.ask("/v1/jobs", TINY)
        wait_for(lambda: states(service.store)[made["id"]] == "running")
        started = time.monotonic()
    finally:
        service.close()
    assert time.monotonic() - started <= 5
    service.store = Database(f"sqlite:///{tmp_path}/served.sqlite3")
    assert states(service.store)[made["id"]] == "queued"  # handed back
    service.store.close()
