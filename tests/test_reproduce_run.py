"""``horizonplan reproduce`` as a whole: cells, going on after a kill, the page, arguments, the command."""

import ast
import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from miniature import make_lab, shrink, tiny_cases, write_cifar
from typer.testing import CliRunner

from horizonplan.cli import app
from horizonplan.reproduce import EXPERIMENTS, Claim, Finding, Sources, reproduce
from horizonplan.reproduce import lab as lab_module
from horizonplan.reproduce.cells import Cells
from horizonplan.reproduce.findings import FAILS, HOLDS, OURS, PARTLY
from horizonplan.reproduce.lab import Lab
from horizonplan.reproduce.report import page, write_claims
from horizonplan.reproduce.run import _claim_folder, _identity, check

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "horizonplan" / "reproduce"


@pytest.fixture
def tiny(monkeypatch):
    shrink(monkeypatch)


# Cells


def test_cell_is_computed_once_and_again_for_other_settings(tmp_path):
    cells = Cells(tmp_path, lambda line: None)
    for settings, wanted in (({"n": 1}, 1), ({"n": 1}, 1), ({"n": 2}, 2)):
        assert cells.get("a/b", settings, lambda wanted=wanted: wanted) == wanted
    assert (cells.computed, cells.found) == (2, 1)


def test_cell_that_fails_leaves_nothing_and_a_broken_file_is_not_believed(tmp_path):
    cells = Cells(tmp_path, lambda line: None)
    with pytest.raises(KeyError):
        cells.get("a", {}, lambda: {}["missing"])
    assert not list(tmp_path.rglob("*"))
    for broken in (b'{"value": 3', b"\xff\xfe\x00"):
        (tmp_path / "a.json").write_bytes(broken)
        assert cells.get("a", {}, lambda: 4) == 4
    assert json.loads((tmp_path / "a.json").read_text())["value"] == 4


# The whole, in miniature


def test_a_run_that_was_killed_goes_on(tiny, tmp_path):
    """The finished cell stays, the other one is computed."""

    def stop(line):
        if "zero-mean" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(tmp_path, only=["theorem"], report=stop)
    (drift,) = tmp_path.rglob("cells/**/*.json")
    written, lines = drift.stat().st_mtime_ns, []
    reproduce(tmp_path, only=["theorem"], report=lines.append)
    assert drift.stat().st_mtime_ns == written
    assert [line.split("] ")[1].split(":")[0] for line in lines if line.endswith(" s")] == ["theorem/zero-mean"]


@pytest.mark.slow
def test_whole_run_stops_goes_on_and_writes_its_page(tiny, tmp_path):
    out, lines = tmp_path / "out", []

    def stop_after_six(line):
        lines.append(line)
        if len([entry for entry in lines if entry.endswith(" s")]) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(out, report=stop_after_six)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("cells/**/*.json")}
    assert len(kept) == 6

    found = reproduce(out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [f.name for f in found] == list(EXPERIMENTS)
    for finding in found:
        assert all((out / name).stat().st_size for name in (*finding.pictures, *finding.tables))
        assert all(claim.verdict in (HOLDS, PARTLY, FAILS, OURS) for claim in finding.claims)
    assert "MiniLM was not run" in found[EXPERIMENTS.index("fig3")].caption
    html = (out / "report.html").read_text()
    assert all(f"id='{name}'" in html for name in EXPERIMENTS)

    again = []
    assert reproduce(out, only=["fig5"], report=again.append)[0] == found[-1]
    assert not [line for line in again if line.endswith(" s")]  # nothing was computed
    assert (out / "report.html").read_text().count("<h2 id=") == len(EXPERIMENTS)  # what was there stays


@pytest.mark.slow
def test_a_model_that_diverges_stops_nothing(tiny, tmp_path, monkeypatch):
    """Back-propagation breaks off in M2: its answers are infeasible, the others are scored, the page is written."""

    def wild(scale, sources):
        found = tiny_cases(scale, sources)
        return {**found, "M2": replace(found["M2"], learning_rate=1e9)}

    monkeypatch.setattr(lab_module, "cases", wild)
    reproduce(tmp_path, only=["fig2", "e2", "fig5"])
    rows = list(csv.DictReader((tmp_path / "fig5.csv").read_text().splitlines()))
    assert {row["Rel of all"] for row in rows if row["model"] == "M2"} == {"1.5"}
    assert {row["Rel of all"] for row in rows if row["model"] == "M1"} != {"1.5"}
    assert (tmp_path / "report.html").is_file()


# The page


class Text(HTMLParser):
    """What a reader sees of a page."""

    def __init__(self):
        super().__init__()
        self.words, self.hidden = [], False

    def handle_starttag(self, tag, attributes):
        self.hidden = tag == "style"

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)


def test_page_has_no_number_of_its_own():
    claims = tuple(Claim("says", "where", "rule", "found", verdict) for verdict in (HOLDS, PARTLY))
    finding = Finding("name", "title", "caption", ("a.png",), ("a.csv",), claims)
    reader = Text()
    reader.feed(page([finding], {"fact": "value"}, {"a.png": b"picture"}))
    seen = " ".join(reader.words)
    assert re.findall(r"\d+", seen) == ["1", "1"]  # how many claims hold, how many partly
    assert all(word in seen for word in ("says", "where", "rule", "found", "caption", "fact", "value"))


