"""What ``POST /v1/plans`` of ``horizonplan serve`` takes, beside a bare FastAPI echo in the same run, over loopback.

    OMP_NUM_THREADS=1 python benchmarks/service.py            # some two minutes

Three servers, each a process of its own: the service as it is started by hand (SQLite in a new folder, each plan
flushed to the disk before the answer), and two FastAPI applications of one route that answer with the body they got:
one with `async def`, one with `def`, whose handler runs in a thread as the service's do. The load is made by wrk where
it is installed, else by asyncio streams in this process; the first line says which. Each connection sends its next
request when the last is answered. The servers are loaded in turn, ROUNDS times at each number of connections; a cell
is over all rounds: the percentiles are medians over the rounds, errors are summed. An error is an answer other than
2xx, or none.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

CONNECTIONS, SECONDS, ROUNDS, WARM_SECONDS = (1, 8, 32), 4, 3, 2
HORIZONS = [1, 3, 6, 9, 12]
BODY = json.dumps(
    {
        "depth": 12,
        "horizons": HORIZONS,
        "memory_bytes": [10**9 * (2 + h) for h in HORIZONS],
        "cosine": [round(1 - (1 - h / 12) ** 3, 4) for h in HORIZONS],
        "objective": {"kind": "accuracy", "epsilon": 0.1},
        "cost": {"kind": "linear", "unit_cost": 1.0, "node_memory_bytes": 24 * 10**9},
    }
)
ECHO = """
import sys
from typing import Any
import uvicorn
from fastapi import Body, FastAPI

app = FastAPI()

@app.post("/v1/plans")
{word} echo(body: dict[str, Any] = Body()) -> dict[str, Any]:
    return body

uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning")
"""
LUA = """
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
wrk.body = [==[%s]==]
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("RESULT %%d %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(95), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Load:
    """What one load of one server came to; times in milliseconds."""

    rate: float
    errors: int
    p50: float
    p95: float
    p99: float


def by_wrk(port: int, connections: int, seconds: int) -> Load:
    """A load by wrk."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(LUA % BODY)
        script.flush()
        words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", script.name]
        done = subprocess.run([*words, f"http://127.0.0.1:{port}/v1/plans"], capture_output=True, text=True, check=True)
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    assert found, done.stdout
    count, took, errors, *percentiles = map(int, found.groups())
    return Load(count / took * 1e6, errors, *(value / 1000 for value in percentiles))


async def _connection(port: int, end: float, times: list[float], errors: list[str]) -> None:
    """One connection's requests, one after the other; it is opened anew after an error."""
    head = "POST /v1/plans HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
    request = f"{head}{len(BODY)}\r\n\r\n{BODY}".encode()
    writer = None
    while time.perf_counter() < end:
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            start = time.perf_counter()
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
            assert length, answer
            await reader.readexactly(int(length[1]))
            times.append(time.perf_counter() - start)
            if not answer.startswith(b"HTTP/1.1 2"):
                errors.append(answer.decode("latin-1").splitlines()[0])
        except (OSError, asyncio.IncompleteReadError) as error:
            errors.append(type(error).__name__)
            writer = None
    if writer is not None:
        writer.close()


def by_asyncio(port: int, connections: int, seconds: int) -> Load:
    """A load by asyncio streams."""
    times: list[float] = []
    errors: list[str] = []

    async def load() -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(_connection(port, end, times, errors) for _ in range(connections)))

    start = time.perf_counter()
    asyncio.run(load())
    cuts = [1000 * value for value in statistics.quantiles(times, n=100, method="inclusive")]
    return Load(len(times) / (time.perf_counter() - start), len(errors), cuts[49], cuts[94], cuts[98])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def started(words: list[str], port: int, folder: Path) -> subprocess.Popen[bytes]:
    """A server's process, once it answers."""
    changes = {"HORIZONPLAN_DATABASE_URL": f"sqlite:///{folder}/plans.sqlite3", "HORIZONPLAN_PORT": str(port)}
    with (folder / f"{port}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *words], env=os.environ | changes, stdout=log, stderr=log)
    for _ in range(600):
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/plans", BODY.encode())
            request.add_header("content-type", "application/json")
            urllib.request.urlopen(request, timeout=10).close()
            return process
        except OSError:
            assert process.poll() is None, (folder / f"{port}.log").read_text()
            time.sleep(0.1)
    raise TimeoutError(f"{words} does not answer")


def table(loads: dict[tuple[str, int], list[Load]]) -> str:
    """The results, a line for each server and number of connections."""
    lines = [
        "| server | connections | requests/s | p50 ms | p95 ms | p99 ms | errors |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, connections), found in loads.items():
        rate, p50, p95, p99 = (
            statistics.median(getattr(load, field) for load in found) for field in ("rate", "p50", "p95", "p99")
        )
        errors = sum(load.errors for load in found)
        lines.append(f"| {name} | {connections} | {rate:.0f} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {errors} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    measure = by_wrk if shutil.which("wrk") else by_asyncio
    print(f"load by {'wrk' if measure is by_wrk else 'asyncio streams'}, {os.cpu_count()} CPUs shared with the servers")
    print(textwrap.dedent(f"{ROUNDS} rounds of {SECONDS} s; bodies of {len(BODY)} bytes"), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, ports, processes = Path(name), {}, []
        try:
            for server, words in {
                "POST /v1/plans": ["-m", "horizonplan", "serve"],
                "echo, async def": ["-c", ECHO.format(word="async def")],
                "echo, def": ["-c", ECHO.format(word="def")],
            }.items():
                ports[server] = free_port()
                processes.append(started([*words, *([str(ports[server])] * ("-c" in words))], ports[server], folder))
            loads: dict[tuple[str, int], list[Load]] = {(s, c): [] for c in CONNECTIONS for s in ports}
            for port in ports.values():
                measure(port, 8, WARM_SECONDS)
            for _ in range(ROUNDS):
                for server, connections in loads:
                    loads[server, connections].append(measure(ports[server], connections, SECONDS))
        finally:
            for process in processes:
                process.terminate()
                process.wait(timeout=30)
    print(table(loads))


if __name__ == "__main__":
    main()
