"""``horizonplan reproduce`` in miniature: experiments against slow transcriptions, resuming, the page, arguments."""

import ast
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import horizonplan as hp
from horizonplan.cli import app
from horizonplan.models import ResidualCNN, ResidualLinear, ResidualMLP
from horizonplan.objective import AccuracyConstraint, Weighted
from horizonplan.reproduce import (
    EXPERIMENTS,
    Claim,
    Finding,
    Sources,
    cases,
    e1,
    reproduce,
    scoring,
    selection,
    theorem,
)
from horizonplan.reproduce import lab as lab_module
from horizonplan.reproduce.cells import Cells
from horizonplan.reproduce.findings import FAILS, HOLDS, OURS, PARTLY
from horizonplan.reproduce.lab import Lab
from horizonplan.reproduce.methods import BP, disjoint, sliding
from horizonplan.reproduce.numbers import line, log_line, ranks, rate
from horizonplan.reproduce.report import page
from horizonplan.reproduce.static import static_backward

SOURCE = Path(__file__).parents[1] / "horizonplan" / "reproduce"
ALL_CASES = cases.cases


def tiny_cases(scale, sources):
    """The small cases with fewer blocks, samples and epochs."""
    found = ALL_CASES("small", sources)
    sizes = {"horizons": (1, 2, 3, 5, 6), "disjoint": (2, 3, 5), "epochs": 2, "seeds": 1}
    m1 = replace(found["M1"], make=lambda: ResidualLinear(10, 10, 10, 6), sizes="tiny", batch=500, **sizes)
    m2 = replace(found["M2"], make=lambda: ResidualMLP(1, 10, 4, 6), sizes="tiny", batch=500, **sizes)
    m2 = replace(m2, learning_rate=0.01)

    def few():
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randn(n, 3, 8, 8, generator=generator) for n in (24, 12)]
        return cases.Data(*(torch.utils.data.TensorDataset(x, torch.arange(len(x)) % 10) for x in parts), "noise")

    m3 = replace(found["M3"], make=lambda: ResidualCNN(3, (2, 4), 3), data=few, sizes="tiny", batch=8, **sizes)
    cnn = replace(m3, name="CNN", horizons=(1, 3, 6), disjoint=(3,))
    return {case.name: case for case in (m1, m2, m3, cnn, found["MiniLM"])}


@pytest.fixture
def tiny(monkeypatch):
    """Everything in miniature."""
    monkeypatch.setattr(lab_module, "cases", tiny_cases)
    monkeypatch.setattr(e1, "full_m3", lambda: replace(tiny_cases("small", Sources())["M3"], name="M3"))
    monkeypatch.setattr(e1, "GRID", (1, 2, 3, 5, 6))
    monkeypatch.setattr(e1, "IMAGES", 2)
    monkeypatch.setattr(theorem, "DEPTHS", (32, 128))
    monkeypatch.setattr(theorem, "SEEDS", 2)


def make_lab(folder, **options):
    return Lab("small", Sources(text=folder), Cells(folder, lambda line: None), **options)


# The paper's definitions


