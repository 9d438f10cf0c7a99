"""A real PostgreSQL of its own, from the system's packages, on a socket in a temporary folder."""

import getpass
import os
import pwd
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


@contextmanager
def postgresql():
    """The URL of an empty database, and a function that ends its server as a crash does.

    The test is skipped where PostgreSQL is not installed.
    """
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    root = os.geteuid() == 0
    user = "postgres" if root else getpass.getuser()  # it refuses to run as root
    with TemporaryDirectory(prefix="pg") as folder:
        if root:
            shutil.chown(folder, user, pwd.getpwnam(user).pw_gid)

        def run(program, *words):
            command = [programs[-1].with_name(program), "-D", f"{folder}/data", *words]
            subprocess.run(command, user=user if root else None, cwd=folder, check=True, stdout=subprocess.DEVNULL)

        run("initdb", "-A", "trust", "-U", "tester", "--no-sync")
        run("pg_ctl", "start", "-w", "-l", f"{folder}/log", "-o", f"-c listen_addresses='' -c fsync=off -k {folder}")
        crashed = []

        def crash():
            run("pg_ctl", "stop", "-m", "immediate")
            crashed.append(True)

        try:
            yield f"postgresql://tester@/postgres?host={folder}", crash
        finally:
            if not crashed:
                crash()
