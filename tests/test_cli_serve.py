"""``horizonplan serve`` as a process: it answers, asks for keys beyond this machine, and ends in time."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, closing

import pytest
from api_jobs import TINY
from served import served

from horizonplan.api import queue
from horizonplan.api.database import Database

pytestmark = pytest.mark.slow
ASKED = {"depth": 4, "horizons": [1, 2, 3, 4], "memory_bytes": [1000, 1500, 2000, 2500], "cosine": [0.5, 0.8, 0.95, 1]}


def post(address, path, body):
    """The answer to a POST."""
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.status, json.load(answer)


def database(folder):
    """The database of a service."""
    return Database(f"sqlite:///{folder}/served.sqlite3")


def stop(process):
    """Seconds from a signal to the end."""
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    return time.monotonic() - started


def test_it_answers_and_ends_when_it_is_told_to(tmp_path):
    with served(tmp_path) as (address, process):
        status, plan = post(address, "/v1/plans", ASKED)
        assert (status, plan["depth"]) == (201, 4)
        assert stop(process) <= 5
        assert process.returncode == 0


def followed(stack, address, job_id):
    """A stream of a job's events, of which the first has come."""
    connection = stack.enter_context(closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)))
    connection.request("GET", f"/v1/jobs/{job_id}/events")
    stream = connection.getresponse()
    assert stream.readline().startswith(b"event: queued")
    return stream


def test_it_ends_in_time_with_many_streams_and_a_job_that_runs(tmp_path):
    with served(tmp_path) as (address, process), ExitStack() as stack:
        job = {"architecture": {"kind": "residual-mlp", "depth": 256}, "options": {"batches": 32, "probe_steps": 1000}}
        running, waiting = (post(address, "/v1/jobs", job)[1]["id"] for _ in range(2))
        streams = [followed(stack, address, job_id) for job_id in [running, waiting] * 50]
        while b"event: progress" not in streams[0].readline():
            pass
        assert stop(process) <= 5
        assert all(stream.read() is not None for stream in streams)  # each has an end
        assert "Traceback" not in (tmp_path / "log").read_text()
    with served(tmp_path, HORIZONPLAN_JOBS__WORKERS="0") as (address, _):
        with urllib.request.urlopen(f"{address}/v1/jobs", timeout=10) as answer:
            assert [one["state"] for one in json.load(answer)["items"]] == ["queued", "queued"]  # it was handed back
        assert post(address, "/v1/jobs", TINY)[0] == 202


def test_who_leaves_in_the_midst_of_a_stream_is_no_fault(tmp_path):
    with served(tmp_path, HORIZONPLAN_JOBS__WORKERS="0") as (address, _), closing(database(tmp_path)) as store:
        job_id = post(address, "/v1/jobs", TINY)[1]["id"]
        with store.write() as connection:
            mine = queue.claim(connection, "worker", 600.0, time.time())
            for _ in range(150):
                queue.progress(connection, mine, {"message": "on it"}, time.time())
        for _ in range(100):
            with ExitStack() as stack:
                followed(stack, address, job_id)
        with ExitStack() as stack:
            followed(stack, address, job_id)  # it still answers
    assert "Traceback" not in (tmp_path / "log").read_text()


def run(tmp_path, *words):
    command = [sys.executable, "-m", "horizonplan", "serve", *words]
    changes = {"HORIZONPLAN_DATABASE_URL": f"sqlite:///{tmp_path}/plans.sqlite3", "COLUMNS": "200"}
    return subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, timeout=60)


def test_beyond_this_machine_keys_are_needed(tmp_path):
    refused = run(tmp_path, "--host", "0.0.0.0")
    assert refused.returncode == 1
    assert "requests need keys there, and there is none; --new-key NAME" in refused.stderr
    made = run(tmp_path, "--new-key", "mine")
    assert made.stdout.startswith("hp_")
    again = run(tmp_path, "--new-key", "mine")
    assert again.returncode == 1
    assert "there is a key of that name" in again.stderr
    assert run(tmp_path, "--drop-key", "mine").returncode == 0


def test_a_taken_port_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(tmp_path, "--port", str(port))
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert f"port={port} cannot be listened on" in ended.stderr