def test_appendix_a():
    """The worked example: five residual layers, MSE, h = 1, 3 and 5."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(5)]

    class Block(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return x + torch.relu(self.layer(x))

    x, y = torch.randn(8, 4), torch.randn(8, 4)
    chain = hp.Chain(None, [Block(layer) for layer in layers], None, nn.functional.mse_loss)
    ends = {1: (1, 2, 3, 4, 5), 3: (3, 4, 5, 5, 5), 5: (5, 5, 5, 5, 5)}
    for h, losses_at in ends.items():
        chain.model.zero_grad()
        hp.horizon_backward(chain, (x, y), h)
        for t, end in enumerate(losses_at):
            state = x
            for s in range(end):
                state = state.detach() if s == t else state
                state = state + torch.relu(layers[s](state))
            wanted = torch.autograd.grad(nn.functional.mse_loss(state, y), layers[t].weight)[0]
            assert torch.equal(layers[t].weight.grad, wanted)


@pytest.mark.parametrize("kind", theorem.KINDS)
def test_theorem_s_gradients_are_the_engine_s(kind):
    """Eq. 27 against horizon_backward on whitened data, L = 1/2 |W - Phi|^2."""
    weights, phi = theorem.weights(kind, 7, seed=1, width=4)
    blocks = [nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(7)]
    for block, w in zip(blocks, weights, strict=True):
        block.weight.data.copy_(w)
    chain = hp.Chain(None, blocks, None, lambda out, target: 0.5 * (out - target).square().sum())
    eye = torch.eye(4, dtype=torch.float64)
    for h in range(1, 8):
        chain.model.zero_grad()
        hp.horizon_backward(chain, (eye, phi.T), h)
        wanted = torch.stack([block.weight.grad for block in blocks])
        torch.testing.assert_close(theorem.gradients(weights, phi, h), wanted, rtol=1e-10, atol=1e-12)


def test_theorem_s_powers_at_small_depths():
    """A drift's power grows towards 3; zero-mean weights stay near 2, and 1 - cos^2 shrinks with T."""
    rows = {kind: theorem.deviations(kind, (32, 128), 4) for kind in theorem.KINDS}

    def mean(kind, depth):
        powers = [theorem.power(rows[kind], kind, depth, seed, theorem.WIDE) for seed in range(4)]
        return sum(powers) / 4

    assert 2.3 < mean("drift", 32) < mean("drift", 128) < 3
    assert abs(mean("zero-mean", 128) - 2) < 0.4
    sizes = [sum(theorem._at_half(rows["zero-mean"], "zero-mean", depth)) for depth in (32, 128)]
    assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.4)


def test_deviation_keeps_small_angles():
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    assert theorem.deviation(a, b) == pytest.approx(1e-18, rel=1e-6)
    assert theorem.deviation(a, torch.tensor([1.0, 1.0], dtype=torch.float64)) == pytest.approx(0.5)


@pytest.mark.parametrize("h", [1, 2, 4, 6])
@pytest.mark.parametrize("kind", ["linear", "cnn"])
def test_static_mode_is_the_same_gradient(kind, h):
    torch.manual_seed(0)
    if kind == "linear":
        model, batch, loss = ResidualLinear(3, 5, 2, 6), (torch.randn(4, 3), torch.randn(4, 2)), nn.functional.mse_loss
    else:
        model, loss = ResidualCNN(3, (2, 4), 3), nn.functional.cross_entropy
        batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    chain = hp.Chain.from_model(model, batch, loss=loss)
    hp.horizon_backward(chain, batch, h)
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    static_backward(model, batch, loss, h)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_memory_is_linear_one_window_at_a_time_and_a_parabola_all_at_once(tiny, tmp_path):
    lab = make_lab(tmp_path)
    case = replace(lab.case("M1"), batch=2000)
    grid = list(range(1, 7))
    eager = lab.costs(case, [sliding(h, 6) for h in grid], "eager")
    sizes = [eager[sliding(h, 6).name].bytes for h in grid]
    steps = {b - a for a, b in pairwise(sizes[1:])}
    state = 2000 * 10 * 4
    assert all(abs(step - state) <= 1000 for step in steps)  # a block keeps its input
    static = [e1.static_bytes(lab, case, grid)[str(h)] for h in grid]
    graphs = [h * (6 - h + 1) for h in grid]
    fit = np.linalg.lstsq(np.array([[g, 6 - h + 1, 1] for g, h in zip(graphs, grid, strict=True)]), static, rcond=None)
    assert fit[0][0] == pytest.approx(state, rel=0.05)


# Figure 5's scoring


