"""What the page's templates show of plans: facts, rows of the table, sentences, and the code that uses a plan."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from horizonplan.api.page_dials import Answer
from horizonplan.choice import find
from horizonplan.explain import cells, name_of
from horizonplan.plan import Plan
from horizonplan.rows import Row
from horizonplan.units import format_bytes, format_seconds

LETTERS = {"m": "measured", "f": "fitted", "p": "predicted", "d": "derived"}
_NAMED = {"depth": "blocks", "horizon": "horizon h", "stride": "stride s", "recompute": "checkpoint every"}
_WRITTEN: dict[str, Callable[[float], str]] = {  # in the order of `facts`
    "memory_bytes": format_bytes,
    "rate": "{:.3f}".format,
    "cosine": "{:.3f}".format,
    "cost": "{:.3f}".format,
    "step_seconds": format_seconds,
}
PYTHON = """import horizonplan as hp
from my_module import data, model

plan = hp.Plan.load("plan.json")
result = hp.train(model(), data(), plan=plan, epochs=10)
"""
COLUMNS = ("Memory", "Cosine", "Rate", "Cost", "Objective", "Feasible", "Time a step", "Operations a step")
NONE = "–"


@dataclass(frozen=True)
class Number:
    """A number as it is shown.

    Attributes:
        text: with its unit.
        letter: of its source; empty where it is computed from what is asked for.
        name: what it is called, where it stands alone.
        more: what to compare it with.
    """

    text: str
    letter: str = ""
    name: str = ""
    more: str = ""


@dataclass(frozen=True)
class Line:
    """A row of the table as it is shown."""

    name: str
    numbers: Sequence[Number]
    chosen: bool
    reference: bool
    exact: bool
    feasible: bool


@dataclass(frozen=True)
class Difference:
    """A number of two plans beside each other."""

    name: str
    first: Number
    second: Number
    change: str


def headline(row: Row, depth: int) -> str:
    """What to train with, in a few words."""
    if row.horizon == depth:
        return name_of(row, depth)
    return f"h = {row.horizon}, " + name_of(row, depth).partition(", ")[2]


def facts(row: Row, rows: Sequence[Row], depth: int) -> list[Number]:
    """The numbers of a row that count, beside back-propagation's."""
    exact = find(rows, depth, 1)
    shown = [
        _fact("memory", row, depth, 1, _against(row.memory_bytes, exact.memory_bytes)),
        _fact("rate", row, depth, 3, "1 is back-propagation's"),
        _fact("cosine", row, depth, 2, "to the exact gradient"),
        _fact("cost", row, depth, 4, "" if exact.cost is None else f"back-propagation {exact.cost:.3f}"),
    ]
    if row.step_seconds is not None:
        more = "" if exact.step_seconds is None else _against(row.step_seconds, exact.step_seconds)
        shown.append(_fact("time a step", row, depth, 7, more))
    return shown


def lines(rows: Iterable[Row], chosen: Row | None, depth: int) -> list[Line]:
    """The whole table."""
    return [
        Line(
            name=name_of(row, depth),
            numbers=[_number(text) for text in cells(row, depth)[1:]],
            chosen=row == chosen,
            reference=row.reference,
            exact=row.exact,
            feasible=row.feasible,
        )
        for row in rows
    ]


def columns(table: Sequence[Line]) -> dict[int, str]:
    """The columns of a table in which anything stands: place among a line's numbers -> heading."""
    return {i: name for i, name in enumerate(COLUMNS) if any(line.numbers[i].text != NONE for line in table)}


def sentence(text: str) -> str:
    """An error's words as a sentence."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def sentences(plan: Plan) -> tuple[list[str], list[str]]:
    """What ``Plan.explain`` says of the choice, and its notes."""
    told = plan.explain().split("\n\n")[2:]  # the table and its legend are drawn otherwise
    notes = [text.removeprefix("Note: ") for text in told if text.startswith("Note: ")]
    return [text for text in told if not text.startswith("Note: ")], notes


def exact_lines(answer: Answer, depth: int) -> list[Line]:
    """The ways to the exact gradient: back-propagation, with recomputation, in micro-batches."""
    return lines([row for row in answer.rows if row.exact], answer.row, depth)


def exact_size(plan: Plan) -> str:
    """What back-propagation needs."""
    return format_bytes(find(plan.rows, plan.depth, 1).memory_bytes)


def differences(first: Plan, second: Plan) -> list[Difference]:
    """Two plans' choices, number by number."""
    found = []
    for name, written in (("depth", "{:g}"), ("horizon", "{:g}"), ("stride", "{:g}"), ("recompute", "{:g}")):
        a, b = getattr(first, name), getattr(second, name)
        found.append(Difference(_NAMED[name], Number(str(a)), Number(str(b)), _signed(a, b, written.format)))
    pairs = zip(*(facts(plan.row, plan.rows, plan.depth) for plan in (first, second)), strict=False)
    for (one, other), (name, write) in zip(pairs, _WRITTEN.items(), strict=False):
        a, b = getattr(first.row, name), getattr(second.row, name)
        change = "" if a is None or b is None else _signed(a, b, write)
        found.append(Difference(one.name, one, other, change))
    return found


