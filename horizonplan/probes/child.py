"""The other side of ``isolated``: a script that reads a function and its arguments, and answers with what came of it.

It starts before anything of horizonplan or torch is there, so it imports the standard library only. All goes through
open files without names, whose numbers are its arguments:

- the letter, two pickles: the parent's setting (as ``multiprocessing.spawn`` describes it); function and arguments;
- the answer, pickled tuples: ``("begun",)``, then ``("value", pickled)`` or ``("raised", type, message, out of
  memory, traceback)``; or ``("unread", why)`` where the function could not be had here;
- the lifeline, a pipe that breaks when the parent is gone, however it went.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import traceback
from multiprocessing import process, spawn
from threading import Thread
from typing import IO, Any

_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def main(letter: int, answer: int, lifeline: int) -> None:
    """Do what the letter says, and answer."""
    for number in (letter, answer, lifeline):
        os.set_inheritable(number, False)
    Thread(target=_end_with, args=(lifeline, os.environ["TMPDIR"]), daemon=True).start()
    with open(letter, "rb") as told, open(answer, "wb") as answered:
        try:
            function, args = _read(told)
        except BaseException as error:  # a main script may even leave by sys.exit
            _say(answered, "unread", f"{type(error).__name__}: {error}")
            return
        _say(answered, "begun")
        try:
            value = pickle.dumps(function(*args))
        except BaseException as error:
            _say(answered, "raised", type(error).__name__, str(error), out_of_memory(error), traceback.format_exc())
            return
        _say(answered, "value", value)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: torch's own, Python's, or a library's in words."""
    if {kind.__name__ for kind in type(error).__mro__} & {"OutOfMemoryError", "MemoryError"}:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _read(letter: IO[bytes]) -> tuple[Any, Any]:
    current: Any = process.current_process()
    current._inheriting = True  # a main script without a guard, imported again, may not start processes in turn
    spawn.prepare(pickle.load(letter))
    function, args = pickle.load(letter)
    del current._inheriting
    return function, args


def _say(answer: IO[bytes], *record: object) -> None:
    pickle.dump(record, answer)
    answer.flush()


def _end_with(lifeline: int, folder: str) -> None:
    os.read(lifeline, 1)
    shutil.rmtree(folder, ignore_errors=True)  # this process's own, which the parent would have removed
    os.kill(0, signal.SIGKILL)  # 0: the whole group


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
