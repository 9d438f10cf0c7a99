"""Plans over HTTP: make one from measurements, read it, list them, plan again without probing."""

import json
import uuid
import warnings
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection, insert, select

from horizonplan import measured
from horizonplan.api import database
from horizonplan.api.batches import TooManyWaiting
from horizonplan.api.database import Database
from horizonplan.api.paging import cursor_of, cursor_query, iso, number_of
from horizonplan.api.problems import RETRY_SECONDS, Problem, responses
from horizonplan.api.schemas import (
    Card,
    PlanList,
    PlanRequest,
    ReplanRequest,
    StoredPlan,
    cards_of,
    cost_of,
    objective_of,
    strided_of,
)
from horizonplan.api.security import JsonRoute
from horizonplan.curves import PoorFitWarning
from horizonplan.objective import Objective
from horizonplan.plan import Plan

Make = Callable[[], dict[str, Any]]  # computes what the table holds of a new plan

Cursor = Annotated[str | None, cursor_query("plan")]
router = APIRouter(prefix="/v1/plans", tags=["plans"], route_class=JsonRoute)
CREATED: dict[str, Any] = {
    "model": StoredPlan,
    "description": "The plan.",
    "headers": {"Location": {"description": "Where it can be read.", "schema": {"type": "string"}}},
}


@router.post("", status_code=201, responses={201: CREATED, **responses(415, 422, 507)}, response_model=None)
async def make_plan(asked: PlanRequest, request: Request) -> Response:
    """Choose a horizon from measurements."""
    settings = request.app.state.settings
    if asked.depth > settings.max_depth:
        raise measured.MeasurementError("depth", f"{asked.depth}; this service takes at most {settings.max_depth}")

    def make() -> dict[str, Any]:
        plan, card = _on_cards(_fitted(asked), asked.cards)
        return _record(plan, card)

    return await _made(request, make, "measurements")


@router.get("", responses={200: {"model": PlanList}, **responses(422)}, response_model=None)
def list_plans(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100, description="The most to answer with.")] = 20,
    cursor: Cursor = None,
) -> Response:
    """The plans, the newest first. Those made in between move nothing."""
    asked = select(database.plans.c.number, database.plans.c.summary).order_by(database.plans.c.number.desc())
    if cursor is not None:
        asked = asked.where(database.plans.c.number < number_of(cursor))
    with request.app.state.database.read() as connection:
        found = connection.execute(asked.limit(limit + 1)).all()
    after = cursor_of("plan", found[limit - 1].number) if len(found) > limit else None
    items = ", ".join(row.summary for row in found[:limit])
    return Response(f'{{"items": [{items}], "next_cursor": {json.dumps(after)}}}', media_type="application/json")


@router.get("/{plan_id}", responses={200: {"model": StoredPlan}, **responses(404, 422)}, response_model=None)
def get_plan(plan_id: str, request: Request) -> Response:
    """A plan as it was made."""
    return Response(_find(request, plan_id), media_type="application/json")


@router.post(
    "/{plan_id}/replan",
    status_code=201,
    responses={201: CREATED, **responses(404, 415, 422, 507)},
    response_model=None,
)
async def replan(plan_id: str, asked: ReplanRequest, request: Request) -> Response:
    """A plan's table judged by another objective, cost or card, without probing."""
    objective = None if asked.objective is None else objective_of(asked.objective)
    cost = None if asked.cost is None else cost_of(asked.cost)

    def make() -> dict[str, Any]:
        plan = Plan.from_dict(json.loads(_find(request, plan_id)))
        if asked.cards:
            plan, card = _on_cards(plan, asked.cards, objective)
        else:
            plan, card = measured.replan(plan, objective, cost), None
        return _record(plan, card, plan_id)

    return await _made(request, make, "replan")


def store(connection: Connection, plan: Plan) -> str:
    """Write a plan within a transaction of ``Database.write``; its id."""
    record = _record(plan)
    connection.execute(insert(database.plans), record)
    return str(record["id"])


def make_all(makes: list[Make]) -> list[dict[str, Any] | Exception]:
    """What the table holds of each new plan, or why there is none."""
    return [_tried(make) for make in makes]


def store_all(store: Database, records: list[dict[str, Any]]) -> None:
    """Write what the table holds of plans, in one transaction."""
    with store.write() as connection:
        connection.execute(insert(database.plans), records)


def _record(plan: Plan, card: str | None = None, parent: str | None = None) -> dict[str, Any]:
    """What the table holds of a plan."""
    plan_id, created = uuid.uuid4().hex, database.now()
    extra = {"id": plan_id, "created": iso(created), "parent": parent, "card": card}
    row = plan.row
    summary = extra | {
        "depth": plan.depth,
        "horizon": row.horizon,
        "stride": row.stride,
        "recompute": row.recompute,
        "memory_bytes": row.memory_bytes,
        "rate": row.rate,
        "cost": row.cost,
        "objective": plan.objective.to_dict(),
    }
    return {
        "id": plan_id,
        "created": created,
        "parent": parent,
        "summary": json.dumps(summary, allow_nan=False),
        "data": json.dumps(extra | plan.to_dict(), allow_nan=False),
    }


async def _made(request: Request, make: Make, how: str) -> Response:
    """The answer with the plan that ``make`` computes, once it is stored."""
    state = request.app.state
    try:
        record = await state.new_plans.add(make)
    except TooManyWaiting:
        detail = f"More plans are asked for than can be made, and nothing was stored; come again in {RETRY_SECONDS} s."
        raise Problem(503, detail, "busy", headers={"Retry-After": str(RETRY_SECONDS)}) from None
    state.metrics.plans.labels(how).inc()
    return Response(record["data"], 201, {"Location": f"/v1/plans/{record['id']}"}, "application/json")


def _tried(make: Make) -> dict[str, Any] | Exception:
    try:
        return make()
    except Exception as error:
        return error


def _fitted(asked: PlanRequest) -> Plan:
    """The plan of some measurements. What a poor fit warns of is in its notes, so the warning is left out."""
    with warnings.catch_warnings():  # of the whole process, so only in one's turn
        warnings.simplefilter("ignore", PoorFitWarning)
        return measured.plan_from_measurements(
            asked.depth,
            asked.horizons,
            asked.memory_bytes,
            asked.cosine,
            objective_of(asked.objective),
            cost_of(asked.cost),
            rates=asked.rates,
            step_seconds=asked.step_seconds,
            block_bytes=asked.block_bytes,
            strided=strided_of(asked.strided),
        )


def _on_cards(plan: Plan, cards: list[Card], objective: Objective | None = None) -> tuple[Plan, str | None]:
    """The plan for the best of the cards, and its name; the plan itself where there are none."""
    if not cards:
        return plan, None
    best, card = measured.replan_for_cards(plan, cards_of(cards), objective)
    return best, card.name


def _find(request: Request, plan_id: str) -> str:
    text = None
    if plan_id.isascii() and plan_id.isalnum():
        with request.app.state.database.read() as connection:
            text = connection.scalar(select(database.plans.c.data).where(database.plans.c.id == plan_id))
    if text is None:
        raise Problem(404, "There is no plan of this id.")
    return str(text)
