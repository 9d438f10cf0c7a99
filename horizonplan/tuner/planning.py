"""What a study is made for: the plan whose schedules it tries, what a step may need, what validation measures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from horizonplan.batch import as_loader, resolve_loss
from horizonplan.devices import parse_device
from horizonplan.objective import MemoryLimit, Objective
from horizonplan.plan import Plan
from horizonplan.planner import plan_horizon
from horizonplan.progress import Progress
from horizonplan.rows import Row
from horizonplan.training.evaluate import Metric, rehearsed
from horizonplan.training.random_state import seeded_all
from horizonplan.tuner.proposals import Proposals
from horizonplan.tuner.schedules import label, to_train
from horizonplan.tuner.work import Model, built, made


@dataclass(frozen=True)
class Asked:
    """What was asked for, as far as planning needs it."""

    model: Model
    data: Any
    val_data: Any
    plan: Plan | None
    how: Mapping[str, Any]
    device: str | torch.device | None
    metrics: Mapping[str, Metric] | None
    objective: Objective
    blocks: str | Sequence[str] | None
    schedules: int
    memory_limit: int | None
    proposals: Proposals
    seed: int
    progress: Progress

    @property
    def clock(self) -> str:
        """Whose seconds of a step count: the plan's, or each trial's own where the plan does not know them."""
        changed = self.proposals.factory and self.proposals.space is not None  # perhaps a model of another size
        known = all(row.step_seconds is not None for row in self.proposals.rows.values())
        return "planned" if known and not changed else "measured"

    @property
    def limit_bytes(self) -> int | None:
        """What a step may need, by the least of the limits there are."""
        card = parse_device(self.device)
        if card is not None and card.kind == "simulated":
            raise ValueError(f"device={self.device!r}: nothing can be trained on a card that is not there.")
        objective = self.objective if self.plan is None else self.plan.objective
        known = [self.memory_limit, None if card is None else card.memory_bytes]
        known += [objective.limit_bytes] if isinstance(objective, MemoryLimit) else []
        place = None if card is not None or self.device is None else torch.device(self.device)
        if place is not None and place.type == "cuda":
            known.append(int(torch.cuda.get_device_properties(place).total_memory))
        return min((limit for limit in known if limit is not None), default=None)

    def example(self) -> nn.Module:
        """The model to plan for, which is the user's own if it is a module."""
        if isinstance(self.model, nn.Module):
            return self.model
        try:
            with seeded_all(self.seed):
                return built(self.model, {})
        except TypeError as error:
            raise ValueError(f"model: calling it without arguments raised {error}; give them defaults.") from error

    def check_metric(self, metric: str) -> None:
        """See that validation measures it.

        Raises:
            ValueError: it does not.
        """
        if self.val_data is None:
            raise ValueError("val_data=None: trials are judged by it; give some.")
        model, batches = self.example(), as_loader(made(self.val_data))
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        compute = resolve_loss(self.how["loss"], self.how["compute_loss"])
        known = rehearsed(model, batches, compute, place, self.metrics)
        if metric not in known:
            raise ValueError(f"metric={metric!r}: validation measures {', '.join(known)}; give one of these.")

    def record(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What a new study keeps, and its first trials."""
        how = {name: value for name, value in self.how.items() if value is not None}
        plan = self.plan
        if plan is None:
            plan = plan_horizon(
                self.example(),
                made(self.data),
                blocks=self.blocks,
                objective=self.objective,
                candidates="all",
                optimizer=self.proposals.plain_optimizer(),
                device=self.device,
                seed=self.seed,
                progress=self.progress,
                **how,
            )
        rows = to_train(plan, self.schedules, self.limit_bytes)
        values = ["memory_bytes", str(settings["metric"]), "step_seconds"]
        kept = {"values": values, "settings": dict(settings), "plan": plan.to_dict(), "schedules": list(rows)}
        return as_json(kept), replace(self.proposals, rows=rows).first()


def recall(
    record: Mapping[str, Any], asked: Asked, settings: Mapping[str, Any], name: str
) -> tuple[Plan, dict[str, Row]]:
    """A study's plan, and its schedules by name.

    Raises:
        ValueError: the study was made with other settings.
    """
    where = f"the study {name!r} in this storage"
    for key, value in as_json(settings).items():
        if record["settings"][key] != value:
            then = record["settings"][key]
            raise ValueError(f"{key}={value!r}: {where} was made with {then!r}; give that, or another name.")
    if asked.plan is not None and as_json(asked.plan.to_dict()) != record["plan"]:
        raise ValueError(f"plan: {where} has another one; leave plan out, or give another name.")
    base = asked.plan if asked.plan is not None else Plan.from_dict(record["plan"])
    named = {label(row): row for row in reversed(base.rows)}
    return base, {schedule: named[schedule] for schedule in record["schedules"]}


def as_json(value: Any) -> Any:
    """The value as it comes back from a file."""
    return json.loads(json.dumps(value, allow_nan=False))
