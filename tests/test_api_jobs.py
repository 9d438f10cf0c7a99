"""Jobs over HTTP: what is refused, what is answered, streams of events."""

import http.client
import json
import sqlite3
import threading
import time
from contextlib import closing, contextmanager
from itertools import pairwise

import pytest
import uvicorn
from api_jobs import PLAN, TINY, opened, settings_for, wait_for
from sqlalchemy import event, func, select
from starlette.testclient import TestClient

from horizonplan.api import create_app, database, jobs, queue
from horizonplan.api.server import Server

BERT = {"kind": "BertConfig"}
ONE_BLOCK = "architecture.blocks_per_stage"
NUMBERS = "architecture.numbers"


@pytest.fixture
def app(tmp_path):
    return create_app(settings_for(tmp_path, max_queued=20, models={"ours": {"model": "a:model", "data": "a.b:data"}}))


@pytest.fixture
def client(app):
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def asked(**changes):
    """The tiny job, changed: ``architecture__depth=2`` changes a part of it."""
    made = json.loads(json.dumps(TINY))
    for name, value in changes.items():
        *path, last = name.split("__")
        place = made
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return made


def end(app, job_id, how=queue.succeed, *args):
    """Do what a worker does, without the work."""
    with app.state.database.write() as connection:
        mine = queue.claim(connection, "worker", 60.0, time.time())
        assert mine.job_id == job_id
        queue.progress(connection, mine, {"message": "profile", "done": 0, "total": 4}, time.time())
        how(connection, mine, *(args or (PLAN,)), time.time())


