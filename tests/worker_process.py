"""A worker as a process of its own, whose jobs are run by job_program.py; its argument is the settings, as JSON."""

import sys
import threading

from api_jobs import PROGRAM

from horizonplan.api import Settings
from horizonplan.api.database import Database
from horizonplan.api.worker import Worker

settings = Settings.model_validate_json(sys.argv[1])
Worker(Database(settings.database_url, settings.busy_seconds), settings, PROGRAM).run(threading.Event())
