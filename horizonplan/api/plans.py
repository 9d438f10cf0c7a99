"""Plans over HTTP: make one from measurements, read it, list them, plan again without probing."""

import json
import threading
import uuid
import warnings
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection, insert, select

from horizonplan import measured
from horizonplan.api import database
from horizonplan.api.paging import cursor_of, iso, number_of
from horizonplan.api.problems import Problem, responses
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
from horizonplan.plan import Plan

router = APIRouter(prefix="/v1/plans", tags=["plans"], route_class=JsonRoute)
CREATED: dict[str, Any] = {
    "model": StoredPlan,
    "description": "The plan.",
    "headers": {"Location": {"description": "Where it can be read.", "schema": {"type": "string"}}},
}
_FITTING = threading.Lock()  # of the process's warning filters, see _fitted


@router.post("", status_code=201, responses={201: CREATED, **responses(415, 422, 507)}, response_model=None)
def make_plan(asked: PlanRequest, request: Request) -> Response:
    """Choose a horizon from measurements."""
    settings = request.app.state.settings
    if asked.depth > settings.max_depth:
        raise measured.MeasurementError("depth", f"{asked.depth}; this service takes at most {settings.max_depth}")
    return _answer(request, _fitted(asked), asked.cards, None, "measurements")


@router.get("", responses={200: {"model": PlanList}, **responses(422)}, response_model=None)
def list_plans(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100, description="The most to answer with.")] = 20,
    cursor: Annotated[str | None, Query(max_length=64, description="`next_cursor` of the last answer.")] = None,
) -> Response:
    """The plans, the newest first. Those made in between move nothing."""
    asked = select(database.plans.c.number, database.plans.c.summary).order_by(database.plans.c.number.desc())
    if cursor is not None:
        asked = asked.where(database.plans.c.number < number_of("plan", cursor))
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
def replan(plan_id: str, asked: ReplanRequest, request: Request) -> Response:
    """A plan's table judged by another objective, cost or card, without probing."""
    plan = Plan.from_dict(json.loads(_find(request, plan_id)))
    if asked.objective is not None or asked.cost is not None or not asked.cards:
        objective = None if asked.objective is None else objective_of(asked.objective)
        plan = measured.replan(plan, objective, None if asked.cost is None else cost_of(asked.cost))
    return _answer(request, plan, asked.cards, plan_id, "replan")


def store(connection: Connection, plan: Plan, parent: str | None = None, card: str | None = None) -> tuple[str, str]:
    """Write a plan within a transaction.

    Args:
        connection: of ``Database.write``.
        plan: what to store.
        parent: id of the plan it was replanned from.
        card: name of the card that was chosen for it.

    Returns:
        Its id, and its JSON with the id.
    """
    plan_id, created = uuid.uuid4().hex, database.now()
    extra = {"id": plan_id, "created": iso(created), "parent": parent, "card": card}
    text = json.dumps(extra | plan.to_dict(), allow_nan=False)
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
    values = {"id": plan_id, "created": created, "parent": parent, "data": text}
    connection.execute(insert(database.plans).values(summary=json.dumps(summary, allow_nan=False), **values))
    return plan_id, text


def _fitted(asked: PlanRequest) -> Plan:
    """The plan of some measurements. What a poor fit warns of is in its notes, so the warning is left out."""
    with _FITTING, warnings.catch_warnings():
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


def _answer(request: Request, plan: Plan, cards: list[Card], parent: str | None, how: str) -> Response:
    card = None
    if cards:
        plan, taken = measured.replan_for_cards(plan, cards_of(cards))
        card = taken.name
    with request.app.state.database.write() as connection:
        plan_id, text = store(connection, plan, parent, card)
    request.app.state.metrics.plans.labels(how).inc()
    return Response(text, 201, {"Location": f"/v1/plans/{plan_id}"}, "application/json")


def _find(request: Request, plan_id: str) -> str:
    text = None
    if plan_id.isascii() and plan_id.isalnum():
        with request.app.state.database.read() as connection:
            text = connection.scalar(select(database.plans.c.data).where(database.plans.c.id == plan_id))
    if text is None:
        raise Problem(404, "There is no plan of this id.")
    return str(text)