def curves(first: Plan, second: Plan) -> list[tuple[int, list[str]]]:
    """What two plans need and gain at stride 1, h by h: memory of both, rate of both."""
    tables = [{row.horizon: row for row in plan.rows if row.stride == 1 and row.plain} for plan in (first, second)]
    found = []
    for h in range(1, max(first.depth, second.depth) + 1):
        rows = [table.get(h) for table in tables]
        memory = [NONE if row is None else format_bytes(row.memory_bytes) for row in rows]
        rates = [NONE if row is None or row.rate is None else f"{row.rate:.3f}" for row in rows]
        found.append((h, memory + rates))
    return found


def in_a_shell(address: str, plan_id: str, query: Mapping[str, str], keys: bool) -> str:
    """Commands that fetch the plan and train with it."""
    url = f"{address}/plans/{plan_id}/plan.json?{urlencode(query)}" if query else f"{address}/v1/plans/{plan_id}"
    key = ' -H "Authorization: Bearer $HORIZONPLAN_KEY"' if keys else ""
    return (
        f"curl -fsS{key} -o plan.json \\\n  {shlex.quote(url)}\n"
        "horizonplan train my_module:model --data my_module:data \\\n  --plan plan.json --epochs 10\n"
    )


def summary_line(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A plan in the list of plans."""
    row = Row(
        horizon=summary["horizon"],
        stride=summary["stride"],
        recompute=summary["recompute"],
        memory_bytes=summary["memory_bytes"],
    )
    rate, cost = summary["rate"], summary["cost"]
    return {
        "id": summary["id"],
        "short": summary["id"][:8],
        "created": summary["created"],
        "when": when(summary["created"]),
        "parent": summary["parent"],
        "depth": summary["depth"],
        "choice": headline(row, summary["depth"]),
        "memory": format_bytes(summary["memory_bytes"]),
        "rate": NONE if rate is None else f"{rate:.3f}",
        "cost": NONE if cost is None else f"{cost:.3f}",
        "asked": asked_for(summary["objective"]),
    }


def network_in_words(architecture: Mapping[str, Any]) -> str:
    """The sizes of a network that a job measures."""
    told = []
    for name, value in architecture.items():
        if isinstance(value, Mapping):
            told.append(", ".join(f"{inner} {number}" for inner, number in value.items()))
        elif name != "kind":
            shown = ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
            told.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(told)


def asked_for(objective: Mapping[str, Any]) -> str:
    """An objective in a few signs."""
    match objective["kind"]:
        case "accuracy":
            return f"rate ≥ {1 - objective['epsilon']:.4g}"
        case "weighted":
            return f"least of {objective['lam']:g} × cost − rate"
        case _:
            return f"largest h within {format_bytes(objective['limit_bytes'])}"


def when(created: str) -> str:
    """A time in a list."""
    return datetime.fromisoformat(created).strftime("%d %b %Y, %H:%M UTC").removeprefix("0")


def _fact(name: str, row: Row, depth: int, cell: int, more: str) -> Number:
    number = _number(cells(row, depth)[cell])
    return Number(number.text, number.letter, name, more)


def _number(text: str) -> Number:
    """A cell of ``explain``'s table: the letter at its end is its source."""
    before, _, letter = text.rpartition(" ")
    if before and letter in LETTERS:
        return Number(before, letter)
    return Number(NONE if text == "-" else text.replace("-", "−"))


def _against(value: float, exact: float) -> str:
    if not exact:
        return ""
    part = value / exact - 1
    if abs(part) < 5e-4:
        return "as back-propagation"
    return f"{abs(part):.1%} {'more' if part > 0 else 'less'} than back-propagation"


def _signed(a: float, b: float, written: Callable[[float], str]) -> str:
    return "same" if a == b else ("+" if b > a else "−") + written(abs(b - a))
