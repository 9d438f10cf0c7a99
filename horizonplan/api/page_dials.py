"""The dials of a plan's page: an objective and a cost as texts, where their sliders stand, and what they come to.

Bounds are those of ``POST /v1/plans/{id}/replan``: texts become its request, and its errors come back to the dial.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from horizonplan import cost as costs
from horizonplan.api.schemas import ReplanRequest, cost_of, objective_of
from horizonplan.choice import find
from horizonplan.cost import Cost, as_cost
from horizonplan.measured import replan
from horizonplan.objective import InfeasibleError, Objective, evaluate
from horizonplan.plan import Plan
from horizonplan.rows import Row
from horizonplan.units import parse_bytes

DEFAULTS = {
    "kind": "accuracy",
    "epsilon": "0.1",
    "lam": "0.5",
    "limit": "24GiB",
    "cost": "linear",
    "price": "1",
    "node": "",
}
_NAMES = {"unit_cost": "price", "node_memory_bytes": "node", "limit_bytes": "limit"}  # of the API's fields here
_UNITS = [(f"{letter}{ending}", base**power) for ending, base in (("iB", 1024), ("B", 1000))
          for power, letter in ((4, "T"), (3, "G"), (2, "M"), (1, "K"))]  # fmt: skip


@dataclass(frozen=True)
class Dial:
    """A slider beside the text that it writes.

    Attributes:
        name: of the text's field.
        scale: ``"linear"``, or ``"log2"`` where the slider's position is the value's logarithm.
        writes: ``"number"`` or ``"bytes"``.
        low: the least position.
        high: the largest position.
        step: between positions.
        at: the position of the value that the text has now.
    """

    name: str
    scale: str
    writes: str
    low: float
    high: float
    step: float
    at: float


@dataclass(frozen=True)
class Answer:
    """What a plan's table comes to under the dials.

    Attributes:
        plan: the plan; ``None`` where nothing meets the objective.
        row: the choice, or what misses the objective by least.
        rows: the table, judged.
        complaint: why there is no choice.
        objective: what was asked for.
        cost: the price of memory.
        moved: whether the dials ask for something else than the plan did.
    """

    plan: Plan | None
    row: Row
    rows: Sequence[Row]
    complaint: str
    objective: Objective
    cost: Cost
    moved: bool


def number(text: str) -> Any:
    """The number that a text says; the text itself where it says none."""
    text = text.strip()
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def size(text: str) -> Any:
    """The bytes that a text such as ``24GiB`` says; the text itself where it says none."""
    try:
        return parse_bytes(text)
    except ValueError:
        return text


def size_text(value: int | None) -> str:
    """Bytes in the shortest words that say them exactly."""
    if value is None:
        return ""
    texts = [f"{value / unit:.4g}{name}" for name, unit in _UNITS if value >= unit]
    return next((text for text in texts if "e" not in text and parse_bytes(text) == value), str(value))


def texts_of(plan: Plan) -> dict[str, str]:
    """The dials as a plan was asked for; those of other objectives stand where they may be of use."""
    exact = find(plan.rows, plan.depth, 1).memory_bytes
    objective, cost = plan.objective.to_dict(), costs.to_dict(plan.cost)
    texts = DEFAULTS | {"limit": size_text(exact), "kind": objective["kind"], "cost": cost["kind"]}
    for name, value in (objective | cost).items():
        if name.endswith("bytes"):
            texts[_NAMES[name]] = "" if name == "node_memory_bytes" and value == exact else size_text(value)
        elif name != "kind":
            texts[_NAMES.get(name, name)] = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return texts


def request_of(texts: Mapping[str, str]) -> dict[str, Any]:
    """``objective`` and ``cost`` of a request of the API."""
    kinds = {
        "accuracy": {"epsilon": number(texts["epsilon"])},
        "weighted": {"lam": number(texts["lam"])},
        "memory": {"limit_bytes": size(texts["limit"])},
    }
    node = size(texts["node"]) if texts["node"].strip() else None
    return {
        "objective": {"kind": texts["kind"]} | kinds.get(texts["kind"], {}),
        "cost": {"kind": texts["cost"], "unit_cost": number(texts["price"]), "node_memory_bytes": node},
    }


def dial_of(path: Sequence[str | int]) -> str:
    """The dial that a path into a request's objective or cost leads to."""
    names = [part for part in path if isinstance(part, str)]
    if names == ["cost", "kind"]:
        return "cost"
    return _NAMES.get(names[-1], names[-1]) if len(names) > 1 else "kind"


