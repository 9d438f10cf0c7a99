"""``horizonplan serve`` as a process: it answers, asks for keys beyond this machine, and ends in time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest


def environment(tmp_path):
    return os.environ | {"HORIZONPLAN_DATABASE_URL": f"sqlite:///{tmp_path}/plans.sqlite3", "COLUMNS": "200"}


def run(tmp_path, *words):
    command = [sys.executable, "-m", "horizonplan", "serve", *words]
    return subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=60)


@pytest.fixture
def server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "horizonplan", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{address}/livez", timeout=5).close()
            break
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
    yield address, process
    process.kill()
    process.communicate()


def test_it_answers_and_ends_when_it_is_told_to(server):
    address, process = server
    asked = {
        "depth": 4,
        "horizons": [1, 2, 3, 4],
        "memory_bytes": [1000, 1500, 2000, 2500],
        "cosine": [0.5, 0.8, 0.95, 1],
    }
    request = urllib.request.Request(
        f"{address}/v1/plans", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 201
        assert json.load(answer)["depth"] == 4
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    assert time.monotonic() - started <= 5


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
