"""The auto-tuner: its trials, their count, what is never trained, what survives, and what comes of it."""

import copy
import dataclasses
import itertools
import json
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pytest
import torch
import tuner_job
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import horizonplan as hp
from horizonplan.rows import Row
from horizonplan.schedule import Schedule
from horizonplan.tuner import work
from horizonplan.tuner.planning import Asked
from horizonplan.tuner.predicted import Step
from horizonplan.tuner.proposals import Proposals
from horizonplan.tuner.schedules import contenders, label, to_train
from horizonplan.tuner.storage import opened
from horizonplan.tuner.trial import pareto

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def plan():
    return hp.plan_horizon(tuner_job.model(), tuner_job.dataset(), candidates="all", rollout_steps=0, batches=1)


@pytest.fixture
def tune(plan):
    """Tune the small model in this process."""

    def run(trials=3, model=None, **options):
        settings = {"plan": plan, "workers": 0, "epochs": 2, "progress": False, **options}
        data, val_data = tuner_job.dataset(), tuner_job.dataset(32)
        return hp.tune_horizon(model or tuner_job.model(), data, val_data=val_data, trials=trials, **settings)

    return run


@pytest.fixture
def trained(monkeypatch):
    """What training is called with, in this process."""
    calls = []

    def spy(model, data, **options):
        calls.append((model, options))
        return hp.train(model, data, **options)

    monkeypatch.setattr(work, "train", spy)
    return calls


def summary(study):
    """What must be the same when a study is repeated: everything but measured time."""
    return [(t.number, t.state, t.row, t.params, t.memory_bytes, t.metrics, t.values, t.reason) for t in study.trials]


def states(study):
    return [trial.state for trial in study.trials]


def test_first_trials_are_the_schedules_of_the_plan_its_own_first(tune, plan):
    study = tune(trials=3)
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    assert states(study) == ["finished"] * 3
    assert study.trials[0].row == plan.row
    assert len({label(trial.row) for trial in study.trials}) == 3
    assert [trial.params["lr"] for trial in study.trials] == pytest.approx([1e-3] * 3)
    assert {trial.params["warmup"] for trial in study.trials} == {0}


def test_trial_is_a_training_run_with_its_options(tune):
    study = tune(trials=3)
    for trial in study.trials:
        result = hp.train(
            tuner_job.model(),
            tuner_job.dataset(),
            val_data=tuner_job.dataset(32),
            epochs=2,
            **study.options(trial),
        )
        assert result.val_metrics == trial.metrics
        assert result.peak_bytes == trial.memory_bytes
        assert list(trial.validations) == [{"loss": v["loss"], "accuracy": v["accuracy"]} for v in result.validations]


