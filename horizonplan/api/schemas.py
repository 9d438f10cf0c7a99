"""What requests and answers look like. All numbers are bounded, and unknown fields are refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from horizonplan import cost as costs
from horizonplan import objective as objectives
from horizonplan.cost import Cost
from horizonplan.objective import Objective

MOST_BYTES = 2**60
MOST_POINTS = 1024


def _whole(value: Any) -> Any:
    """2.0 is as whole as 2; JSON does not tell them apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
Bytes = Annotated[int, Whole, Field(ge=1, le=MOST_BYTES)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """A part of a request: strings are no numbers, and what is unknown is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Accuracy(Strict):
    """The least cost at a rate of at least 1 - epsilon."""

    kind: Literal["accuracy"]
    epsilon: Annotated[Number, Field(ge=0, lt=1)]


class Weighted(Strict):
    """The least of lam x cost - rate."""

    kind: Literal["weighted"]
    lam: Annotated[Number, Field(ge=0, le=1e12)]


class Memory(Strict):
    """The largest horizon within a limit."""

    kind: Literal["memory"]
    limit_bytes: Bytes


ObjectiveIn = Annotated[Accuracy | Weighted | Memory, Field(discriminator="kind")]


class CostIn(Strict):
    """The price of memory, in nodes."""

    kind: Literal["linear", "ladder"] = "linear"
    unit_cost: Annotated[Number, Field(gt=0, le=1e12)] = 1.0
    node_memory_bytes: Bytes | None = Field(None, description="null: what back-propagation needs.")


class PlanRequest(Strict):
    """Measurements and an objective."""

    depth: Annotated[int, Whole, Field(ge=2)]
    horizons: Annotated[list[Annotated[int, Whole, Field(ge=1)]], Field(min_length=2, max_length=MOST_POINTS)]
    memory_bytes: Annotated[list[Bytes], Field(min_length=2, max_length=MOST_POINTS)]
    cosine: Annotated[list[Annotated[Number, Field(ge=-1, le=1)]], Field(min_length=2, max_length=MOST_POINTS)]
    objective: ObjectiveIn = Accuracy(kind="accuracy", epsilon=0.1)
    cost: CostIn = CostIn()


class ReplanRequest(Strict):
    """Another objective, or another cost."""

    objective: ObjectiveIn | None = None
    cost: CostIn | None = None


def objective_of(asked: Accuracy | Weighted | Memory) -> Objective:
    """The objective that a request asks for."""
    return objectives.from_dict(asked.model_dump())


def cost_of(asked: CostIn) -> Cost:
    """The cost that a request asks for."""
    return costs.from_dict(asked.model_dump())
