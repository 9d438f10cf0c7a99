"""``horizonplan serve`` as a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(address):
    """Whether a service answers there."""
    try:
        urllib.request.urlopen(f"{address}/livez", timeout=5).close()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def start(folder, port, **environment):
    """A service on a SQLite file in a folder, once it answers; what it prints is in the folder's ``log``."""
    command = [sys.executable, "-m", "horizonplan", "serve", "--port", str(port)]
    url = {"HORIZONPLAN_DATABASE_URL": f"sqlite:///{folder}/served.sqlite3"}
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, env=os.environ | url | environment, stdout=log, stderr=log)
    until = time.monotonic() + 60
    while not answers(f"http://127.0.0.1:{port}"):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < until, (folder / "log").read_text()
        time.sleep(0.05)
    return process


@contextmanager
def served(folder, **environment):
    """Address and process of a service, which has ended afterwards."""
    port = free_port()
    process = start(folder, port, **environment)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
