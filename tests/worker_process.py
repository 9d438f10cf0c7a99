"""A worker as a process of its own, whose jobs are run by job_program.py."""

import os
import signal
import threading
from contextlib import contextmanager
from itertools import count
from multiprocessing import get_context

from api_jobs import PROGRAM
from sqlalchemy.engine.default import DefaultDialect

from horizonplan.api import Settings
from horizonplan.api.database import Database
from horizonplan.api.worker import Worker

servers = get_context("forkserver")  # each process is a copy of one that has imported all that is slow
servers.set_forkserver_preload(["horizonplan.api.worker"])


@contextmanager
def worker_process(settings, moment=""):
    """A worker, killed at the end, or at a moment: ``before 3`` or ``after 3``, its third commit."""
    process = servers.Process(target=_work, args=(settings.model_dump_json(), moment))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _work(settings, moment):
    if moment:
        _die(*moment.split())
    settings = Settings.model_validate_json(settings)
    Worker(Database(settings.database_url, settings.busy_seconds), settings, PROGRAM).run(threading.Event())


def _die(when, number):
    """Let this process be killed around one of its commits."""
    commit, commits = DefaultDialect.do_commit, count(1)

    def counted(self, connection):
        if next(commits) != int(number):
            return commit(self, connection)
        if when == "after":
            commit(self, connection)
        os.kill(os.getpid(), signal.SIGKILL)

    DefaultDialect.do_commit = counted