def test_model_is_left_as_it_is(tune):
    model = tuner_job.model()
    before = copy.deepcopy(model.state_dict())
    drawn = torch.random.get_rng_state()
    tune(trials=2, model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_plan_is_that_of_the_best_metric_and_trains(tune, tmp_path):
    study = tune(trials=4)
    best = min(study.trials, key=lambda t: (t.metrics["loss"], t.memory_bytes))
    assert study.best.metrics["loss"] == best.metrics["loss"]
    assert label(study.plan.row) == label(study.best.row)
    assert study.plan.row.memory_bytes == study.best.memory_bytes
    assert study.params == study.best.params
    study.plan.save(tmp_path / "plan.json")
    loaded = hp.Plan.load(tmp_path / "plan.json")
    assert loaded == study.plan
    assert hp.train(tuner_job.model(), tuner_job.dataset(), plan=loaded).history


def test_accuracy_is_the_better_the_higher(tune):
    study = tune(trials=4, metric="accuracy")
    assert study.best.metrics["accuracy"] == max(trial.metrics["accuracy"] for trial in study.trials)


def test_same_seed_same_trials(tune):
    """Twelve: from the eleventh on proposals depend on what came of those before."""
    first, second, other = tune(trials=12), tune(trials=12), tune(trials=6, seed=1)
    assert summary(first) == summary(second)
    assert summary(first)[:6] != summary(other)


def test_broken_off_study_goes_on_as_if_it_had_not_been(tune, tmp_path, monkeypatch):
    """Between trials, and in the sixth and the ninth."""
    for trials in (1, 5, 5):
        tune(trials=trials, storage=tmp_path / "study.log")
    for before in (0, 3):
        with monkeypatch.context() as broken:
            broken.setattr(work, "train", interrupted(before))
            with pytest.raises(KeyboardInterrupt):
                tune(trials=12, storage=tmp_path / "study.log")
    study = tune(trials=12, storage=tmp_path / "study.log")
    assert summary(tune(trials=3, storage=tmp_path / "study.log")) == summary(study)
    assert [one[1:] for one in summary(study)] == [one[1:] for one in summary(tune(trials=12))]


def interrupted(after):
    """Training that is broken off after so many runs."""
    runs = itertools.count()

    def train(*given, **options):
        if next(runs) == after:
            raise KeyboardInterrupt
        return hp.train(*given, **options)

    return train


def test_resume_needs_no_plan_and_refuses_other_settings(tune, plan, tmp_path):
    there = {"storage": tmp_path / "study.log"}
    tune(trials=2, **there)
    assert tune(trials=3, plan=None, **there).setting.plan == plan
    for changed in ({"epochs": 3}, {"metric": "accuracy"}, {"learning_rates": (1e-3, 1e-2)}, {"schedules": 2}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            tune(**changed, **there)
    others = {
        "optimizer": torch.optim.SGD,
        "prune": False,
        "options": {"max_grad_norm": 1.0},
        "space": tuner_job.decays,
    }
    for name, value in {**others, "higher_is_better": True}.items():
        with pytest.raises(ValueError, match=f"^{name}="):
            tune(trials=3, **{name: value}, **there)
    with pytest.raises(ValueError, match="plan: the study"):
        tune(plan=replace(plan, notes=("another",)), **there)
    assert len(tune(trials=1, epochs=3, name="another", **there).trials) == 1


def test_study_of_a_plan_with_a_limit_is_resumed_without_the_plan(tune, plan, tmp_path):
    limit = max(row.memory_bytes for row in plan.rows) + 1
    there = {"storage": tmp_path / "study.log"}
    tune(trials=1, plan=replace(plan, objective=hp.MemoryLimit(limit)), **there)
    study = tune(trials=2, plan=None, **there)
    assert (study.setting.limit_bytes, len(study.trials)) == (limit, 2)


@pytest.mark.parametrize("given", [{"space": tuner_job.accumulates}, {"options": {"accumulate": 2}}])
def test_where_a_step_may_be_another_the_trials_own_seconds_and_no_memory_of_theirs_count(tune, plan, given):
    study = tune(trials=3, max_warmup=0, schedules=1, **given)
    assert study.setting.clock == "measured"
    assert [trial.values[2] for trial in study.trials] == [trial.step_seconds for trial in study.trials]
    assert {study.plan_of(trial).row for trial in study.trials} == {plan.row}


def test_plan_of_a_trial_is_judged_by_what_it_measured(tune, plan):
    """Oracle: the objective's own evaluation; the device's own needs, 1000 bytes, stay."""
    rows = tuple(
        replace(row, memory_bytes=4 * row.memory_bytes, device_bytes=4 * row.memory_bytes + 1000, fits=False)
        for row in plan.rows
    )
    chosen = rows[plan.rows.index(plan.row)]
    stale = {"fits": True, "nvml_bytes": chosen.device_bytes, "cost": -1.0, "feasible": False}
    rows = (replace(chosen, **stale), *rows)
    study = tune(trials=1, plan=replace(plan, rows=rows, row=rows[0]), schedules=1)
    (trial,) = study.trials
    row = study.plan.row
    assert row in study.plan.rows
    assert (row.memory_bytes, row.memory_source) == (trial.memory_bytes, "measured")
    assert (row.device_bytes, row.nvml_bytes, row.fits) == (trial.memory_bytes + 1000, trial.memory_bytes + 1000, True)
    assert (row.cost, row.feasible) == (float(plan.cost(trial.memory_bytes)), True)


@pytest.mark.parametrize(("harm", "words"), [("raises", "a bug in the model"), ("runs_out", "out of memory")])
def test_trial_that_raises_has_failed_and_the_study_goes_on(tune, harm, words):
    study = tune(trials=4, model=tuner_job.maker, space=lambda t: {"model": {"harm": harm if t.number == 1 else None}})
    assert states(study) == ["finished", "failed", "finished", "finished"]
    assert words in study.trials[1].reason
    assert 1 not in [trial.number for trial in study.best_trials]


def test_trial_that_runs_out_of_an_emulated_cards_memory_has_failed(tune, plan):
    """The plan is made to say that all rows need next to nothing."""
    rows = tuple(replace(row, memory_bytes=1) for row in plan.rows)
    liar = replace(plan, rows=rows, row=rows[plan.rows.index(plan.row)])
    study = tune(trials=3, plan=liar, device="emulated:6KiB")
    assert "failed" in states(study)
    for trial in study.trials:
        assert trial.state == "finished" or "OutOfMemoryError" in trial.reason
        assert trial.state == "failed" or trial.memory_bytes <= 6 * 1024


def test_what_is_predicted_not_to_fit_is_never_trained(tune, plan, trained):
    sizes = sorted(row.memory_bytes for row in to_train(plan, len(plan.rows), None).values())
    limit = sizes[len(sizes) // 2]
    study = tune(trials=14, memory_limit=limit, max_warmup=0)
    assert len(trained) == 14
    assert all(options["plan"].row.memory_bytes <= limit for _, options in trained)
    assert max(sizes) > limit
    assert study.setting.limit_bytes == limit
    with pytest.raises(ValueError, match=r"no schedule fits 1 B.*memory_limit"):
        tune(memory_limit=1)


def test_warm_up_that_is_predicted_not_to_fit_is_never_trained(tune, plan, trained):
    """A warm-up's windows keep their graphs, so that one before checkpointing can need more than it."""
    row = next(row for row in plan.rows if row.recompute == 2)
    plain = tune(trials=5, plan=replace(plan, row=row), schedules=1, max_warmup=1)
    by_warmup = {trial.params["warmup"]: trial.memory_bytes for trial in plain.trials}
    assert by_warmup[0] < by_warmup[1]
    trained.clear()
    study = tune(trials=5, plan=replace(plan, row=row), schedules=1, max_warmup=1, memory_limit=by_warmup[0])
    assert {options["warmup"] for _, options in trained} == {0}
    assert {t.state for t in study.trials if t.params["warmup"]} == {"pruned"}


def test_model_of_another_size_is_predicted_before_it_is_trained(tune, trained):
    limit = 100_000

    def space(trial):
        return {"model": {"width": trial.suggest_categorical("width", [8, 256])}}

    study = tune(trials=4, schedules=1, model=tuner_job.maker, space=space, memory_limit=limit)
    assert {trial.params["width"] for trial in study.trials} == {8, 256}
    for trial in study.trials:
        assert (trial.state == "pruned") == (trial.params["width"] == 256) == (not trial.feasible)
    assert {model.stem.out_features for model, _ in trained} == {8}
    assert all(trial.memory_bytes > limit and "not trained" in trial.reason for trial in study.trials if trial.reason)


def in_parts(plan, most):
    """The plan with its row of that many micro-batches, and nothing recomputed, chosen."""
    return replace(plan, row=next(row for row in plan.rows if (row.micro_batches, row.recompute) == (most, 0)))


@pytest.mark.parametrize(
    "given",
    [
        {"micro_batches": 8},
        {"micro_batches": 2, "train": {"accumulate": 3}},
        {"train": {"accumulate": 4}},
        {"train": {"precision": "bf16"}},
    ],
    ids=str,
)
def test_step_in_parts_or_another_precision_is_predicted_as_it_is_made(tune, plan, given):
    """Oracle: the tracked peak of the trial itself, a model's of a wider kind."""
    chosen = in_parts(plan, given.get("micro_batches", 1))

    def space(trial):
        return {"model": {"width": 64}, "train": given.get("train", {})}

    how = {"plan": chosen, "schedules": 1, "max_warmup": 0, "model": tuner_job.maker, "space": space, "trials": 1}
    (seen,) = tune(**how).trials
    (fitting,) = tune(**how, memory_limit=round(1.03 * seen.memory_bytes)).trials
    assert (fitting.state, fitting.memory_bytes) == ("finished", seen.memory_bytes)
    (pruned,) = tune(**how, memory_limit=round(0.97 * seen.memory_bytes)).trials
    assert pruned.state == "pruned"
    assert pruned.memory_bytes == pytest.approx(seen.memory_bytes, rel=0.03)


def test_model_that_asks_for_values_is_predicted_by_a_run_that_leaves_it_as_it_was():
    plain, asking = tuner_job.model(), tuner_job.model()
    asking.blocks = nn.ModuleList(tuner_job.Asking(block) for block in asking.blocks)
    before = copy.deepcopy(asking.state_dict())
    step = Step(torch.optim.AdamW, None, 2, 2, "fp32", False, {})
    batch, schedules = tuner_job.dataset()[:], [Schedule.horizon(tuner_job.DEPTH, 2)]
    assert step.peak_bytes(asking, batch, schedules) == step.peak_bytes(plain, batch, schedules)
    assert all(torch.equal(value, before[name]) for name, value in asking.state_dict().items())


def test_trial_whose_warm_up_is_predicted_sees_the_data_in_their_order(plan):
    """A loader's own generator is where it was: a trial is repeated by training with its options."""

    def data():
        own = torch.Generator().manual_seed(5)
        return DataLoader(tuner_job.dataset(), batch_size=8, shuffle=True, generator=own)

    row = next(row for row in plan.rows if row.horizon == tuner_job.DEPTH and row.plain)
    how = {"val_data": tuner_job.dataset(32), "epochs": 2, "progress": False}
    given = {"plan": replace(plan, row=row), "trials": 4, "schedules": 1, "max_warmup": 1, "memory_limit": "1GiB"}
    study = hp.tune_horizon(tuner_job.model(), data(), workers=0, prune=False, **given, **how)
    assert {trial.params["warmup"] for trial in study.trials} == {0, 1}
    for trial in study.trials:
        result = hp.train(tuner_job.model(), data(), **how, **study.options(trial))
        assert result.val_metrics == trial.metrics


def test_memory_of_the_card_that_the_model_is_on_is_the_limit(plan, monkeypatch):
    """There need not be a card here: the model says that it is on one, and torch how large that is."""

    class Elsewhere(nn.Module):
        def parameters(self, recurse=True):
            yield SimpleNamespace(device=torch.device("cuda:1"))

    sizes = {torch.device("cuda:1"): SimpleNamespace(total_memory=12345)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    for model in (Elsewhere(), Elsewhere):
        assert asked(model, plan).limit_bytes == 12345
        assert asked(model, plan, device="cpu").limit_bytes is None


def asked(model, plan, device=None):
    given = {"data": None, "val_data": None, "how": {}, "metrics": None, "objective": plan.objective, "blocks": None}
    given |= {"schedules": 1, "memory_limit": None, "options": {}, "seed": 0, "progress": False}
    proposals = Proposals({}, torch.optim.SGD, None, 0, None, not isinstance(model, nn.Module))
    return Asked(model=model, plan=plan, device=device, proposals=proposals, **given)


def test_beyond_its_memory_a_trial_is_not_among_the_best(tune, plan):
    """Planned rows that need less than they say are found out."""
    rows = tuple(replace(row, memory_bytes=row.memory_bytes // 4) for row in plan.rows)
    liar = replace(plan, rows=rows, row=rows[plan.rows.index(plan.row)])
    seen = tune(trials=4)
    limit = sorted(trial.memory_bytes for trial in seen.trials)[1]
    study = tune(trials=4, plan=liar, memory_limit=limit)
    assert [trial.feasible for trial in study.trials] == [trial.memory_bytes <= limit for trial in study.trials]
    assert not all(trial.feasible for trial in study.trials)
    assert all(trial.memory_bytes <= limit for trial in study.best_trials)


def test_diverged_trial_is_pruned(tune):
    study = tune(trials=2, learning_rates=None, optimizer=torch.optim.SGD, space=lambda t: {"optimizer": {"lr": 1e38}})
    assert states(study) == ["pruned"] * 2
    assert all(trial.reason.startswith("diverged") for trial in study.trials)
    with pytest.raises(ValueError, match=r"no trial of 2 finished.*diverged"):
        study.plan  # noqa: B018


@pytest.mark.parametrize("prune", [True, False])
def test_trial_worse_than_the_median_is_ended_after_that_epoch(tune, prune):
    study = tune(
        trials=6,
        epochs=3,
        schedules=1,
        learning_rates=None,
        optimizer=torch.optim.SGD,
        space=lambda t: {"optimizer": {"lr": 1e-9 if t.number in (0, 4) else 0.1 + t.number / 100}},
        max_warmup=0,
        prune=prune,
    )
    assert states(study)[:4] == ["finished"] * 4  # with less than three peers none is ended
    assert (study.trials[4].state, len(study.trials[4].validations)) == (("pruned", 1) if prune else ("finished", 3))
    assert len(study.trials[5].validations) == 3


def test_trials_are_held_against_schedules_as_cheap_only(tune, plan):
    """Every third trial does not learn. Which of them are ended is told by the rule written out."""
    rows = sorted(to_train(plan, 6, None).values(), key=lambda row: row.memory_bytes)
    cheap, dear = replace(rows[0], step_seconds=0.5), replace(rows[-1], step_seconds=1.0)
    study = tune(
        trials=13,
        plan=replace(plan, rows=(dear, cheap), row=dear),
        learning_rates=None,
        optimizer=torch.optim.SGD,
        space=lambda t: {"optimizer": {"lr": 1e-9 if t.number % 3 == 2 else 0.1}},
        max_warmup=0,
    )

    def worse(trial, peers):
        seen = [peer.validations[0]["loss"] for peer in peers]
        return len(seen) >= 3 and trial.validations[0]["loss"] > statistics.median(seen)

    spared = 0
    for trial in study.trials:
        before = [t for t in study.trials[: trial.number] if t.state == "finished"]
        as_cheap = [t for t in before if t.row == trial.row or trial.row == dear]
        assert (trial.state == "pruned") == worse(trial, as_cheap)
        spared += worse(trial, before) and not worse(trial, as_cheap)
    assert "pruned" in states(study)
    assert spared


VALUES = st.tuples(*[st.integers(0, 3).map(float)] * 3)


@given(st.lists(VALUES, max_size=12), st.booleans())
def test_front_is_optunas(points, higher):
    directions = ["minimize", "maximize" if higher else "minimize", "minimize"]
    study = optuna.create_study(directions=directions)
    for values in points:
        study.add_trial(optuna.create_trial(values=values))
    row = Row(horizon=1, memory_bytes=1)
    ours = [hp.Trial(number=i, state="finished", row=row, values=v) for i, v in enumerate(points)]
    ours += [hp.Trial(number=90, state="finished", row=row, values=(-1.0, 0.0, -1.0), feasible=False)]
    ours += [hp.Trial(number=91, state="pruned", row=row), hp.Trial(number=92, state="failed", row=row)]
    assert sorted(t.number for t in pareto(ours, higher)) == sorted(t.number for t in study.best_trials)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=10))
def test_schedules_are_those_that_nothing_beats(points):
    rows = [
        Row(horizon=i + 1, memory_bytes=m, step_seconds=float(s), rate=float(r)) for i, (m, s, r) in enumerate(points)
    ]
    found = contenders(rows)
    costs = {row.horizon: (row.memory_bytes, row.step_seconds, -row.rate) for row in rows}

    def beaten(own):
        return any(o != own and all(a <= b for a, b in zip(o, own, strict=True)) for o in costs.values())

    assert found == [row for row in rows if not beaten(costs[row.horizon])]


def test_a_plan_of_another_model_is_refused_before_any_trial(tune, plan, trained):
    strange = dataclasses.replace(plan, block_names=tuple(f"stages.{t}" for t in range(plan.depth)))
    with pytest.raises(ValueError, match=r"it was made for \d+ blocks 'stages\.0'"):
        tune(plan=strange)
    assert not trained


def test_of_exact_ways_which_train_alike_the_smallest_and_the_fastest_are_tried():
    parts = [
        Row(horizon=4, micro_batches=n, memory_bytes=100 // n, step_seconds=float(n), rate=1.0, cosine_source="derived")
        for n in (1, 2, 4, 8)
    ]
    window = Row(horizon=2, memory_bytes=30, step_seconds=1.5, rate=0.9, rate_source="measured")
    assert contenders([*parts, window]) == [parts[0], parts[3], window]


def row(horizon, memory, seconds, rate, source, **others):
    return Row(horizon=horizon, memory_bytes=memory, step_seconds=seconds, rate=rate, rate_source=source, **others)


def test_derived_rate_beats_no_measured_one_and_an_unknown_rate_beats_nothing():
    exact = {"cosine_source": "derived", "rate": 1.0, "source": "derived"}
    measured, derived = row(3, 100, 1.0, 0.7, "measured"), row(2, 90, 1.0, 0.9, "derived")
    whole, again = row(4, 200, 1.0, **exact), row(4, 120, 1.4, **exact, recompute=2)
    unknown = row(4, 110, 1.2, None, "unmeasured", micro_batches=2)
    worse = row(1, 95, 1.1, 0.8, "derived")
    assert contenders([measured, derived, whole, again, unknown, worse]) == [measured, derived, whole, again, unknown]


def test_without_seconds_flops_are_the_time():
    rows = [row(h, 100 - h, None, 0.5, "derived", flops=flops) for h, flops in [(1, 5), (2, 4), (3, 9)]]
    assert contenders(rows) == rows[1:]


def test_label_tells_all_ways_of_a_table_apart(plan):
    assert len({label(row) for row in plan.rows}) == len(plan.rows)


def test_trials_are_those_of_optuna(tune, tmp_path):
    """Whoever opens the journal with Optuna sees the same trials, values and constraints."""
    study = tune(trials=4, storage=tmp_path / "study.log", memory_limit="1GiB")
    with opened(tmp_path / "study.log") as storage:
        theirs = optuna.load_study(study_name="horizonplan", storage=storage)
    complete = theirs.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert [(t.number, tuple(t.values)) for t in complete] == [(t.number, t.values) for t in study.trials]
    assert {t.number for t in theirs.best_trials} == {t.number for t in study.best_trials}
    assert [t.constraints["memory"] for t in complete] == [t.memory_bytes - 2**30 for t in study.trials]


@pytest.mark.parametrize("torn", [b'{"op_code": 4, "worker_id"', b"{", b'{"a":1}'])
def test_record_that_was_cut_off_costs_nothing_else(tune, tmp_path, torn):
    path = tmp_path / "study.log"
    before = tune(trials=2, storage=path)
    path.write_bytes(path.read_bytes() + torn)
    after = tune(trials=3, storage=path)
    assert summary(after)[:2] == summary(before)
    assert summary(tune(trials=3, storage=path)) == summary(after)


def test_study_shows_itself(tune, tmp_path):
    study = tune(trials=3)
    lines = str(study).splitlines()
    assert len(lines) == 4
    assert [line.startswith("->") for line in lines[1:]] == [trial is study.best for trial in study.trials]
    study.save(tmp_path / "study.json")
    saved = json.loads((tmp_path / "study.json").read_text())
    assert [trial["horizon"] for trial in saved["trials"]] == [trial.row.horizon for trial in study.trials]
    assert saved["best_trials"] == [trial.number for trial in study.best_trials]
    assert hp.Plan.from_dict(saved["plan"]) == study.plan
    study.plot(tmp_path / "study.svg")
    assert (tmp_path / "study.svg").read_text().count("<!-- h=") == len(study.best_trials)


def test_metric_that_is_not_a_number_is_null(tune, tmp_path):
    study = tune(trials=2, metrics={"odd": tuner_job.not_a_number})
    assert all(math.isnan(trial.metrics["odd"]) for trial in study.trials)
    study.save(tmp_path / "study.json")
    saved = json.loads((tmp_path / "study.json").read_text())["trials"]
    assert [trial["metrics"]["odd"] for trial in saved] == [None, None]
    assert [trial["validations"][1]["odd"] for trial in saved] == [None, None]
    assert [trial["metrics"]["loss"] for trial in saved] == [trial.metrics["loss"] for trial in study.trials]


def test_trial_that_space_prunes_is_one_of_the_study(tune, tmp_path):
    def space(trial):
        width = trial.suggest_categorical("width", [8, 16])
        if trial.number == 1:
            raise optuna.TrialPruned("too wide")
        return {"model": {"width": width}}

    there = {"model": tuner_job.maker, "space": space, "storage": tmp_path / "study.log"}
    study = tune(trials=3, **there)
    assert states(study) == ["finished", "pruned", "finished"]
    assert study.trials[1].reason == "space pruned it: too wide"
    assert summary(tune(trials=3, **there)) == summary(study)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trials": 0}, "trials=0"),
        ({"workers": -1}, "workers=-1"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"learning_rates": (1e-2, 1e-4)}, "least <= largest"),
        ({"learning_rates": (0, 1e-4)}, "least <= largest"),
        ({"learning_rates": (1e-3,)}, "least and the largest"),
        ({"max_warmup": 2}, "max_warmup=2"),
        ({"max_warmup": 1, "epochs": 1}, "max_warmup=1"),
        ({"timeout_seconds": math.inf}, "timeout_seconds"),
        ({"metric": "bleu"}, "higher_is_better"),
        ({"metric": "bleu", "higher_is_better": True}, "loss, accuracy"),
        ({"val_data": None}, "val_data=None"),
        ({"memory_limit": "lots"}, "memory_limit='lots'"),
        ({"device": "simulated:1GiB"}, "cannot|nothing can be trained"),
        ({"options": {"epochs": 2}}, "options: 'epochs'"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)}, "optimizer="),
        ({"optimizer": lambda params: torch.optim.SGD(params)}, "learning_rates=None"),
        ({"space": lambda trial: 3}, "dict of dicts"),
        ({"space": lambda trial: {"weights": {}}}, "the parts are model, optimizer, train"),
        ({"space": lambda trial: {"model": {"width": 3}}}, "not a module"),
        ({"space": lambda trial: {"train": {"epochs": 3}}}, "space: 'epochs'"),
        ({"space": lambda trial: {"optimizer": {"lr": 3}}}, "learning_rates=None"),
        ({"space": lambda t: {"optimizer": {"weight_decay": t.suggest_float("lr", 0, 1)}}}, "suggests 'lr'"),
        ({"storage": "/nowhere/study.log"}, "no folder /nowhere"),
        ({"storage": "nonsense://x"}, "storage='nonsense://x'"),
        ({"model": lambda: 3}, "returned a int"),
        ({"model": lambda width: tuner_job.model()}, "give them defaults"),
    ],
)
def test_bad_arguments_are_named(plan, options, words):
    given = {"model": tuner_job.model(), "data": tuner_job.dataset(), "val_data": tuner_job.dataset(32), **options}
    with pytest.raises(ValueError, match=words):
        hp.tune_horizon(**{"plan": plan, "workers": 0, "trials": 2, "epochs": 2, "progress": False, **given})