NAMES = re.compile(
    r"T/2|h = 1\b|s = 1\b|stride 1\b|T-h\+1|M[123]|O[12]|C[12]|M0|LoCo [35]|Figure \d|ResNet-50|ViT-B/16|Eq\. \d+"
)
EXACT_ENDS = re.compile(r"1 - |, 0 is the best, 1 the worst")


ASSIGNED = "caption", "figures", "size", "sizes", "why"
ARGUMENTS = "found", "rule", "sizes", "source", "title"


def typed_numbers(path):
    """Digits in the fixed parts of captions, rules and figures; names of the paper's and formulas are none."""
    tree = ast.parse(path.read_text())
    spoken = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in ARGUMENTS]
    spoken += [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ASSIGNED
    ]
    for value in spoken:
        formats = {id(n) for f in ast.walk(value) if isinstance(f, ast.FormattedValue) for n in ast.walk(f)}
        for node in ast.walk(value):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in formats:
                left = EXACT_ENDS.sub("", NAMES.sub("", node.value))
                yield from re.findall(r".*\d.*", left)


def test_claims_in_markdown_keep_to_their_columns(tmp_path):
    claim = Claim("a | b", "where", "rule", "|r - cos²| is 3 * 2", HOLDS)
    path = write_claims(tmp_path, [Finding("name", "title", "caption", (), (), (claim,))])
    assert path.read_text().splitlines()[2] == r"| name | a \| b | holds | \|r - cos²\| is 3 \* 2 |"


@pytest.mark.parametrize("name", [*EXPERIMENTS, "fig5_claims", "cases"])
def test_claims_and_captions_have_no_typed_numbers(name):
    assert not list(typed_numbers(SOURCE / f"{name}.py"))


def test_the_search_for_typed_numbers_finds_one(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text('Claim(found=f"It is {value:.2f} of 0.25 at h = 1.")')
    assert len(list(typed_numbers(path))) == 1


# Arguments


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"only": ["fig9"]}, "only=fig9"),
        ({"only": []}, "name at least one"),
        ({"scale": "large"}, "scale='large'"),
        ({"seeds": 0}, "seeds=0"),
        ({"scale": "paper"}, "--data"),
        ({"sources": Sources(images=Path("/nowhere"))}, "CIFAR-10"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        reproduce(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense"])
def test_a_device_that_computes_nothing_is_refused_first(tmp_path, device):
    with pytest.raises(ValueError, match=f"device='{device}': .*horizonplan doctor"):
        reproduce(tmp_path / "out", only=["theorem"], device=device)
    assert not (tmp_path / "out").exists()


def test_cifar_is_looked_for_only_where_it_is_needed(tiny, tmp_path):
    reproduce(tmp_path, only=["theorem"], sources=Sources(images=Path("/nowhere")))
    with pytest.raises(ValueError, match="CIFAR-10"):
        check(["fig3"], "small", Sources(images=Path("/nowhere")), None)


def test_a_wrong_text_is_refused_where_it_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"text='/nowhere': .*--text FOLDER.*fig4"):
        check(["fig4"], "small", Sources(text=Path("/nowhere")), None)
    check(["theorem"], "small", Sources(text=Path("/nowhere")), None)


def test_a_folder_belongs_to_one_cifar_wherever_it_lies(tmp_path):
    for name, last in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write_cifar(tmp_path / name / "cifar-10-batches-bin", 10, binary=True)
        with (tmp_path / name / "cifar-10-batches-bin" / "test_batch.bin").open("ab") as file:
            file.write(bytes([last]))
    identity = {
        name: _identity(["e2"], "small", Sources(images=tmp_path / name), torch.device("cpu")) for name in "abc"
    }
    assert identity["a"] == identity["b"]
    _claim_folder(tmp_path, _identity(["theorem"], "small", Sources(images=tmp_path / "c"), torch.device("cpu")))
    _claim_folder(tmp_path, identity["a"])
    _claim_folder(tmp_path, identity["b"])
    with pytest.raises(ValueError, match=r"CIFAR-10.*another folder"):
        _claim_folder(tmp_path, identity["c"])


def test_cells_of_another_device_or_other_data_are_not_believed(tiny, tmp_path):
    lab = make_lab(tmp_path)
    case = lab.case("M1")
    wanted = lab.settings(case)
    assert Lab("small", lab.sources, lab.cells, device=torch.device("cuda")).settings(case) != wanted
    assert lab.settings(replace(case, source="of something else")) != wanted
    assert lab.settings(replace(case, origin=lambda: "0123")) != wanted
    assert lab.settings(replace(case)) == wanted


def test_a_folder_belongs_to_one_scale(tiny, tmp_path):
    reproduce(tmp_path, only=["theorem"])
    with pytest.raises(ValueError, match="another folder"):
        reproduce(tmp_path, only=["theorem"], scale="paper")


def test_command(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("HORIZONPLAN_CIFAR", raising=False)
    runner = CliRunner()
    result = runner.invoke(app, ["reproduce", "--only", "theorem", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["name"] == "theorem"
    assert "theorem/drift" in result.stderr
    plain = runner.invoke(app, ["reproduce", "--only", "theorem", "--out", str(tmp_path)])
    assert plain.stdout.rstrip().endswith("report.html")
    for wrong in (["--only", "fig9"], ["--scale", "paper"], ["--data", "/nowhere"]):
        result = runner.invoke(app, ["reproduce", "--out", str(tmp_path), *wrong])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    monkeypatch.setenv("HORIZONPLAN_CIFAR", "/from/the/environment")
    assert "/from/the/environment" in runner.invoke(app, ["reproduce", "--out", str(tmp_path)]).stderr
