"""``horizonplan reproduce``: one miniature of each figure, and verdicts of made-up rows."""

import csv
import math
from functools import cache
from types import SimpleNamespace

import pytest
from miniature import make_lab, shrink

from horizonplan.reproduce import e1, e2, fig2, fig3, fig4, fig5, fig5_claims, scoring
from horizonplan.reproduce import lab as lab_module
from horizonplan.reproduce.findings import FAILS, HOLDS, OURS, PARTLY
from horizonplan.reproduce.methods import BP, FF, LOCO

CASES = [SimpleNamespace(name=m, horizons=(1, 2, 4), disjoint=(2,), depth=4, epochs=3) for m in ("M1", "M2", "M3")]


# One miniature a figure


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A lab in miniature whose cells all figures share, its folder, and a figure's outcome, computed once."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        folder = tmp_path_factory.mktemp("figures")
        lab = make_lab(folder)
        yield lab, folder, cache(lambda module: module.run(lab, folder))


def table(folder, name):
    return list(csv.DictReader((folder / name).read_text().splitlines()))


@pytest.mark.parametrize("module", [e1, fig2, e2, fig3, fig4, fig5])
def test_miniature_of_a_figure(miniature, module):
    _, folder, run = miniature
    found = run(module)
    assert all((folder / name).stat().st_size for name in (*found.pictures, *found.tables))
    assert {claim.verdict for claim in found.claims} <= {HOLDS, PARTLY, FAILS, OURS}


PINNED = [
    (e1, "e1.csv", "bytes", {"kind": "s = 1"}, [146004, 186000, 205600, 244800, 264000]),
    (e1, "e1.csv", "bytes", {"kind": "all windows at once"}, [543204, 563204, 543204, 383204, 243604]),
    (fig2, "fig2.csv", "1-cos", {"stride": "s = 1", "epoch": "0"}, [0.333752, 0.228659, 0.132324, 0.021367]),
    (e2, "e2.csv", "loss", {"stride": "s = 1", "epoch": "2"}, [1.20246, 1.18047, 1.15573, 1.12501, 1.12391]),
    (fig3, "fig3.csv", "bytes", {"kind": "s = 1"}, [134568, 165144, 100516]),
    (fig4, "fig4.csv", "loss", {"stride": "s = 1", "epoch": "2"}, [2.55707, 2.60932, 2.48825]),
]


@pytest.mark.parametrize(("module", "name", "value", "place", "wanted"), PINNED)
def test_figures_are_those_that_were_found_before(miniature, module, name, value, place, wanted):
    """Of M1 at h = 1, 2, 3, 5 and 6, or of the small CNN at h = 1, 3 and 6."""
    _, folder, run = miniature
    run(module)
    place = {"model": "CNN" if module in (fig3, fig4) else "M1", **place}
    rows = [r for r in table(folder, name) if place.items() <= r.items() and r["h"] != "4"]
    assert [float(r[value]) for r in rows] == pytest.approx(wanted, rel=0.01)


def test_figure_5_s_table_is_pinned_to_the_definitions(miniature):
    """Back-propagation has rate 1; Rel is from 0 to 1 or 1.5, and is that of the paper's five methods only."""
    _, folder, run = miniature
    run(fig5)
    rows = table(folder, "fig5.csv")
    assert len(rows) == len(scoring.COLUMNS) * len(scoring.ORDER)
    assert all(float(r["rate"]) == 1 for r in rows if r["algorithm"] in (BP.name, scoring.AGAIN) and r["O"])
    assert {r["algorithm"] for r in rows if r["Rel"]} == set(scoring.PAPER_S)
    for column in scoring.COLUMNS:
        mine = {r["algorithm"]: r for r in rows if r["column"] == column.name}
        for score, names in (("Rel", scoring.PAPER_S), ("Rel of all", scoring.ORDER)):
            known = {n: float(mine[n]["O"]) for n in names if mine[n]["O"]}
            for name, value in known.items():
                low, high = min(known.values()), max(known.values())
                wanted = (value - low) / (high - low) if high > low else 0
                assert float(mine[name][score]) == pytest.approx(wanted, abs=1e-4)
            assert {mine[n][score] for n in names if n not in known} <= {"1.5"}


def test_first_losses_are_the_mean_over_the_training_data(miniature):
    lab, _, _ = miniature
    case = lab.case("M1")
    x, y = lab.data(case).training.tensors
    wanted = case.loss(lab.model(case, 0)(x), y).item()
    assert lab.run(case, BP, 0).initial_loss == pytest.approx(wanted, rel=1e-5)
    assert lab_module.Run(2.0, [], [], None).final_loss == math.inf


# Verdicts of Figure 5


def scored(means):
    """Rows with these Rel: by algorithm a number, or a function of model and objective."""
    return [
        {"algorithm": name, "model": m, "objective": goal, "Rel": rel(m, goal) if callable(rel) else rel}
        for name, rel in means.items()
        for m in scoring.MODELS
        for goal in ("O1", "O2")
    ]


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [(0.2, HOLDS), (lambda m, goal: 0.6 if m == "M1" else 0.1, PARTLY), (0.6, FAILS)],
)
def test_verdicts_on_back_propagation(ours, verdict):
    assert fig5_claims._beats_bp(scored({scoring.SELECTED: ours, BP.name: 0.5})).verdict == verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (0.2, lambda m, goal: 1.5 if goal == "O1" else 0, HOLDS),
        (lambda m, goal: 1.5 if goal == "O1" else 0, 1.5, FAILS),
        (lambda m, goal: 1.5 if (m, goal) == ("M1", "O1") else 0, 1.5, PARTLY),
    ],
)
def test_verdicts_on_forward_forward(ours, theirs, verdict):
    claim = fig5_claims._steadier(scored({scoring.SELECTED: ours, FF.name: theirs}))
    assert claim.verdict == verdict


