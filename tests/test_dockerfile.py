"""The Dockerfile, as far as it can be held against the repository without Docker."""

import json
import re
import shlex
import tomllib
from pathlib import Path

from typer.main import get_command

from horizonplan.api import Settings
from horizonplan.cli import app

ROOT = Path(__file__).parents[1]


def instructions():
    """Name and arguments of each instruction, without comments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def the(name):
    """The arguments of the one instruction of a name."""
    [found] = [arguments for instruction, arguments in instructions() if instruction == name]
    return found


def test_what_is_copied_is_there_and_is_sent():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for name, arguments in instructions() if name == "COPY" for source in shlex.split(arguments)[:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= copied  # building the package reads them


def test_the_extras_are_known():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [asked] = re.findall(r"'\.\[(.*)\]'", (ROOT / "Dockerfile").read_text())
    assert set(asked.split(",")) <= project["optional-dependencies"].keys()


def test_the_command_is_one_of_the_program():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [program], words = json.loads(the("ENTRYPOINT")), json.loads(the("CMD"))
    assert program in project["scripts"]
    command = get_command(app).commands[words[0]]
    assert command.make_context(words[0], words[1:]).params["host"] == "0.0.0.0"


def test_the_container_looks_where_the_service_listens_and_keeps_what_it_stores():
    check = json.loads(the("HEALTHCHECK").partition("CMD")[2])
    compile(check[2], "HEALTHCHECK", "exec")
    port = Settings.model_fields["port"].default
    assert check[:2] == ["python", "-c"]
    assert f"http://127.0.0.1:{port}/livez" in check[2]
    assert the("EXPOSE") == str(port)
    name, url = the("ENV").split("=")
    assert name == "HORIZONPLAN_DATABASE_URL"
    assert url.startswith(f"sqlite:///{the('VOLUME')}/")
    assert the("USER") != "root"
