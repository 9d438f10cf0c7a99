"""The wheel and the sdist carry horizonplan and nothing else, and each imports where it alone is installed."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

IMPORT_EVERYTHING = """
import importlib, importlib.util, pathlib, pkgutil, sys
import horizonplan
assert pathlib.Path(horizonplan.__file__).is_relative_to(sys.prefix), horizonplan.__file__
for module in pkgutil.walk_packages(horizonplan.__path__, "horizonplan."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
for name in ("api", "probes"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed as an import name of its own"
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command, run without the environment variables that could hide a fault."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    # No isolation: the backend is in the environment, so nothing is fetched.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def package_files() -> set[str]:
    """What a user must get: all that lies in the package."""
    files = (path for path in (ROOT / "horizonplan").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_holds_the_package_and_its_metadata_only(archives):
    names = set(zipfile.ZipFile(archives["wheel"]).namelist())
    package = {name for name in names if name.startswith("horizonplan/")}
    assert package == package_files()
    assert {name.split("/")[0].rpartition(".")[2] for name in names - package} == {"dist-info"}


def test_sdist_holds_the_package_once(archives):
    with tarfile.open(archives["sdist"]) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members if not member.isdir()}
    assert {name for name in names if name.startswith("horizonplan/")} == package_files()
    assert not [name for name in names if name.startswith(("api", "probes"))]
    assert not [member.name for member in members if member.issym() or member.islnk()]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_every_module_imports_where_only_the_archive_is_installed(archives, kind, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    # Its dependencies are those of the running environment. Site does not read the .pth files of a folder that it
    # reaches through a .pth file, so an editable horizonplan of that environment stays out of sight.
    site_packages = home / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    options = ["--quiet", "--no-index", "--no-deps", "--ignore-installed", "--no-build-isolation"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, archives[kind], cwd=tmp_path)
    run(python, "-c", IMPORT_EVERYTHING, cwd=tmp_path)
    if (ROOT / "horizonplan" / "cli.py").is_file() or (ROOT / "horizonplan" / "cli").is_dir():
        assert "plan" in run(home / "bin" / "horizonplan", "--help", cwd=tmp_path)
