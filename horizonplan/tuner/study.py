"""What tuning leaves behind: the trials, the best of them, and a plan to train with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.trial import FixedTrial, FrozenTrial, TrialState

from horizonplan.plan import Plan
from horizonplan.tuner.ledger import FOUND
from horizonplan.tuner.proposals import RATE, SCHEDULE, WARMUP, Proposal, Proposals
from horizonplan.tuner.schedules import label
from horizonplan.tuner.setting import Setting
from horizonplan.tuner.trial import Trial, costs, pareto
from horizonplan.units import format_bytes, format_seconds

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Study:
    """The trials of a study.

    Attributes:
        trials: all of them, by number.
        proposals: what they chose from.
        setting: what they have in common: ``setting.plan``, whose schedules were tried; ``setting.limit_bytes``, what a
            step may need; ``setting.clock``, where the seconds come from that trials are weighed by: ``"planned"``, the
            plan's, alike for all machines and however many trials run side by side; or ``"measured"``, each trial's
            own, where ``space`` may change the model, or the plan knows no seconds.
    """

    trials: tuple[Trial, ...]
    proposals: Proposals
    setting: Setting

    @property
    def best_trials(self) -> tuple[Trial, ...]:
        """The finished trials within memory that none beats in memory, metric and time; least memory first."""
        return pareto(self.trials, self.setting.higher_is_better)

    @property
    def best(self) -> Trial:
        """The trial with the best metric among those within memory; of equals, the one with less memory, then time.

        Raises:
            ValueError: no trial finished within memory.
        """
        if not self.best_trials:
            reasons = "; ".join(dict.fromkeys(f"{t.state}: {t.reason}" for t in self.trials if t.reason))
            raise ValueError(f"no trial of {len(self.trials)} finished within memory ({reasons or 'no reason known'}).")

        def rank(trial: Trial) -> tuple[float, float, float, int]:
            memory, metric, seconds = costs(trial, self.setting.higher_is_better)
            return metric, memory, seconds, trial.number

        return min(self.best_trials, key=rank)

    @property
    def params(self) -> Mapping[str, Any]:
        """What was suggested for the best trial: ``lr``, ``warmup``, and the user's own."""
        return self.best.params

    @property
    def plan(self) -> Plan:
        """The best trial's plan."""
        return self.plan_of(self.best)

    def plan_of(self, trial: Trial) -> Plan:
        """The plan with a trial's schedule; its memory is what the trial measured, if that was of this and this alone.

        It was not if ``space`` may have changed the model, or the trial began with other horizons.
        """
        if trial not in self.trials:
            raise ValueError(f"trial {trial.number} is none of this study's.")
        rows, row = self.setting.plan.rows, trial.row
        told = [f"{name}={_shown(value)}" for name, value in trial.params.items()]
        note = f"Schedule of trial {trial.number} of {len(self.trials)}"
        note += f", trained with {', '.join(told)}" if told else ""
        note += "".join(f", {name} {value:.4g}" for name, value in trial.metrics.items()) + "."
        alone = self.setting.clock == "planned" and not trial.params.get(WARMUP)
        if trial.state == "finished" and trial.memory_bytes and alone:
            seen = replace(row, memory_bytes=trial.memory_bytes, memory_source="measured")
            rows, row = tuple(seen if one == row else one for one in rows), seen
        return replace(self.setting.plan, row=row, rows=rows, notes=(note, *self.setting.plan.notes))

    def options(self, trial: Trial | None = None) -> dict[str, Any]:
        """The arguments of :func:`horizonplan.train` that a trial (``None``: the best) was made with.

        ``plan``, ``optimizer``, ``warmup``, ``seed``, and what was given besides; not the model, the data, the epochs.
        """
        trial = self.best if trial is None else trial
        made = self._proposal(trial)
        own = {"plan": self.plan_of(trial), "optimizer": made.optimizer, "warmup": made.warmup}
        own |= {"seed": self.setting.seed}
        return {**self.setting.options, **made.train_arguments, **own}

    def model_arguments(self, trial: Trial | None = None) -> dict[str, Any]:
        """The arguments of the model's factory that a trial (``None``: the best) was made with."""
        return dict(self._proposal(self.best if trial is None else trial).model_arguments)

    def _proposal(self, trial: Trial) -> Proposal:
        return self.proposals.suggest(FixedTrial({SCHEDULE: label(trial.row), **trial.params}))

    def __str__(self) -> str:
        """The trials as a table: what is on the front is starred, the best one has an arrow."""
        front = self.best_trials
        best = self.best if front else None
        head = ["", "trial", "schedule", "parameters", "memory", self.setting.metric, "time/step", "state"]
        lines = [head]
        for trial in self.trials:
            mark = "->" if trial is best else "*" if trial in front else ""
            params = " ".join(f"{name}={_shown(value)}" for name, value in trial.params.items())
            memory = "" if trial.memory_bytes is None else format_bytes(trial.memory_bytes)
            metric = f"{trial.metrics[self.setting.metric]:.4g}" if self.setting.metric in trial.metrics else ""
            seconds = "" if trial.step_seconds is None else format_seconds(trial.step_seconds)
            why = f": {trial.reason[:60]}" if trial.reason else "" if trial.feasible else ", too large"
            lines.append(
                [mark, str(trial.number), label(trial.row), params, memory, metric, seconds, trial.state + why]
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join(rows)

    def plot(self, path: str | Path) -> None:
        """Draw the trials, memory against metric, with the front (PNG, SVG or PDF)."""
        from horizonplan.tuner.picture import draw

        draw(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The study as JSON-ready values."""
        front = self.best_trials
        return {
            "schema_version": SCHEMA_VERSION,
            "metric": self.setting.metric,
            "higher_is_better": self.setting.higher_is_better,
            "limit_bytes": self.setting.limit_bytes,
            "clock": self.setting.clock,
            "trials": [trial.to_dict() for trial in self.trials],
            "best_trials": [trial.number for trial in front],
            "best": self.best.number if front else None,
            "plan": self.plan.to_dict() if front else None,
        }

    def save(self, path: str | Path) -> None:
        """Write the study as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read(trial: FrozenTrial, rows: Mapping[str, Any]) -> Trial | None:
    """A trial as it is kept; ``None``: what it was to be made with is not known."""
    if SCHEDULE not in trial.params:
        return None
    found = trial.user_attrs.get(FOUND, {})
    return Trial(
        number=trial.number,
        state="running" if trial.state == TrialState.RUNNING else found.get("state", "failed"),
        row=rows[trial.params[SCHEDULE]],
        params=_ordered({name: value for name, value in trial.params.items() if name != SCHEDULE}),
        memory_bytes=found.get("memory_bytes"),
        metrics=found.get("metrics", {}),
        validations=tuple(found.get("validations", ())),
        step_seconds=found.get("step_seconds"),
        seconds=found.get("seconds"),
        values=None if trial.state != TrialState.COMPLETE else tuple(trial.values),
        feasible=all(value <= 0 for value in trial.constraints.values()),
        reason=found.get("reason"),
    )


def _ordered(params: Mapping[str, Any]) -> dict[str, Any]:
    """Ours first."""
    return {name: params[name] for name in sorted(params, key=lambda name: (name != RATE, name != WARMUP))}


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
