"""Plans over HTTP: make one from measurements, read it, list them, plan again without probing."""

import json
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection, insert, select

from horizonplan import measured
from horizonplan.api import database
from horizonplan.api.problems import Problem, responses
from horizonplan.api.schemas import PlanRequest, ReplanRequest, cost_of, objective_of
from horizonplan.plan import Plan

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post("", status_code=201, responses=responses(413, 415, 422, 503, 507))
def make_plan(asked: PlanRequest, request: Request) -> Response:
    """Choose a horizon from measurements."""
    plan = measured.plan_from_measurements(
        asked.depth,
        asked.horizons,
        asked.memory_bytes,
        asked.cosine,
        objective_of(asked.objective),
        cost_of(asked.cost),
    )
    return _stored(request, plan, None)


@router.get("/{plan_id}", responses=responses(404, 503))
def get_plan(plan_id: str, request: Request) -> Response:
    """A plan as it was made."""
    return Response(_find(request, plan_id), media_type="application/json")


@router.post("/{plan_id}/replan", status_code=201, responses=responses(404, 413, 415, 422, 503, 507))
def replan(plan_id: str, asked: ReplanRequest, request: Request) -> Response:
    """The same table judged by another objective or cost."""
    plan = Plan.from_dict(json.loads(_find(request, plan_id)))
    objective = None if asked.objective is None else objective_of(asked.objective)
    return _stored(
        request, measured.replan(plan, objective, None if asked.cost is None else cost_of(asked.cost)), plan_id
    )


def store(connection: Connection, plan: Plan, parent: str | None = None) -> tuple[str, str]:
    """Write a plan within a transaction; its id, and its JSON with the id."""
    plan_id = uuid.uuid4().hex
    text = json.dumps({"id": plan_id} | plan.to_dict(), allow_nan=False)
    values: dict[str, Any] = {"id": plan_id, "created": database.now(), "parent": parent, "data": text}
    summary = {"horizon": plan.horizon, "stride": plan.stride, "depth": plan.depth}
    connection.execute(insert(database.plans).values(summary=json.dumps(summary), **values))
    return plan_id, text


def _stored(request: Request, plan: Plan, parent: str | None) -> Response:
    with request.app.state.database.write() as connection:
        plan_id, text = store(connection, plan, parent)
    return Response(text, 201, {"Location": f"/v1/plans/{plan_id}"}, "application/json")


def _find(request: Request, plan_id: str) -> str:
    with request.app.state.database.read() as connection:
        text = connection.scalar(select(database.plans.c.data).where(database.plans.c.id == plan_id))
    if text is None:
        raise Problem(404, f"There is no plan {plan_id!r}.")
    return str(text)
