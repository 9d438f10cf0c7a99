"""Errors as problem+json (RFC 9457), and their place in OpenAPI."""

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from horizonplan.api.database import is_full
from horizonplan.measured import MeasurementError
from horizonplan.objective import InfeasibleError

logger = logging.getLogger("horizonplan.api")

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 1
MOST_ERRORS = 20
LONGEST_NAME = 100
ABOUT = {
    400: "The request is no HTTP that makes sense here, or its body is no JSON.",
    401: "A key is needed, and none or an unknown one was sent.",
    403: "The request comes from another site.",
    404: "There is nothing of that name.",
    405: "The method does not go with this address.",
    406: "The answer cannot be had in the form that was asked for.",
    409: "The state of things forbids it.",
    413: "The body is larger than the service takes.",
    415: "The body is not application/json.",
    422: "The values cannot be used; `errors` names the fields.",
    429: "Too much was asked for; come again later.",
    500: "The service has a fault.",
    503: "The service is busy, or its database away; come again later.",
    507: "The disk is full.",
}


class FieldError(BaseModel):
    """What is wrong with one field."""

    model_config = ConfigDict(extra="forbid")

    field: str = Field(description="Such as `memory_bytes[2]` or `objective.epsilon`.")
    message: str


class ProblemBody(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(description="`about:blank`, or the name of a kind of its own.")
    title: str
    status: int
    detail: str
    instance: str
    errors: list[FieldError] | None = Field(None, description="The fields that cannot be used.")
    nearest: dict[str, Any] | None = Field(None, description="Of an infeasible objective: the row that misses least.")
    checks: dict[str, str] | None = Field(None, description="Of /readyz: `ok` or what is wrong, check by check.")


class Problem(HTTPException):
    """An error to be answered as problem+json.

    Args:
        status: of HTTP.
        detail: what is wrong, and the remedy.
        kind: a name of its own, for what a program may want to tell apart.
        errors: (field, message) of what is wrong with the body.
        headers: more headers of the answer.
        more: further members of the answer.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        kind: str = "",
        errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.kind, self.errors, self.more = kind, errors, more


def busy() -> Problem:
    """The problem of a service that cannot get at its database in time."""
    detail = f"The database is busy or away, and nothing was stored; come again in {RETRY_SECONDS} s."
    return Problem(503, detail, "busy", headers={"Retry-After": str(RETRY_SECONDS)})


def of_database(request: Request, error: Exception) -> Problem:
    """The problem that an error of the database is."""
    if isinstance(error, DBAPIError) and is_full(error):
        return Problem(507, "The disk of the database is full; nothing was stored.", "full")
    logger.warning("%s %s: %s", request.method, request.url.path, error)
    return busy()


def problem_response(request: Request, problem: Problem) -> Response:
    """The answer that tells a problem."""
    body: dict[str, Any] = {
        "type": f"urn:horizonplan:{problem.kind}" if problem.kind else "about:blank",
        "title": HTTPStatus(problem.status_code).phrase,
        "status": problem.status_code,
        "detail": problem.detail,
        "instance": request.url.path,
    }
    if problem.errors:
        body["errors"] = [{"field": field, "message": message} for field, message in problem.errors]
    text = json.dumps(body | problem.more, allow_nan=False)  # in ASCII: a field's name may be no Unicode
    return Response(text, problem.status_code, problem.headers, MEDIA_TYPE)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What ``responses=`` of a route says about these errors."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {s: {"description": ABOUT[s], "content": {MEDIA_TYPE: {"schema": schema}}} for s in statuses}


def document(app: FastAPI) -> None:
    """Let an application's OpenAPI document define what ``responses`` refers to."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "Problem" not in schemas:
            problem = ProblemBody.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs"), Problem=problem)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def add_handlers(app: FastAPI) -> None:
    """Let an application answer every error as a problem."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(MeasurementError, _measurement)
    app.add_exception_handler(InfeasibleError, _infeasible)
    app.add_exception_handler(DBAPIError, _database)
    app.add_exception_handler(PoolTimeoutError, _database)


def field_name(path: Sequence[str | int]) -> str:
    """A path into a body in the usual notation: ``memory_bytes[2]``."""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.lstrip(".")[:LONGEST_NAME] or "body"


def _without_tags(path: Sequence[str | int], body: Any) -> list[str | int]:
    """A path of pydantic's without the kinds that it puts between a union's field and what is in it."""
    kept: list[str | int] = []
    for i, part in enumerate(path):
        if isinstance(body, dict) and body.get("kind") == part and i < len(path) - 1:
            continue
        kept.append(part)
        inside = (isinstance(body, dict) and part in body) or (isinstance(body, list) and part in range(len(body)))
        body = body[part] if inside else None
    return kept


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, Problem):
        if error.status_code == 404:
            error.detail = "There is nothing at this address; /openapi.json tells what there is."
        headers = {"Allow": ", ".join(_allowed(request))} if error.status_code == 405 else error.headers
        error = Problem(error.status_code, str(error.detail), headers=headers)
    return problem_response(request, error)


def _allowed(request: Request) -> list[str]:
    """The methods of an address; each has a route of its own, which knows only its own."""
    routes, methods = request.app.router.routes, ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
    asked = [(method, {**request.scope, "method": method}) for method in methods]
    found = [method for method, scope in asked if any(route.matches(scope)[0] is Match.FULL for route in routes)]
    return found or ["GET", "HEAD"]  # of files, which are mounted and no routes


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [
        (field_name(_without_tags(one["loc"][1:], error.body)), one["msg"]) for one in error.errors()[:MOST_ERRORS]
    ]
    detail = "; ".join(f"{field}: {message}" for field, message in errors[:5])
    return problem_response(request, Problem(422, detail, "invalid", errors))


async def _measurement(request: Request, error: Exception) -> Response:
    assert isinstance(error, MeasurementError)
    return problem_response(request, Problem(422, str(error), "invalid", [(error.field, error.reason)]))


async def _infeasible(request: Request, error: Exception) -> Response:
    assert isinstance(error, InfeasibleError)
    return problem_response(request, Problem(422, str(error), "infeasible", nearest=error.nearest.to_dict()))


async def _database(request: Request, error: Exception) -> Response:
    return problem_response(request, of_database(request, error))