def in_words(name: str, error: Mapping[str, Any]) -> str:
    """What is wrong with the text of a field."""
    told = str(error["msg"])
    if error["type"].endswith(("_parsing", "_type")):
        told = "Give a size, such as 24GiB or 512MB" if name in ("limit", "node", "memory") else "Give a number"
    elif error["type"] == "int_from_float":
        told = "Give a whole number"
    return told.removeprefix("Value error, ").replace("Input should be", "It should be") + "."


def request_asked(texts: Mapping[str, str]) -> tuple[ReplanRequest | None, dict[str, str]]:
    """The request that the dials make, or what is wrong with them: name -> message."""
    try:
        return ReplanRequest.model_validate(request_of(texts)), {}
    except ValidationError as error:
        told = [(dial_of(one["loc"]), one) for one in error.errors()]
        return None, {name: in_words(name, one) for name, one in told}


def judged(plan: Plan, asked: ReplanRequest) -> Answer:
    """A plan's table under an objective and a cost, without probing. What the plan asked for gives the plan itself."""
    objective = plan.objective if asked.objective is None else objective_of(asked.objective)
    cost = plan.cost if asked.cost is None else cost_of(asked.cost)
    price = as_cost(cost, max(1, find(plan.rows, plan.depth, 1).memory_bytes))
    if (objective, price) == (plan.objective, plan.cost):
        return Answer(plan, plan.row, plan.rows, "", objective, price, moved=False)
    try:
        other = replan(plan, objective, price)
    except InfeasibleError as error:
        rows = evaluate(plan.rows, objective, price)
        return Answer(None, error.nearest, rows, str(error), objective, price, moved=True)
    return Answer(other, other.row, other.rows, "", objective, price, moved=True)


def dials_of(plan: Plan, texts: Mapping[str, str]) -> dict[str, Dial]:
    """Sliders whose ends go with a plan's table."""
    sizes = [row.memory_bytes for row in plan.rows]
    least, exact = max(1, min(sizes)), find(plan.rows, plan.depth, 1).memory_bytes
    limits = _logarithmic(least / 1.25, max(*sizes, exact) * 1.25)
    nodes = _logarithmic(least / 4, exact * 16)
    where = {
        "epsilon": _position(number(texts["epsilon"]), False, 0.0, 0.99),
        "lam": _position(number(texts["lam"]), True, -10, 10),
        "limit": _position(size(texts["limit"]), True, *limits),
        "price": _position(number(texts["price"]), True, -10, 14),
        "node": _position(size(texts["node"]) if texts["node"] else exact, True, *nodes),
    }
    return {
        "epsilon": Dial("epsilon", "linear", "number", 0, 0.99, 0.01, where["epsilon"]),
        "lam": Dial("lam", "log2", "number", -10, 10, 0.25, where["lam"]),
        "limit": Dial("limit", "log2", "bytes", *limits, 0.0625, where["limit"]),
        "price": Dial("price", "log2", "number", -10, 14, 0.25, where["price"]),
        "node": Dial("node", "log2", "bytes", *nodes, 0.125, where["node"]),
    }


def _logarithmic(low: float, high: float) -> tuple[float, float]:
    return math.floor(8 * math.log2(max(1.0, low))) / 8, math.ceil(8 * math.log2(max(2.0, high))) / 8


def _position(value: Any, logarithmic: bool, low: float, high: float) -> float:
    if not isinstance(value, int | float) or math.isnan(value := min(value, sys.float_info.max)):
        return low
    if logarithmic:
        value = math.log2(value) if value > 0 else low
    return float(min(high, max(low, value)))
