"""Stands in for a job's process, in milliseconds: does what its request says, behind the real limits.

The request is ``{"do": ..., ...}``, see ACTIONS; the limits are those of horizonplan/api/child.py, loaded by its path,
so that nothing large is imported.
"""

import ctypes
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

CHILD = Path(__file__).parents[1] / "horizonplan" / "api" / "child.py"
spec = importlib.util.spec_from_file_location("child", CHILD)
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)

answer, lifeline = map(int, sys.argv[1:])
letter = json.load(sys.stdin)
request = json.loads(letter["request"])
child.limit(letter["limits"])
for number in (answer, lifeline):
    os.set_inheritable(number, False)
Thread(target=child._end_with, args=(lifeline, os.environ["TMPDIR"]), daemon=True).start()
confined = child.confine(os.environ["TMPDIR"])
told = os.fdopen(answer, "w")


def say(**record):
    told.write(json.dumps(record) + "\n")
    told.flush()


def attempt(function):
    """What a function is refused with, in words."""
    try:
        function()
    except OSError as error:
        return type(error).__name__
    return "allowed"


def own_file():
    Path("of its own").write_text("text")


def foreign_file():
    Path(request["path"]).write_text("text")


def connect():
    socket.create_connection(("127.0.0.1", request["port"]), timeout=1).close()


def large_file():
    Path("large").write_bytes(bytes(request["bytes"]))


def allocate():
    kept = []
    while True:
        kept.append(bytearray(2**24))


def spin():
    while True:
        pass


def leave_somebody():
    """A grandchild that keeps the pipe open, and says who it is."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[answer])
    Path(request["path"]).write_text(str(started.pid)) if not confined else say(progress={"pid": started.pid})


def report():
    say(
        progress={
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "pid": os.getpid(),
            "group": os.getpgid(0),
            "umask": os.umask(0o077),
            "confined": confined,
            "own file": attempt(own_file),
            "foreign file": attempt(foreign_file),
            "connect": attempt(connect),
            "large file": attempt(large_file),
            "no new privileges": ctypes.CDLL(None).prctl(39, 0, 0, 0, 0),
        }
    )


ACTIONS = {
    "plan": lambda: say(plan=request["plan"]),
    "large plan": lambda: say(plan=request["plan"] | {"notes": ["long" * 100_000]}),
    "error": lambda: say(error=request["error"]),
    "report": report,
    "nothing": lambda: None,
    "leave": lambda: os._exit(3),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "allocate": allocate,
    "spin": spin,
    "leave somebody": leave_somebody,
    "garbage": lambda: told.write("this is no JSON\n"),
    "flood": lambda: told.write("x" * (40 * 2**20)),
    "no plan": lambda: say(plan={"schema_version": 1}),
}
for step in range(request.get("steps", 1)):
    say(progress={"message": f"step {step}", "done": step, "total": request.get("steps", 1)})
    time.sleep(request.get("seconds", 0.0))
try:
    ACTIONS[request["do"]]()
except MemoryError:
    say(error={"kind": "out-of-memory", "message": "too little"})
told.close()