def test_relative_performance_against_a_slow_transcription():
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = {
            str(i): float(v) if generator.random() < 0.7 else None for i, v in enumerate(generator.normal(size=6))
        }
        known = [v for v in values.values() if v is not None]
        for name, found in scoring.relative(values).items():
            if values[name] is None:
                assert found == 1.5
            else:
                best, worst = sorted(known)[0], sorted(known)[-1]
                assert found == pytest.approx(0 if best == worst else (values[name] - best) / (worst - best))


def test_relative_performance_of_ties_and_of_nothing():
    assert scoring.relative({"a": 2.0, "b": 2.0, "c": None}) == {"a": 0.0, "b": 0.0, "c": 1.5}
    assert scoring.relative({"a": None}) == {"a": 1.5}


def test_worth_is_the_paper_s_objective():
    linear, ladder = (scoring.Column("M1", cost, "O2", 0.5) for cost in ("C1", "C2"))
    assert scoring.worth(linear, 0.8, 40, 100) == pytest.approx(-0.8 + 0.5 * 0.4)
    assert scoring.worth(ladder, 0.8, 31, 100) == pytest.approx(-0.8 + 0.5 * 2)
    strict = scoring.Column("M1", "C1", "O1", 0.1)
    assert scoring.worth(strict, 0.95, 40, 100) == pytest.approx(0.4)
    assert scoring.worth(strict, 0.85, 40, 100) is None
    assert scoring.worth(linear, -math.inf, 40, 100) is None


def test_there_are_twelve_cases_with_both_parameters():
    assert len({(c.model, c.cost, c.objective) for c in scoring.COLUMNS}) == 12
    assert len(scoring.COLUMNS) == 24


@pytest.mark.parametrize("objective", [AccuracyConstraint(0.2), Weighted(0.7)])
def test_algorithm_1_against_polyfit_and_brute_force(objective):
    depth, memory, price = 13, {1: 210.0, 5: 480.0, 9: 830.0, 13: 1000.0}, hp.LinearCost(1.0, 1000)
    cosines = {1: 0.62, 5: 0.83, 9: 0.97, 13: 0.99}
    a, b = np.polyfit(list(memory), list(memory.values()), 1)
    cubic = np.polyfit(list(cosines), list(cosines.values()), 3)
    values = {}
    for h in range(1, depth + 1):
        r, cost = min(1, np.polyval(cubic, h)) ** 2, round(a * h + b) / 1000
        if isinstance(objective, Weighted):
            values[h] = -r + 0.7 * cost
        elif r >= 0.8:
            values[h] = cost
    assert selection.algorithm_1(memory, cosines, depth, objective, price) == min(values, key=values.get)


def test_algorithm_1_without_a_feasible_horizon_takes_the_nearest():
    memory, cosines = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert selection.algorithm_1(memory, cosines, 4, AccuracyConstraint(0.1), hp.LinearCost(1.0, 4)) == 4


# Statistics


