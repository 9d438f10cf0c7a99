"""What requests and answers look like. All numbers are bounded, and unknown fields are refused."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from horizonplan import cost as costs
from horizonplan import measured
from horizonplan import objective as objectives
from horizonplan.cost import Cost
from horizonplan.horizons import HeldOut
from horizonplan.objective import Objective
from horizonplan.rows import Row

MOST_BYTES = 2**53  # up to here a JSON number is exact wherever it is read
MOST_POINTS = 1024
MOST_DEPTH = 10_000


def _whole(value: Any) -> Any:
    """2.0 is as whole as 2: JSON does not tell them apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # after the bounds, so that the document has these
Finite = Annotated[float, Field(allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=1, le=MOST_BYTES), WHOLE]
Price = Annotated[Finite, Field(ge=1e-12, le=1e12)]
Rate = Annotated[Finite, Field(ge=-1e6, le=1e6)]
Seconds = Annotated[Finite, Field(ge=0, le=1e9)]
Cosine = Annotated[Finite, Field(ge=-1, le=1)]
Horizon = Annotated[int, Field(ge=1, le=MOST_DEPTH), WHOLE]
Several = Annotated[int, Field(ge=2, le=MOST_DEPTH), WHOLE]
Points = Field(min_length=2, max_length=MOST_POINTS)


class Strict(BaseModel):
    """A part of a request: strings are no numbers, and what is unknown is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Accuracy(Strict):
    """The least cost at a rate of at least 1 - epsilon of back-propagation's."""

    kind: Literal["accuracy"]
    epsilon: Annotated[Finite, Field(ge=0, lt=1)]


class Weighted(Strict):
    """The least of lam x cost - rate."""

    kind: Literal["weighted"]
    lam: Annotated[Finite, Field(ge=0, le=1e12)]


class Memory(Strict):
    """The largest horizon within a limit."""

    kind: Literal["memory"]
    limit_bytes: Bytes


ObjectiveIn = Annotated[Accuracy | Weighted | Memory, Field(discriminator="kind")]


class CostIn(Strict):
    """The price of memory, in nodes: in proportion (linear), or each node begun paid in full (ladder)."""

    kind: Literal["linear", "ladder"] = "linear"
    unit_cost: Price = Field(1.0, description="Of one node, in any currency.")
    node_memory_bytes: Bytes | None = Field(None, description="Of one node. null: what back-propagation needs.")


class Card(Strict):
    """A card that can be had."""

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[ -~]+$")]
    memory_bytes: Bytes
    price: Price = Field(description="Of one card, in any currency.")


class Strided(Strict):
    """What was measured at a stride above 1; stride = horizon is disjoint windows."""

    horizon: Several
    stride: Several
    memory_bytes: Bytes
    cosine: Cosine | None = None
    rate: Rate | None = Field(None, description="Of a short run. Without it the stride is shown, and not chosen.")
    step_seconds: Seconds | None = None


class PlanRequest(Strict):
    """Measurements and an objective. `memory_bytes` and `cosine` hold one value for each of `horizons`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "depth": 12,
                    "horizons": [1, 4, 8, 12],
                    "memory_bytes": [3_000_000_000, 6_000_000_000, 10_000_000_000, 14_000_000_000],
                    "cosine": [0.4, 0.9, 0.99, 1.0],
                    "objective": {"kind": "accuracy", "epsilon": 0.1},
                    "cost": {"kind": "linear", "unit_cost": 1.0, "node_memory_bytes": 24_000_000_000},
                }
            ]
        }
    )

    depth: Several = Field(description="Blocks T of the network.")
    horizons: Annotated[
        list[Horizon], Field(min_length=2, max_length=MOST_POINTS, json_schema_extra={"uniqueItems": True})
    ]
    memory_bytes: Annotated[list[Bytes], Points] = Field(description="Peak bytes of a step.")
    cosine: Annotated[list[Cosine], Points] = Field(description="Of that gradient to back-propagation's.")
    objective: ObjectiveIn = Field(default=Accuracy(kind="accuracy", epsilon=0.1))
    cost: CostIn = Field(default=CostIn())
    rates: Annotated[list[Rate | None], Points] | None = Field(None, description="Of short runs; null: cosine squared.")
    step_seconds: Annotated[list[Seconds | None], Points] | None = None
    block_bytes: Annotated[list[Bytes], Field(min_length=2, max_length=MOST_DEPTH)] | None = Field(
        None, description="What each block's graph holds: memory between the measured horizons follows it."
    )
    strided: Annotated[list[Strided], Field(max_length=MOST_POINTS)] = []
    cards: Annotated[list[Card], Field(max_length=32)] = Field(
        [], description="Cards to choose from, bought whole. They take the place of `cost`."
    )


class ReplanRequest(Strict):
    """Another objective, another cost, or cards to choose from, which take the place of the cost."""

    objective: ObjectiveIn | None = None
    cost: CostIn | None = None
    cards: Annotated[list[Card], Field(max_length=32)] = []


class CostOut(BaseModel):
    """The price of memory."""

    kind: Literal["linear", "ladder", "callable"]
    unit_cost: float | None = None
    node_memory_bytes: int | None = None
    name: str | None = None


class ObjectiveOut(BaseModel):
    """What was asked for."""

    kind: Literal["accuracy", "weighted", "memory", "custom"]
    epsilon: float | None = None
    lam: float | None = None
    limit_bytes: int | None = None
    name: str | None = None


class CurveOut(BaseModel):
    """A polynomial in h, the highest power first, and the measurements it was fitted to."""

    quantity: Literal["memory", "cosine"]
    unit: str
    depth: int | None
    pinned: bool
    residual: float
    poor: bool
    coefficients: list[float]
    horizons: list[int]
    values: list[float]


class Summary(BaseModel):
    """A plan in a list."""

    id: str
    created: Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
    parent: str | None = Field(description="The plan that it was replanned from.")
    card: str | None = Field(description="The card that was chosen for it.")
    depth: int
    horizon: int
    stride: int
    recompute: int
    memory_bytes: int
    rate: float | None
    cost: float | None
    objective: ObjectiveOut


class PlanList(BaseModel):
    """Plans, the newest first."""

    items: list[Summary]
    next_cursor: str | None = Field(description="For the next ones; null: these were the last.")


class StoredPlan(BaseModel):
    """A plan as `Plan.save` writes it, with its id."""

    id: str
    created: Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
    parent: str | None
    card: str | None
    schema_version: int
    horizon: int
    stride: int
    recompute: int
    depth: int
    chosen: int = Field(description="The index of the chosen row.")
    objective: ObjectiveOut
    cost: CostOut
    rows: list[Row]
    curves: dict[str, CurveOut]
    block_names: list[str]
    blocks: str | list[str] | None
    notes: list[str]
    provenance: dict[str, Any]
    held_out: list[HeldOut]
    verified: bool


def objective_of(asked: Accuracy | Weighted | Memory) -> Objective:
    """The objective that a request asks for."""
    return objectives.from_dict(asked.model_dump())


def cost_of(asked: CostIn) -> Cost:
    """The cost that a request asks for."""
    return costs.from_dict(asked.model_dump())


def strided_of(asked: Sequence[Strided]) -> list[measured.Strided]:
    """Measurements at other strides."""
    return [measured.Strided(**one.model_dump()) for one in asked]


def cards_of(asked: Sequence[Card]) -> list[measured.Card]:
    """Cards."""
    return [measured.Card(**one.model_dump()) for one in asked]
