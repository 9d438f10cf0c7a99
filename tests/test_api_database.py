"""The database under strain: locked, full, migrated by several at once; SQLite and a real PostgreSQL."""

import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from postgresql import postgresql
from starlette.testclient import TestClient

from horizonplan.api import Settings, create_app, security
from horizonplan.api.database import Database, metadata, plans

ASKED = {"depth": 4, "horizons": [1, 2, 3, 4], "memory_bytes": [10, 15, 20, 25], "cosine": [0.5, 0.8, 0.95, 1]}
UPGRADE = "import sys; from horizonplan.api.database import Database; Database(sys.argv[1]).upgrade()"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "plans.sqlite3"


def url_of(file):
    return f"sqlite:///{file}"


@pytest.fixture
def client(file):
    with TestClient(create_app(Settings(database_url=url_of(file), busy_seconds=0.2))) as client:
        yield client


def post(client):
    return client.post("/v1/plans", json=ASKED)


def count(database):
    with database.read() as connection:
        return connection.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(plans))


def refused_as(answer, status, kind):
    """Whether an answer is that problem."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == f"urn:horizonplan:{kind}"
    return answer


def test_the_file_is_in_wal_mode_and_flushed(file):
    database = Database(url_of(file))
    with database.read() as connection:
        values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
        values.append(connection.exec_driver_sql("PRAGMA foreign_keys").scalar())
    database.close()
    assert values == ["wal", 2, 1]


def test_somebody_else_s_long_transaction_is_told_and_gone_through_afterwards(client, file):
    assert post(client).status_code == 201
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert refused_as(post(client), 503, "busy").headers["retry-after"] == "1"
    assert len(client.get("/v1/plans").json()["items"]) == 1  # readers do not wait
    other.execute("ROLLBACK")
    other.close()
    assert post(client).status_code == 201
    assert count(client.app.state.database) == 2


def test_writers_of_one_process_take_turns(client):
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: post(client).status_code, range(40)))
    assert statuses == [201] * 40
    assert count(client.app.state.database) == 40


def test_a_writer_that_never_ends_is_told_to_the_others(client):
    database, begun, done = client.app.state.database, threading.Event(), threading.Event()

    def write():
        with database.write():
            begun.set()
            done.wait(10)

    thread = threading.Thread(target=write)
    thread.start()
    begun.wait(10)
    refused_as(post(client), 503, "busy")
    done.set()
    thread.join()
    assert post(client).status_code == 201


def test_a_full_disk_is_told_and_nothing_is_half_written(client):
    database = client.app.state.database
    with database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    database.close()

    def confine(connection, record):
        connection.execute(f"PRAGMA max_page_count = {pages + 8}")  # SQLite then finds its disk full

    sqlalchemy.event.listen(database.engine, "connect", confine)
    statuses = [post(client).status_code for _ in range(40)]
    stored = statuses.index(507)
    assert statuses == [201] * stored + [507] * (40 - stored)
    refused_as(post(client), 507, "full")
    assert count(database) == stored == len(client.get("/v1/plans?limit=100").json()["items"])
    with database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    sqlalchemy.event.remove(database.engine, "connect", confine)
    database.close()
    assert post(client).status_code == 201


def test_a_fault_is_a_problem_without_its_words(client, monkeypatch):
    monkeypatch.setattr("horizonplan.measured.plan_from_measurements", lambda *_, **__: 1 / 0)
    quiet = TestClient(client.app, raise_server_exceptions=False)
    answer = quiet.post("/v1/plans", json=ASKED)
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "division" not in answer.text


def test_tables_are_what_the_migrations_make(file):
    database = Database(url_of(file))
    database.upgrade()
    database.upgrade()
    current, wanted = database.revisions()
    assert current == wanted is not None
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    database.close()


def test_a_database_of_another_version_is_not_ready(client):
    assert client.get("/readyz").json()["checks"]["migrations"] == "ok"
    with client.app.state.database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'older'")
    problem = refused_as(client.get("/readyz"), 503, "not-ready").json()
    assert "revision older" in problem["checks"]["migrations"]
    assert problem["checks"]["database"] == "ok"


def test_too_little_disk_is_not_ready(file):
    settings = Settings(database_url=url_of(file), min_free_bytes=2**62)
    with TestClient(create_app(settings)) as client:
        problem = refused_as(client.get("/readyz"), 503, "not-ready").json()
    assert "free in" in problem["checks"]["disk"]
    assert {name for name, found in problem["checks"].items() if found != "ok"} == {"disk"}


def upgrade_at_once(url, times):
    """Upgrade from several processes at the same time."""
    processes = [subprocess.Popen([sys.executable, "-c", UPGRADE, url], stderr=subprocess.PIPE) for _ in range(times)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


@pytest.mark.slow
def test_several_processes_migrate_one_file(file):
    upgrade_at_once(url_of(file), 3)
    database = Database(url_of(file))
    current, wanted = database.revisions()
    database.close()
    assert current == wanted


@pytest.mark.slow
def test_postgresql_keeps_plans_and_keys():
    with postgresql() as (url, crash):
        upgrade_at_once(url, 3)
        with TestClient(create_app(Settings(database_url=url, busy_seconds=1.0))) as client:
            plans_are_kept(client)
            keys_are_kept(client.app.state.database)
            lock_and_write(client, client.app.state.database)
            crash()
            refused_as(post(client), 503, "busy")
            assert client.get("/readyz").json()["checks"]["database"] != "ok"


def plans_are_kept(client):
    """The tables are as they should be; plans are made at once, read, judged anew and listed."""
    with client.app.state.database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    assert client.get("/readyz").status_code == 200
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(client), range(24)))
    assert [answer.status_code for answer in answers] == [201] * 24
    first = answers[0].json()
    assert client.get(f"/v1/plans/{first['id']}").json() == first
    asked = {"objective": {"kind": "weighted", "lam": 1}}
    assert client.post(f"/v1/plans/{first['id']}/replan", json=asked).json()["parent"] == first["id"]
    page = client.get("/v1/plans?limit=20").json()
    rest = client.get("/v1/plans", params={"limit": 20, "cursor": page["next_cursor"]}).json()
    assert len({item["id"] for item in page["items"] + rest["items"]}) == 25
    assert client.get("/v1/plans/%00").status_code == 404  # PostgreSQL knows no NUL in a text


def keys_are_kept(database):
    """A key is known, and its name is taken."""
    key = security.new_key(database, "mine")
    with pytest.raises(ValueError, match="there is a key of that name"):
        security.new_key(database, "mine")
    assert security.is_key(database, key)


def lock_and_write(client, database):
    """A table that somebody else holds is told in time, and written to afterwards."""
    with database.engine.connect() as other:
        other.exec_driver_sql("LOCK TABLE plans IN EXCLUSIVE MODE")
        started = time.monotonic()
        refused_as(post(client), 503, "busy")
        assert time.monotonic() - started < 10
        other.rollback()
    assert post(client).status_code == 201