@pytest.mark.parametrize(("ours", "verdict"), [(0.54, HOLDS), (0.65, PARTLY), (0.75, FAILS)])
def test_verdicts_on_loco(ours, verdict):
    rows = scored({scoring.SELECTED: ours, LOCO[0].name: 0.4, LOCO[1].name: 0.6})
    assert fig5_claims._like_loco(rows).verdict == verdict


@pytest.mark.parametrize(("m3", "o1", "verdict"), [(-0.1, 0.1, HOLDS), (0.1, 0.1, PARTLY), (0.1, -0.1, FAILS)])
def test_verdicts_on_difficult_tasks(m3, o1, verdict):
    rows = scored({scoring.SELECTED: lambda m, goal: 0.5 + m3 * (m == "M3") + o1 * (goal == "O1")})
    assert fig5_claims._difficult(rows).verdict == verdict


@pytest.mark.parametrize(("off", "verdict"), [(0.05, HOLDS), (0.2, PARTLY), (0.5, FAILS)])
def test_verdicts_on_the_rate(off, verdict):
    rates = [{"model": m, "h": h, "T": 4, "cos2": 0.4, "rate": 0.4 + off} for m in scoring.MODELS for h in (1, 2)]
    assert fig5_claims._cosine(rates).verdict == verdict
    lost = [{**row, "rate": -math.inf} for row in rates]
    assert "M1 1.40 ±0.00" in fig5_claims._cosine(lost).found


@pytest.mark.parametrize(
    ("best", "verdict"), [((3, 3, 6, ""), HOLDS), ((3, 1, 6, 6), FAILS), ((3, 1, 6, ""), PARTLY), (("", ""), FAILS)]
)
def test_verdicts_on_the_best_horizon(best, verdict):
    claim = fig5_claims._middle([{"best h": h, "T": 6} for h in best])
    assert claim.verdict == verdict
    assert f"in {best.count('')} more" in claim.found


# Verdicts of Figure E2


def curves(ends, first=0.5):
    """Rows whose loss goes from 1 to ``first`` for h < T (to .5 for back-propagation) and to its end by horizon."""
    return [
        {"model": case.name, "stride": kind, "h": h, "seed": 0, "epoch": epoch, "loss": loss}
        for case in CASES
        for kind, horizons in (("s = 1", case.horizons), ("s = h", case.disjoint))
        for h in horizons
        for epoch, loss in enumerate((1.0, 0.5 if h == 4 else first, 0.4, ends[h]))
    ]


@pytest.mark.parametrize(
    ("ends", "late", "larger"),
    [({1: 0.3, 2: 0.2, 4: 0.1}, HOLDS, HOLDS), ({1: 0.1, 2: 0.3, 4: 0.1}, FAILS, FAILS)],
)
def test_verdicts_on_the_last_losses(ends, late, larger):
    assert e2._late(CASES, curves(ends)).verdict == late
    assert e2._larger(CASES, curves(ends)).verdict == larger


@pytest.mark.parametrize(("first", "verdict"), [(0.5, HOLDS), (0.6, PARTLY), (0.9, FAILS), (math.inf, FAILS)])
def test_verdicts_on_the_first_epoch(first, verdict):
    assert e2._early(CASES, curves({1: 0.3, 2: 0.2, 4: 0.1}, first)).verdict == verdict


@pytest.mark.parametrize(("pace", "epochs"), [(0.5, 3), (1.0, 3), (1.4, 2), (4.0, 0)])
def test_epochs_that_are_done_in_back_propagation_s_time(pace, epochs):
    assert e2._done(CASES[0], pace) == epochs


# Verdicts of Figures 3 and 4


@pytest.mark.parametrize(
    ("sizes", "linear", "verdict"),
    [
        ((1, 2, 4), True, HOLDS),
        ((1, 3, 4), True, FAILS),
        ((1, 3, 4), False, HOLDS),
        ((1, 2, 4), False, PARTLY),
        ((2, 1.9, 1.8), False, FAILS),
    ],
)
def test_verdicts_on_the_shape_of_memory(sizes, linear, verdict):
    case = SimpleNamespace(name="M1", batch=4)
    rows = [{"model": "M1", "h": h, "bytes": size} for h, size in zip((1, 2, 4), sizes, strict=True)]
    assert fig3._shape(case, rows, linear).verdict == verdict


@pytest.mark.parametrize(("last", "verdict"), [(0.04, HOLDS), (0.08, PARTLY), (0.3, FAILS)])
def test_verdicts_on_the_range_of_losses(last, verdict):
    """The horizons 2 and 4 are .1 apart after the first epoch."""
    rows = [
        {"model": case.name, "stride": "s = 1", "h": h, "epoch": epoch, "accuracy": 0.5}
        | {"loss": 1 + (apart if h == 2 else 0)}
        for case in CASES
        for h in case.horizons
        for epoch, apart in ((1, 0.1), (3, last))
    ]
    claim = fig4._claim(CASES, rows)
    assert claim.verdict == verdict
    assert f"M1 from 0.100 to {last:.3f} (of validation accuracies from 0.000 to 0.000)" in claim.found
