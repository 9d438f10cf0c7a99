"""The benchmarks behind the documentation's numbers still start: what they import is there."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    for module in SCRIPTS:
        monkeypatch.delitem(sys.modules, module, raising=False)
    found = importlib.import_module(name)
    assert Path(found.__file__).parent == FOLDER
    for module in SCRIPTS:  # tests have modules of such names too
        sys.modules.pop(module, None)
