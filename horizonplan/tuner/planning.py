"""What a study is made for: the plan whose schedules it tries, what a step may need, what validation measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from horizonplan.batch import as_loader, own_generator, resolve_loss, take
from horizonplan.devices import parse_device
from horizonplan.objective import MemoryLimit, Objective
from horizonplan.plan import Plan
from horizonplan.planner import plan_horizon
from horizonplan.progress import Progress
from horizonplan.training.evaluate import Metric, rehearsed
from horizonplan.training.random_state import seeded_all
from horizonplan.tuner.proposals import Proposals
from horizonplan.tuner.record import as_json, compare, remembered
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
    options: dict[str, Any]
    seed: int
    progress: Progress

    @property
    def clock(self) -> str:
        """Whose seconds of a step count: the plan's, or each trial's own where the plan does not know them."""
        changed = self.proposals.space is not None or bool(self.options)  # which may change what a step takes
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
        place = None if card is not None else self._place()
        if place is not None and place.type == "cuda":
            known.append(int(torch.cuda.get_device_properties(place).total_memory))
        return min((limit for limit in known if limit is not None), default=None)

    def _place(self) -> torch.device | None:
        """The device that trials train on; ``None``: the model has no parameters to tell."""
        if self.device is not None:
            return torch.device(self.device)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return next((p.device for p in self.example().parameters()), None)

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

    def _check_blocks(self, plan: Plan) -> None:
        """See that the plan is for this model, before trials are spent on finding that it is not."""
        model, loader = self.example(), as_loader(made(self.data))
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        with own_generator(loader):
            (first,) = take(loader, 1, place)
        plan.chain(model, first, **self.how)

    def complete(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings with what a step may need, as a study remembers them."""
        return {name: remembered(value) for name, value in {**settings, "memory_limit": self.limit_bytes}.items()}

    def record(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What a new study keeps, and its first trials."""
        how = {name: value for name, value in self.how.items() if value is not None}
        plan, limit = self.plan, self.limit_bytes
        if plan is not None:
            self._check_blocks(plan)
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
        rows = to_train(plan, self.schedules, limit)
        values = ["memory_bytes", str(settings["metric"]), "step_seconds"]
        kept = {"values": values, "settings": self.complete(settings), "plan": plan.to_dict(), "schedules": list(rows)}
        return as_json(kept), replace(self.proposals, rows=rows).first()


def recall(record: Mapping[str, Any], asked: Asked, settings: Mapping[str, Any], name: str) -> tuple[Plan, Asked]:
    """A study's plan, and what was asked for with that plan and its schedules.

    Raises:
        ValueError: the study was made with another plan, or other settings.
    """
    if asked.plan is not None and as_json(asked.plan.to_dict()) != record["plan"]:
        raise ValueError(
            f"plan: the study {name!r} in this storage has another one; leave plan out, or give another name."
        )
    base = asked.plan if asked.plan is not None else Plan.from_dict(record["plan"])
    named = {label(row): row for row in reversed(base.rows)}
    rows = {schedule: named[schedule] for schedule in record["schedules"]}
    asked = replace(asked, plan=base, proposals=replace(asked.proposals, rows=rows))
    compare(record, asked.complete(settings), name)
    return base, asked
