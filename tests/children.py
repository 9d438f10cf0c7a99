"""What tests run in fresh processes: functions by name, in a module that starts fast (the standard library only)."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


def add(left, right):
    return left + right


def zeros(count):
    return bytes(count)


def same(first, second):
    return first is second


def fails(kind, message):
    raise kind(message)


def returns_lambda():
    return lambda: 0


def chatters():
    print("printed")
    print("complained", file=sys.stderr)
    print("asked", sys.stdin.read())


def place():
    """Process, its group and its session; working directory; a variable."""
    return os.getpid(), os.getpgrp(), os.getsid(0), os.getcwd(), os.environ.get("HORIZONPLAN_TEST")


def changes_environment():
    os.environ["HORIZONPLAN_TEST"] = "changed"


def dies(number):
    print("last words", flush=True)
    os.kill(os.getpid(), number)
    time.sleep(60)


def leaves(code):
    os._exit(code)


def hangs(file, ignore=False):
    """Write this process's and a grandchild's number into a file, then never return."""
    if ignore:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    _write(file, f"{os.getpid()} {grandchild.pid}")
    time.sleep(600)


def leaves_grandchild():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


def lingers():
    """Return, but keep the process alive."""
    threading.Thread(target=time.sleep, args=(600,)).start()
    return "done"


def hangs_with_things(file):
    """Leave a temporary folder, and a semaphore in /dev/shm whose name goes into a file, then never return."""
    tempfile.mkdtemp()
    lock = multiprocessing.get_context("spawn").Lock()
    _write(file, lock._semlock.name)
    time.sleep(600)


def _write(file, text):
    part = Path(f"{file}.part")
    part.write_text(text)
    part.rename(file)


def trains(model, optimizer, inputs):
    """One step in the child; whether the optimiser moved this very model."""
    before = [p.detach().clone() for p in model.parameters()]
    model(inputs).square().mean().backward()
    optimizer.step()
    return all((p != was).any().item() for p, was in zip(model.parameters(), before, strict=True)), model


def torch_runs_out():
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
