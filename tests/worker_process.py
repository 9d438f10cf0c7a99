"""A worker as a process of its own, whose jobs are run by job_program.py.

Its arguments are the settings, as JSON, and when to die by SIGKILL: ``before 3`` or ``after 3``, its third commit.
"""

import os
import signal
import sys
import threading
from itertools import count

from api_jobs import PROGRAM
from sqlalchemy.engine.default import DefaultDialect

from horizonplan.api import Settings
from horizonplan.api.database import Database
from horizonplan.api.worker import Worker


def die_at(when, number):
    """Let this process be killed around one of its commits."""
    commit, commits = DefaultDialect.do_commit, count(1)

    def counted(self, connection):
        if next(commits) != number:
            return commit(self, connection)
        if when == "after":
            commit(self, connection)
        os.kill(os.getpid(), signal.SIGKILL)

    DefaultDialect.do_commit = counted


settings = Settings.model_validate_json(sys.argv[1])
if len(sys.argv) > 2:
    when, number = sys.argv[2].split()
    die_at(when, int(number))
Worker(Database(settings.database_url, settings.busy_seconds), settings, PROGRAM).run(threading.Event())
