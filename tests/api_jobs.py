"""What the tests of jobs share: databases with a queue, workers with a program that stands in for the measuring."""

import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import select

from horizonplan import measured
from horizonplan.api import Settings, database, queue
from horizonplan.api.database import Database
from horizonplan.api.worker import Worker

PROGRAM = Path(__file__).with_name("job_program.py")
PLAN = measured.plan_from_measurements(4, [1, 2, 3, 4], [10, 20, 30, 40], [1 - (1 - h / 4) ** 3 for h in (1, 2, 3, 4)])
TINY = {  # measured for real in about a second, and about as much for the imports
    "architecture": {"kind": "residual-mlp", "in_features": 4, "width": 8, "classes": 3, "depth": 3},
    "batch_size": 4,
    "objective": {"kind": "weighted", "lam": 0.5},
    "options": {"batches": 1, "probe_steps": 0},
}


def settings_for(folder, **jobs):
    """Settings with a database in a folder, and short times."""
    return Settings(
        database_url=f"sqlite:///{folder}/jobs.sqlite3",
        busy_seconds=jobs.pop("busy_seconds", 0.3),
        jobs={"poll_seconds": 0.05, "lease_seconds": 5.0, "memory_bytes": 2**29, **jobs},
    )


@contextmanager
def opened(settings):
    """The database of settings, with its tables."""
    store = Database(settings.database_url, settings.busy_seconds)
    store.upgrade()
    try:
        yield store
    finally:
        store.close()


def submit(store, **request):
    """Queue a job for the program that stands in; what it does not know of is a plan."""
    request = {"do": "plan", "plan": PLAN.to_dict(), **request}
    with store.write() as connection:
        return queue.submit(connection, json.dumps(request), 1000, time.time())


def job(store, job_id):
    with store.read() as connection:
        return queue.find(connection, job_id)


def error_of(store, job_id):
    row = job(store, job_id)
    assert row.state == "failed", row
    return json.loads(row.error)


def told(store, job_id):
    """A job's events: kinds and data."""
    with store.read() as connection:
        return [(event.kind, json.loads(event.data)) for event in queue.events(connection, job_id, 0)]


def check_ends(store, job_ids):
    """Every job has ended, once; and there are as many plans as jobs that succeeded."""
    with store.read() as connection:
        rows = connection.execute(select(database.jobs)).all()
        plans = connection.scalars(select(database.plans.c.id)).all()
        kinds = {row.id: [event.kind for event in queue.events(connection, row.id, 0)] for row in rows}
    assert {row.id for row in rows} == set(job_ids)
    for row in rows:
        assert [kind for kind in kinds[row.id] if kind in queue.FINAL] == [row.state], kinds[row.id]
    assert sorted(plans) == sorted(row.plan_id for row in rows if row.state == "succeeded")
    return {row.id: row for row in rows}


def wait_for(found, seconds=20.0):
    """The first true value of a function."""
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
    return value


@contextmanager
def working(store, settings, program=PROGRAM):
    """A worker in a thread; stopped at the end, which hands its job back."""
    stop = threading.Event()
    worker = Worker(store, settings, program)
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    try:
        yield worker
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
