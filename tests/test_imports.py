"""Imports run one way: a module imports only from modules above its own, and never through the links at the top."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "horizonplan"
LINKS = ("api", "probes")

# From the bottom of the library to its surface. A name may import from the lines above its own, and from what stands
# left of it in its own line. All files of a package (algorithms, probes, ...) stand where the package does.
LINES = [
    "units batch projection progress precision models rates",
    "schedule",
    "chain",
    "gradient",
    "algorithms",
    "probes",
    "predict frugal rows curves candidates alternatives probing devices",
    "cards cost objective racing",
    "frontier savings horizons",
    "explain choice plot plot_frontier settle decide weigh contest methods",
    "plan provenance forecast planner measured verify",
    "fits micro_batch",
    "training tuner",
    "datasets integrations",
    "api client reproduce cli",
    "demo",
]
ORDER = " ".join(LINES).split()
# These see everything, and nothing imports them. ("" is horizonplan/__init__.py.)
SURFACE = {"", "__main__", "demo"}


def part_of(path: Path) -> str:
    """The name in ORDER that a file of the package belongs to: horizonplan/probes/time.py is part of probes."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, absolute module and name ("" for `import module`) of each import, wherever it stands in the file."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def imported_part(module: str, name: str) -> str | None:
    """The part of horizonplan that an import reaches; None for other people's modules."""
    top, _, rest = module.partition(".")
    if top != "horizonplan":
        return None
    if rest:
        return rest.split(".")[0]
    is_part = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
    return name if name and is_part else ""


def upward_imports(path: Path) -> list[str]:
    """What a file imports from its own level upwards, in words."""
    own = part_of(path)
    found = []
    for line, module, name in imports(path):
        part = imported_part(module, name)
        if part is None or part == own:
            continue
        where = f"{path.relative_to(ROOT)}:{line}"
        if part in SURFACE:
            found.append(f"{where} imports from horizonplan itself; name the module that defines what you need")
        elif part not in ORDER:
            found.append(f"{where} imports {part!r}, which has no place in ORDER; add it to the order")
        elif ORDER.index(part) >= ORDER.index(own):
            found.append(f"{where}: {own!r} imports {part!r}, which stands after it in ORDER")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
PARTS = sorted({part_of(path) for path in FILES} - SURFACE)


@pytest.mark.parametrize("part", PARTS)
def test_module_has_a_place_in_the_order(part):
    assert part in ORDER, f"{part!r} is new: add it to the order in {Path(__file__).name}"


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in FILES])
def test_imports_run_one_way(path):
    if part_of(path) in ORDER and part_of(path) not in SURFACE:
        assert not upward_imports(path), "\n".join(upward_imports(path))


def python_files() -> Iterator[Path]:
    """Every Python file that is ours, once."""
    for folder in ("horizonplan", "tests", "docs", "benchmarks", "examples"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_nothing_is_imported_through_the_links():
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {module!r}; import horizonplan.{module}"
        for path in python_files()
        for line, module, _ in imports(path)
        if module.split(".")[0] in LINKS
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", LINKS)
def test_link_shows_the_part(name):
    if not (PACKAGE / name).is_dir():
        pytest.skip(f"horizonplan/{name} does not exist yet")
    link = ROOT / name
    assert link.is_symlink(), f"make it: ln -s horizonplan/{name} {name}"
    assert link.resolve() == (PACKAGE / name).resolve()
    assert not link.readlink().is_absolute()


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from horizonplan.units import parse", None),
        ("import torch", None),
        ("from .schedule import Window", None),
        ("from . import units", None),
        ("from horizonplan.gradient import horizon_backward", "stands after"),
        ("def f():\n    from .plan import Plan", "stands after"),
        ("from . import probes", "stands after"),
        ("import horizonplan.api.app", "stands after"),
        ("import horizonplan", "horizonplan itself"),
        ("from horizonplan import Plan", "horizonplan itself"),
        ("from horizonplan.nowhere import x", "add it to the order"),
    ],
)
def test_the_rule_itself(tmp_path, monkeypatch, source, complaint):
    package = tmp_path / "horizonplan"
    (package / "probes").mkdir(parents=True)
    (package / "units.py").touch()
    (package / "chain.py").write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    found = upward_imports(package / "chain.py")
    assert complaint in found[0] if complaint else not found