@pytest.mark.parametrize("name", ["model", "val_data", "optimizer"])
def test_what_cannot_go_to_another_process_is_named(plan, name):
    data = tuner_job.dataset(32)
    closures = {
        "model": lambda: tuner_job.model(),
        "val_data": lambda: data,
        "optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr),
    }
    given = {"model": tuner_job.model(), "data": data, "val_data": data, name: closures[name]}
    with pytest.raises(ValueError, match=rf"^{name}: it cannot go .*workers=0"):
        hp.tune_horizon(**given, plan=plan, trials=1, progress=False)


@pytest.mark.slow
def test_processes_make_what_this_one_does(tune):
    here, there = tune(trials=4), tune(trials=4, workers=2)
    assert summary(here) == summary(there)


@pytest.mark.slow
def test_trial_that_crashes_ends_no_other(tune):
    study = tune(trials=5, workers=1, model=tuner_job.maker, space=tuner_job.harms)
    assert states(study) == ["finished", "failed", "failed", "failed", "finished"]
    words = "SIGKILL", "a bug in the model", "out of memory"
    assert all(said in trial.reason for said, trial in zip(words, study.trials[1:4], strict=True))


@pytest.mark.slow
def test_trial_that_takes_too_long_has_failed(tune):
    study = tune(trials=1, workers=1, timeout_seconds=25.0, model=tuner_job.maker, space=tuner_job.hangs)
    assert states(study) == ["failed"]