def test_a_job_from_its_submission_to_its_plan(app, client):
    answer = client.post("/v1/jobs", json=TINY)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["plan_id"], job["error"], job["attempts"]) == ("queued", None, None, 0)
    assert job["request"]["architecture"] == TINY["architecture"]
    assert client.get(answer.headers["location"]).json() == job
    end(app, job["id"])
    job = client.get(answer.headers["location"]).json()
    assert job["state"] == "succeeded"
    assert client.get(f"/v1/plans/{job['plan_id']}").json()["depth"] == PLAN.depth


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architecture": {"kind": "pickle", "url": "http://localhost/"}}, "architecture"),
        ({"architecture": {"kind": "residual-mlp", "code": "import os"}}, "architecture.code"),
        ({"architecture__depth": 257}, "architecture.depth"),
        ({"architecture__depth": "3"}, "architecture.depth"),
        ({"architecture__depth": 1e400}, "architecture.depth"),
        ({"architecture__width": 0}, "architecture.width"),
        ({"architecture__width": -8}, "architecture.width"),
        ({"architecture__width": 2.5}, "architecture.width"),
        ({"architecture__width": 16_384, "architecture__depth": 256}, "architecture"),  # 7e10 parameters
        ({"architecture": {"kind": "transformer", "width": 10, "heads": 4}}, "architecture.heads"),
        ({"architecture": {"kind": "character-gpt", "width": 10, "heads": 4}}, "architecture.heads"),
        ({"architecture": {"kind": "residual-cnn", "channels": [8, 4]}}, "architecture.channels"),
        (
            {"architecture": {"kind": "residual-cnn", "channels": [8], "blocks_per_stage": 1}},
            "architecture.blocks_per_stage",
        ),
        ({"architecture": {"kind": "registered", "id": "theirs"}}, "architecture.id"),
        ({"architecture": {"kind": "registered", "id": "os:system"}}, "architecture.id"),
        ({"architecture": {"kind": "AutoConfig"}}, "architecture"),
        (
            {"architecture": BERT | {"numbers": {"name_or_path": "x"}}},
            f"{NUMBERS}.name_or_path",
        ),
        (
            {"architecture": BERT | {"numbers": {"hidden_size": "64"}}},
            f"{NUMBERS}.hidden_size",
        ),
        ({"architecture": BERT | {"numbers": {"hidden_size": 30}}}, "architecture.numbers.num_attention_heads"),
        ({"architecture": BERT | {"length": 513}}, "architecture.length"),
        ({"batch_size": 65_536, "architecture__in_features": 65_536}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"objective__lam": float("nan")}, "objective.lam"),
        ({"device": "cuda"}, "device"),
        ({"device": "simulated:24GiB"}, "objective.kind"),
        ({"seed": -1}, "seed"),
        ({"options__horizons": [1, 2, 1]}, "options.horizons"),
        ({"options__rollout_steps": 501}, "options.rollout_steps"),
        ({"options__probe_steps": float("inf")}, "options.probe_steps"),
        ({"options__batches": True}, "options.batches"),
    ],
    ids=str,
)
def test_what_is_refused_is_named(client, changes, field):
    answer = client.post("/v1/jobs", content=json.dumps(asked(**changes)), headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    if answer.status_code == 422:
        assert field in [error["field"] for error in answer.json()["errors"]]
    else:  # JSON has no such number
        assert any(isinstance(value, float) for value in changes.values())
    assert client.get("/v1/jobs").json()["items"] == []


def test_files_are_not_accepted(client):
    for kind in ("application/octet-stream", "multipart/form-data", "application/x-python"):
        assert client.post("/v1/jobs", content=b"\x80\x04.", headers={"content-type": kind}).status_code == 415


@pytest.mark.parametrize(
    "architecture",
    [
        {"kind": "residual-mlp"},
        {"kind": "residual-cnn"},
        {"kind": "transformer"},
        {"kind": "character-gpt"},
        {"kind": "GPT2Config", "numbers": {"n_layer": 4, "attn_pdrop": 0.0}},
        {"kind": "LlamaConfig"},
        {"kind": "Qwen2Config", "numbers": {"hidden_size": 64}},
        {"kind": "BertConfig"},
        {"kind": "ViTConfig"},
        {"kind": "registered", "id": "ours"},
    ],
    ids=lambda architecture: architecture["kind"],
)
def test_what_is_accepted(client, architecture):
    answer = client.post("/v1/jobs", json={"architecture": architecture})
    assert answer.status_code == 202, answer.text


def test_a_full_queue_takes_no_more(client):
    answers = [client.post("/v1/jobs", json=TINY) for _ in range(21)]
    assert [answer.status_code for answer in answers] == [202] * 20 + [429]
    assert int(answers[-1].headers["retry-after"]) > 0


def test_lists_go_on_where_they_were(app, client):
    ids = [client.post("/v1/jobs", json=asked(seed=seed)).json()["id"] for seed in range(5)]
    end(app, ids[0])
    first = client.get("/v1/jobs", params={"limit": 2}).json()
    client.post("/v1/jobs", json=TINY)
    second = client.get("/v1/jobs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    last = client.get("/v1/jobs", params={"limit": 2, "cursor": second["next_cursor"]}).json()
    found = [job["id"] for part in (first, second, last) for job in part["items"]]
    assert found == ids[::-1]
    assert last["next_cursor"] is None
    assert [job["id"] for job in client.get("/v1/jobs", params={"state": "succeeded"}).json()["items"]] == ids[:1]
    for cursor in ("", "x", first["next_cursor"] + "A", "job-0", "job--1", "plan-1"):
        assert client.get("/v1/jobs", params={"cursor": cursor}).status_code == 422


def test_cancelling_again_changes_nothing(app, client):
    place = client.post("/v1/jobs", json=TINY).headers["location"]
    first = client.post(f"{place}/cancel")
    assert (first.status_code, first.json()["state"]) == (200, "cancelled")
    assert client.post(f"{place}/cancel").json() == first.json()
    job_id = client.post("/v1/jobs", json=TINY).json()["id"]
    end(app, job_id)
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "succeeded"
    for path in ("/v1/jobs/nowhere", "/v1/jobs/%00", "/v1/jobs/nowhere/events"):
        assert client.get(path).status_code == 404
    assert client.post("/v1/jobs/nowhere/cancel").status_code == 404


def test_a_cancelled_running_job_never_succeeds(app, client):
    """Once a cancel was answered the job ends as cancelled, even if its plan comes before the worker has looked."""
    job_id = client.post("/v1/jobs", json=TINY).json()["id"]
    with app.state.database.write() as connection:
        mine = queue.claim(connection, "worker", 60.0, time.time())
    answer = client.post(f"/v1/jobs/{job_id}/cancel").json()
    assert (answer["state"], answer["cancel_requested"]) == ("running", True)
    with app.state.database.write() as connection:
        assert queue.succeed(connection, mine, PLAN, time.time())
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["plan_id"]) == ("cancelled", None)
    assert client.get("/v1/plans").json()["items"] == []


def test_a_locked_database_is_a_problem_and_stores_nothing(app, client):
    with closing(sqlite3.connect(app.state.database.file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = client.post("/v1/jobs", json=TINY)
        other.execute("ROLLBACK")
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) > 0
    assert client.get("/v1/jobs").json()["items"] == []
    assert client.post("/v1/jobs", json=TINY).status_code == 202


def test_a_full_disk_is_a_problem_and_stores_nothing(app, client):
    """Whichever statement of a submission finds the disk full, none of it is stored."""
    store = app.state.database
    for number in range(3):
        count = iter(range(1000))

        def refuse(connection, cursor, statement, *rest, count=count, number=number):
            if statement.startswith(("INSERT", "UPDATE")) and next(count) == number:
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error

        event.listen(store.engine, "before_cursor_execute", refuse)
        answer = client.post("/v1/jobs", json=TINY)
        event.remove(store.engine, "before_cursor_execute", refuse)
        if answer.status_code == 202:
            break
        assert answer.status_code == 507, answer.text
        assert answer.json()["type"] == "urn:horizonplan:full"
        with store.read() as connection:
            for table in (database.jobs, database.job_events):
                assert connection.scalar(select(func.count()).select_from(table)) == 0
    assert number == 2  # a job and its event: two statements


def test_a_real_quota_is_a_problem(app, client):
    store = app.state.database
    with store.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    store.engine.dispose()
    event.listen(store.engine, "connect", lambda made, _: made.execute(f"PRAGMA max_page_count = {pages + 1}"))
    answers = []
    while not answers or answers[-1].status_code == 202:
        answers.append(client.post("/v1/jobs", json=asked(options={"horizons": list(range(1, 33))})))
    assert answers[-1].status_code == 507
    kept = client.get("/v1/jobs", params={"limit": 100}).json()["items"]
    assert [job["id"] for job in kept[::-1]] == [answer.json()["id"] for answer in answers[:-1]]


def parsed(text):
    """Id, event and data of each event in a stream."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


def test_events_of_a_job_that_has_ended(app, client):
    job_id = client.post("/v1/jobs", json=TINY).json()["id"]
    end(app, job_id, queue.fail, queue.Failure("infeasible", "nothing fits"))
    answer = client.get(f"/v1/jobs/{job_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = parsed(answer.text)
    assert [(number, kind) for number, kind, _ in events] == [
        (1, "queued"),
        (2, "running"),
        (3, "progress"),
        (4, "failed"),
    ]
    assert events[-1][2]["error"] == {"kind": "infeasible", "message": "nothing fits"}
    assert all(earlier[2]["time"] <= later[2]["time"] for earlier, later in pairwise(events))
    for last in range(1, 5):  # as a browser does after its connection broke
        rest = client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(last)})
        assert parsed(rest.text) == events[last:]
    for wrong in ("x", "-1", str(2**31)):
        assert client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": wrong}).status_code == 422


@contextmanager
def served(app):
    """The application on a port of this machine; at the end it is told to stop as a signal does."""
    server = Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def followed(port, job_id, after=None):
    """An open stream of events."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    connection.request("GET", f"/v1/jobs/{job_id}/events", headers=headers)
    answer = connection.getresponse()
    assert answer.status == 200
    try:
        yield answer
    finally:
        connection.close()


def next_kind(stream):
    """The kind of a stream's next event; empty at its end."""
    lines = []
    while line := stream.readline().decode().strip():
        lines.append(line)
    return next((line.removeprefix("event: ") for line in lines if line.startswith("event: ")), "")


def test_events_come_while_they_happen(app, tmp_path):
    with opened(app.state.settings) as store, served(app) as (port, _):
        with store.write() as connection:
            job_id = queue.submit(connection, json.dumps(TINY), 1, time.time())
        with followed(port, job_id) as stream:
            assert next_kind(stream) == "queued"
            with store.write() as connection:
                mine = queue.claim(connection, "worker", 60.0, time.time())
            assert next_kind(stream) == "running"
            with store.write() as connection:
                queue.progress(connection, mine, {"message": "on it"}, time.time())
            assert next_kind(stream) == "progress"
        with followed(port, job_id, after=3) as stream:
            with store.write() as connection:
                queue.succeed(connection, mine, PLAN, time.time())
            assert next_kind(stream) == "succeeded"
            assert stream.read() == b""  # it ends with the job


def test_a_stream_without_events_says_that_it_is_there(app, monkeypatch):
    monkeypatch.setattr(jobs, "_SILENT_SECONDS", 0.05)
    with opened(app.state.settings) as store, served(app) as (port, _):
        with store.write() as connection:
            job_id = queue.submit(connection, json.dumps(TINY), 1, time.time())
        with followed(port, job_id) as stream:
            assert next_kind(stream) == "queued"
            assert stream.readline().startswith(b":")


def test_many_streams_hold_no_connections_and_end_with_the_server(app):
    """Sixty people watch a job that does not move: more than the database has connections."""
    pool = app.state.database.engine.pool
    with opened(app.state.settings) as store:
        with store.write() as connection:
            job_id = queue.submit(connection, json.dumps(TINY), 1, time.time())
        streams = []
        with served(app) as (port, server):
            for _ in range(60):
                stream = followed(port, job_id)
                streams.append((stream, stream.__enter__()))
            assert all(next_kind(stream) == "queued" for _, stream in streams)
            held = []
            for _ in range(20):
                time.sleep(0.01)
                held.append(pool.checkedout())
            assert max(held) <= 1  # that of the one look into the database
            server.should_exit = True
            assert all(stream.read() == b"" for _, stream in streams)
        for stream, _ in streams:
            stream.__exit__(None, None, None)
