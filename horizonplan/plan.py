"""The plan: the table of candidates, the choice, why, and where each number comes from. Immutable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from horizonplan import cost as costs
from horizonplan import objective as objectives
from horizonplan.batch import ComputeLoss, LossFunction
from horizonplan.candidates import schedule_of
from horizonplan.chain import Chain
from horizonplan.cost import Cost
from horizonplan.curves import Curve
from horizonplan.explain import explain, probing_in_words, tested_in_words, text_table
from horizonplan.frontier import frontier
from horizonplan.horizons import HeldOut
from horizonplan.objective import Objective
from horizonplan.precision import autocast
from horizonplan.probes.pieces import at_most, gradient
from horizonplan.projection import Projection
from horizonplan.rows import Row
from horizonplan.savings import Saving, savings
from horizonplan.schedule import Schedule
from horizonplan.units import format_bytes

SCHEMA_VERSION = 1


def _named(device: str) -> str:
    """A device in words; described cards have their bytes in their name."""
    kind, _, size = device.partition(":")
    return f"{kind}:{format_bytes(int(size)).replace(' ', '')}" if kind == "simulated" else device


@dataclass(frozen=True)
class Plan:
    """What to train with, and everything it was chosen from.

    Attributes:
        row: the chosen row of the table.
        rows: all rows, with cost, objective and feasibility under this objective.
        depth: blocks T of the model.
        objective: what was asked for.
        cost: the price of memory.
        curves: the paper's fitted polynomials: ``"memory"`` (order 1), ``"cosine"`` (order 3).
        block_names: the blocks' names in the model.
        blocks: how the blocks were given: ``None`` (found), a pattern, or a list of names.
        notes: what a user should know before relying on the plan.
        provenance: how the numbers were made: versions, device, batches, optimiser, what probing cost.
        held_out: one more horizon than the fits were made from, predicted first and then measured.
    """

    row: Row
    rows: tuple[Row, ...]
    depth: int
    objective: Objective
    cost: Cost
    curves: Mapping[str, Curve]
    block_names: tuple[str, ...] = ()
    blocks: str | tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    held_out: tuple[HeldOut, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether the held-out measurements came out as predicted, or every horizon was measured.

        A plan of which nothing was measured is not verified, nor is one that missed in :func:`horizonplan.verify`.
        """
        if self.provenance.get("missed"):
            return False
        if self.held_out:
            return all(test.ok for test in self.held_out)
        return all(row.memory_source == "measured" for row in self.rows if row.stride == 1 and row.plain)

    @property
    def horizon(self) -> int:
        """h: blocks each gradient looks ahead."""
        return self.row.horizon

    @property
    def stride(self) -> int:
        """s: blocks between the starts of two windows."""
        return self.row.stride

    @property
    def recompute(self) -> int:
        """k: activation checkpointing every k blocks; 0 keeps the graphs."""
        return self.row.recompute

    @property
    def micro_batches(self) -> int:
        """Parts of a batch whose gradients are accumulated; 1 takes it whole."""
        return self.row.micro_batches

    @property
    def precision(self) -> str:
        """``"fp32"``: forwards as they are; ``"bf16"``: under autocast."""
        return self.row.precision

    @property
    def frontier(self) -> tuple[Row, ...]:
        """The rows that fit and are not dominated in memory, time and rate; see :func:`horizonplan.frontier`."""
        return frontier(self.rows)

    @property
    def savings(self) -> tuple[Saving, ...]:
        """Where fewer or cheaper nodes suffice, and what to train with then; empty unless nodes are bought whole."""
        return savings(self.rows, self.row, self.cost)

    @property
    def schedule(self) -> Schedule:
        """The windows to train with."""
        return schedule_of(self.row, self.depth)

    def chain(
        self,
        model: nn.Module,
        batch: Any,
        loss: LossFunction | None = None,
        compute_loss: ComputeLoss | None = None,
        projection: Projection | None = None,
    ) -> Chain:
        """See a model as this plan's chain, for a loop of your own.

        Raises:
            ValueError: the model's blocks are not those that were planned for.
        """
        blocks = self.blocks if self.blocks is None or isinstance(self.blocks, str) else list(self.blocks)
        chain = Chain.from_model(model, batch, blocks, loss, compute_loss, projection)
        if self.block_names and chain.names != self.block_names:
            raise ValueError(
                f"plan: it was made for {self.depth} blocks {self.block_names[0]!r}..{self.block_names[-1]!r}, this "
                f"model has {chain.depth}, {chain.names[0]!r}..{chain.names[-1]!r}; plan again for this model."
            )
        return chain

    def backward(self, chain: Chain, batch: Any, scale: float | Tensor = 1.0) -> Tensor:
        """Accumulate the plan's gradient into ``p.grad``, in its micro-batches and its precision.

        See :func:`horizonplan.horizon_backward`.
        """
        with autocast(self.precision, chain.device):
            return gradient(chain, batch, self.schedule, at_most(batch, self.micro_batches), scale)

    def explain(self) -> str:
        """The table and the choice in plain words."""
        known = self.provenance
        word = "Predicted for" if known.get("margin") else "Measured with"
        how = f"{word} {known['optimizer']} on {_named(known['device'])}, tensors of a batch: " if known else ""
        how += ", ".join(str(tuple(shape)) for shape, _ in known["batch"]) + "." if known else ""
        if "probing_steps" in known:
            how += " " + probing_in_words(known["probing_steps"], known["probing_seconds"])
        measured = any(row.memory_source == "measured" for row in self.rows)
        tested = tested_in_words(self.held_out, self.verified, measured, known.get("missed", ()))
        told = [*([how] if how else []), tested, *self.notes]
        return explain(self.rows, self.row, self.objective, self.cost, told)

    def table(self) -> str:
        """The table alone."""
        return text_table(self.rows, self.row)

    def plot(self, path: str | Path) -> None:
        """Draw memory, cosine and rate, and objective over the horizon into a file (PNG, SVG or PDF)."""
        from horizonplan.plot import draw

        draw(self, path)

    def plot_frontier(self, path: str | Path) -> None:
        """Draw all rows by memory and time of a step, with the frontier and the choice, into a file (PNG, SVG, PDF)."""
        from horizonplan.plot_frontier import draw

        draw(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "horizon": self.horizon,
            "stride": self.stride,
            "recompute": self.recompute,
            "depth": self.depth,
            "chosen": self.rows.index(self.row),
            "objective": self.objective.to_dict(),
            "cost": costs.to_dict(self.cost),
            "rows": [row.to_dict() for row in self.rows],
            "curves": {name: curve.to_dict() for name, curve in self.curves.items()},
            "block_names": list(self.block_names),
            "blocks": list(self.blocks) if isinstance(self.blocks, tuple) else self.blocks,
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
            "held_out": [asdict(test) for test in self.held_out],
            "verified": self.verified,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Restore a plan from ``to_dict``'s values.

        Raises:
            ValueError: the data are no plan, or one of a newer horizonplan.
        """
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if not isinstance(version, int) or version < 1:
            raise ValueError("plan: no schema_version in it, so this is no plan; make one with plan.save(path).")
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"plan: schema_version={version} is newer than this horizonplan reads ({SCHEMA_VERSION}); upgrade it."
            )
        try:
            rows = tuple(Row.from_dict(row) for row in data["rows"])
            blocks = data["blocks"]
            plan = cls(
                row=rows[data["chosen"]],
                rows=rows,
                depth=data["depth"],
                objective=objectives.from_dict(data["objective"]),
                cost=costs.from_dict(data["cost"]),
                curves={name: Curve.from_dict(curve) for name, curve in data["curves"].items()},
                block_names=tuple(data["block_names"]),
                blocks=tuple(blocks) if isinstance(blocks, list) else blocks,
                notes=tuple(data["notes"]),
                provenance=data["provenance"],
                held_out=tuple(HeldOut(**test) for test in data.get("held_out", ())),
            )
            plan.schedule  # noqa: B018 - a choice that is no schedule is no plan
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"plan: the data are damaged ({type(error).__name__}: {error}); plan again.") from error
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, no plan, or of a newer horizonplan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"plan: {path} is no JSON file ({error}); plan again.") from error
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
