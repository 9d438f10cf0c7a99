"""The README's and the guides' Python and `$ horizonplan` lines run as they stand, in order, in one folder."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = ("tutorial", "training", "tuning", "integrations")
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES)]
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w-]*) *$")
COMMAND = re.compile(r"^ *\$ (?P<command>horizonplan\b.*)$")


def as_script(markdown: str) -> str:
    """A script with the document's line numbers: Python stays, commands become calls, all else becomes empty lines.

    A service does not end, so of `$ horizonplan serve ...` only the `--help` is run.

    >>> print(as_script("Text.\\n```python\\nx = 1\\n```\\n```console\\n$ horizonplan doctor\\nfine\\n```"), end="")
    <BLANKLINE>
    <BLANKLINE>
    x = 1
    <BLANKLINE>
    <BLANKLINE>
    __import__("subprocess").run('horizonplan doctor', shell=True, check=True)
    <BLANKLINE>
    <BLANKLINE>
    """
    script, fence = [], None
    lines = markdown.splitlines()
    for number, line in enumerate(lines):
        opened = FENCE.match(line)
        emitted = ""
        if fence is None:
            fence = opened
        elif line.strip() == fence["ticks"]:
            fence = None
        elif fence["language"] == "python":
            emitted = line.removeprefix(fence["indent"])
        elif fence["language"] == "console" and (match := COMMAND.match(line)):
            command = match["command"]
            following = number + 1
            while command.endswith("\\"):
                command, following = command[:-1] + lines[following].strip().removeprefix("> "), following + 1
            command = "horizonplan serve --help" if command.startswith("horizonplan serve") else command
            emitted = f'__import__("subprocess").run({command!r}, shell=True, check=True)'
        script.append(emitted)
    return "\n".join(script) + "\n"


def python_blocks(markdown: str) -> int:
    """The number of fenced Python blocks."""
    return len(re.findall(r"^ *`{3,}python *$", markdown, re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_are_there_to_be_run(document):
    if not document.is_file():
        pytest.skip(f"{document.name} is not written yet")
    markdown = document.read_text()
    assert document.name != "README.md" or python_blocks(markdown), "README.md has no ```python block"
    assert not re.search(r"^ *`{3,}(pycon|py)\b", markdown, re.MULTILINE), "write ```python, so that it is run"
    compile(as_script(markdown), document.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_runs_as_it_stands(document, tmp_path):
    if not document.is_file():
        pytest.skip(f"{document.name} is not written yet")
    script = as_script(document.read_text())
    if not script.strip():
        pytest.skip(f"{document.name} has nothing to run")
    path = tmp_path / f"{document.name}.py"
    path.write_text(script)
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = os.environ | {"PATH": scripts, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"Line numbers are those of {document.name}.\n{done.stdout}"