def test_lines_ranks_and_rates():
    assert line([0, 1, 2], [1, 3, 5]) == line([0, 1, 2], [1.0, 3.0, 5.0])
    assert log_line([1, 2, 4], [3, 24, 192]).slope == pytest.approx(3)
    assert ranks([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert ranks([1, 2, 3], [1, 1, 1]) == 0
    assert rate(1.0, 0.1, 0.01) == pytest.approx(0.5)
    assert rate(1.0, math.inf, 0.01) == -math.inf


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
    (tmp_path / "a.json").write_text('{"value": 3')
    assert cells.get("a", {}, lambda: 4) == 4
    assert json.loads((tmp_path / "a.json").read_text())["value"] == 4


# The whole, in miniature


def test_whole_run_stops_goes_on_and_writes_its_page(tiny, tmp_path):
    out, lines = tmp_path / "out", []

    def stop_after_six(line):
        lines.append(line)
        if len([entry for entry in lines if entry.endswith(" s")]) == 6:
            raise KeyboardInterrupt

    settings = {"sources": Sources(text=tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        reproduce(out, report=stop_after_six, **settings)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("cells/**/*.json")}
    assert len(kept) == 6

    found = reproduce(out, **settings)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [f.name for f in found] == list(EXPERIMENTS)
    for finding in found:
        assert all((out / name).stat().st_size for name in (*finding.pictures, *finding.tables))
        assert all(claim.verdict in (HOLDS, PARTLY, FAILS, OURS) for claim in finding.claims)
    assert "MiniLM was not run" in found[EXPERIMENTS.index("fig3")].caption
    html = (out / "report.html").read_text()
    assert all(f"id='{name}'" in html for name in EXPERIMENTS)

    again = []
    assert reproduce(out, only=["fig5"], report=again.append, **settings)[0] == found[-1]
    assert not [line for line in again if line.endswith(" s")]  # nothing was computed
    assert (out / "report.html").read_text().count("<h2 id=") == len(EXPERIMENTS)  # what was there stays


def test_runs_of_one_seed_are_equal_and_a_diverged_one_is_kept(tiny, tmp_path):
    case = make_lab(tmp_path).case("M1")
    first, second = (make_lab(tmp_path / name).run(case, sliding(2, 6), 0) for name in "ab")
    assert first == second
    wild = make_lab(tmp_path / "c").run(replace(case, learning_rate=1e9), BP, 0)
    assert "the weights were not updated" in wild.stopped
    assert wild.final_loss == math.inf


def test_checkpointing_and_disjoint_windows_cost_what_their_units_say(tiny, tmp_path):
    lab = make_lab(tmp_path)
    costs = lab.costs(lab.case("M1"), [BP, disjoint(3), *scoring.again(6)], "costs")
    assert (costs["BP"].units, costs["h=s=3"].units) == (3 * 6, 3 * 6 - 1)  # the stem trains
    every, root = (costs[method.name] for method in scoring.again(6))
    assert every.units == root.units == 4 * 6
    assert root.bytes < costs["BP"].bytes
    assert all(len(cost.seconds) == lab_module.TIMED_ROUNDS for cost in costs.values())


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


def typed_numbers(path):
    """Digits in the fixed parts of captions, rules and figures; names of the paper's and formulas are none."""
    tree = ast.parse(path.read_text())
    spoken = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in ("found", "rule")]
    spoken += [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("caption", "figures")
    ]
    for value in spoken:
        formats = {id(n) for f in ast.walk(value) if isinstance(f, ast.FormattedValue) for n in ast.walk(f)}
        for node in ast.walk(value):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in formats:
                left = EXACT_ENDS.sub("", NAMES.sub("", node.value))
                yield from re.findall(r".*\d.*", left)


@pytest.mark.parametrize("name", [*EXPERIMENTS, "fig5_claims"])
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


def test_a_folder_belongs_to_one_scale(tiny, tmp_path):
    reproduce(tmp_path, only=["theorem"])
    with pytest.raises(ValueError, match="another folder"):
        reproduce(tmp_path, only=["theorem"], scale="paper")


def test_paper_s_sizes():
    full = ALL_CASES("paper", Sources())
    models = {name: full[name].make() for name in ("M1", "M2", "M3")}
    layers = {
        name: [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)] for name, model in models.items()
    }
    assert [len(layers[name]) for name in ("M1", "M2", "M3")] == [15, 15, 62]
    assert all(layer.bias is None for layer in layers["M1"])
    assert [full[name].depth for name in full] == [13, 13, 30, 16, 12]
    assert [full[name].learning_rate for name in full] == [0.03, 0.01, 0.01, 0.001, 0.001]
    assert [full[name].batch for name in full] == [100, 100, 32, 64, 64]
    assert [full[name].epochs for name in full] == [40, 40, 40, 30, 30]
    with pytest.raises(ValueError, match="--weights"):
        full["ResNet-50"].make()
    with pytest.raises(ValueError, match="--data"):
        full["ResNet-50"].data()


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
