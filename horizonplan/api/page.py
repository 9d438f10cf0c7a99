"""The page: a network measured or measurements given, a plan looked at from all sides, its dials, two plans compared.

Rendered on the server; every address works without scripts. What it shows comes from the API's own functions, so the
page and ``/v1`` give one answer. Nothing of it is in the OpenAPI document.
"""

import json
from typing import Any
from urllib.parse import urlencode

from anyio import from_thread
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.staticfiles import StaticFiles

from horizonplan.api import jobs, page_charts, page_dials, page_forms, page_sign_in, page_view, plans, queue, security
from horizonplan.api.page_base import PageRoute, Sent, render, to
from horizonplan.api.page_forms import Form
from horizonplan.api.paging import iso
from horizonplan.api.problems import Problem
from horizonplan.api.schemas import ReplanRequest
from horizonplan.measured import MeasurementError
from horizonplan.objective import InfeasibleError
from horizonplan.plan import Plan

RECENT = 8


router = APIRouter(route_class=PageRoute, include_in_schema=False)


class Static(StaticFiles):
    """Files that a browser keeps, and asks each time whether they have changed."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        """A file, or 304."""
        response = super().file_response(*args, **options)
        response.headers["Cache-Control"] = "no-cache"
        return response


def add_to(app: FastAPI) -> None:
    """Let an application show the page."""
    keys = [Depends(security.require_key)] if app.state.settings.keys_required else []
    app.include_router(router, dependencies=keys)
    app.include_router(page_sign_in.router)
    app.mount("/static", Static(packages=[("horizonplan.api", "static")]))


@router.get("/")
def home(request: Request, architecture: str = "", example: bool = False) -> Response:
    """Where a plan begins."""
    measurements = page_forms.empty_measurements(example)
    job = page_forms.filled_job({"architecture": [architecture]}, request.app.state.settings.jobs)
    return _home(request, measurements, job)


@router.post("/plans")
def give(request: Request, fields: Sent) -> Response:
    """Make a plan from the measurements in the form."""
    form = page_forms.filled_measurements(fields)
    job = page_forms.filled_job({}, request.app.state.settings.jobs)
    if "more" in fields:
        return _home(request, form, job)
    asked = page_forms.measurements_asked(form)
    if asked is not None:
        try:
            return to(f"/plans/{_read(from_thread.run(plans.make_plan, asked, request))['id']}")
        except MeasurementError as error:
            page_forms.place_measurement(form, error.field, page_view.sentence(error.reason))
        except InfeasibleError as error:
            form.errors["json" if form.texts["json"].strip() else "kind"] = page_view.sentence(str(error))
    return _home(request, form, job, 422)


@router.post("/jobs")
def measure(request: Request, fields: Sent) -> Response:
    """Queue a job."""
    settings = request.app.state.settings.jobs
    form = page_forms.filled_job(fields, settings)
    asked = page_forms.job_asked(form, settings)
    if asked is not None:
        try:
            return to(f"/jobs/{_read(jobs.submit(asked, request))['id']}")
        except MeasurementError as error:
            page_forms.place_job(form, error.field, page_view.sentence(error.reason))
        except Problem as problem:
            form.errors["form"] = problem.detail
            return _home(request, page_forms.empty_measurements(), form, problem.status_code)
    return _home(request, page_forms.empty_measurements(), form, 422)


@router.get("/history")
def history(request: Request, cursor: plans.Cursor = None) -> Response:
    """All plans."""
    found = _read(plans.list_plans(request, 25, cursor))
    items = [page_view.summary_line(one) for one in found["items"]]
    return render(request, "history.html", plans=items, next_cursor=found["next_cursor"], begun=cursor is not None)


@router.get("/plans/{plan_id}")
def look(plan_id: str, request: Request) -> Response:
    """A plan under the dials of the query; to htmx, only what the dials change."""
    stored, plan = _stored(request, plan_id)
    texts = page_dials.texts_of(plan) | _dials_in(request)
    asked, errors = page_dials.request_asked(texts)
    answer = page_dials.judged(plan, ReplanRequest() if asked is None else asked)
    query = {name: texts[name] for name in page_dials.DEFAULTS} if answer.moved else {}
    lines = page_view.lines(answer.rows, answer.row, plan.depth)
    said, notes = page_view.sentences(plan if answer.plan is None else answer.plan)
    values: dict[str, Any] = {
        "stored": stored,
        "made": page_view.when(stored["created"]),
        "plan": plan,
        "answer": answer,
        "texts": texts,
        "errors": errors,
        "exact_size": page_view.exact_size(plan),
        "dials": page_dials.dials_of(plan, texts),
        "charts": json.dumps(page_charts.charts_of(plan, answer), allow_nan=False),
        "facts": page_view.facts(answer.row, answer.rows, plan.depth),
        "headline": page_view.headline(answer.row, plan.depth),
        "said": said if answer.plan is not None else [page_view.sentence(answer.complaint)],
        "notes": notes,
        "lines": lines,
        "columns": page_view.columns(lines),
        "exact": page_view.exact_lines(answer, plan.depth),
        "python": page_view.PYTHON,
        "shell": page_view.in_a_shell(_address(request), plan_id, query, request.app.state.settings.keys_required),
        "query": urlencode(query),
        "kept": query,
    }
    if request.headers.get("hx-request") == "true":
        return render(request, "plan_parts.html", **values)
    recent = [one for one in _recent(request, RECENT + 1) if one["id"] != plan_id]
    return render(request, "plan.html", 422 if errors else 200, recent=recent, **values)


@router.get("/plans/{plan_id}/plan.json")
def download(plan_id: str, request: Request) -> Response:
    """The plan under the dials of the query, as ``Plan.save`` writes it."""
    _, plan = _stored(request, plan_id)
    asked, errors = page_dials.request_asked(page_dials.texts_of(plan) | _dials_in(request))
    if asked is None:
        raise Problem(422, "; ".join(f"{name}: {message}" for name, message in errors.items()))
    answer = page_dials.judged(plan, asked)
    if answer.plan is None:
        raise Problem(422, answer.complaint)
    headers = {"Content-Disposition": 'attachment; filename="plan.json"'}
    text = json.dumps(answer.plan.to_dict(), indent=2, allow_nan=False) + "\n"
    return Response(text, headers=headers, media_type="application/json")


@router.post("/plans/{plan_id}/keep")
def keep(plan_id: str, request: Request, fields: Sent) -> Response:
    """Store the plan that the dials come to."""
    _, plan = _stored(request, plan_id)
    given = {name: fields[name][0] for name in page_dials.DEFAULTS if name in fields}
    asked, errors = page_dials.request_asked(page_dials.texts_of(plan) | given)
    if asked is None:
        raise Problem(422, "; ".join(f"{name}: {message}" for name, message in errors.items()))
    try:
        again = ReplanRequest(objective=asked.objective, cost=asked.cost)
        answer = from_thread.run(plans.replan, plan_id, again, request)
    except InfeasibleError as error:
        raise Problem(422, str(error)) from error
    return to(f"/plans/{_read(answer)['id']}")


@router.get("/compare")
def compare(request: Request, a: str = "", b: str = "") -> Response:
    """Two plans side by side."""
    recent = _recent(request, 50)
    if not (a and b):
        return render(request, "compare.html", recent=recent, a=a, b=b, pair=None)
    found = [_stored(request, plan_id) for plan_id in (a, b)]
    (_, first), (_, second) = found
    return render(
        request,
        "compare.html",
        recent=recent,
        a=a,
        b=b,
        pair=[
            {
                "id": stored["id"],
                "when": page_view.when(stored["created"]),
                "headline": page_view.headline(plan.row, plan.depth),
                "asked": page_view.asked_for(plan.objective.to_dict()),
            }
            for stored, plan in found
        ],
        differences=page_view.differences(first, second),
        curves=page_view.curves(first, second),
        charts=json.dumps(page_charts.compared([first, second]), allow_nan=False),
    )


@router.get("/jobs/{job_id}")
def watch(job_id: str, request: Request) -> Response:
    """A job, live."""
    job = _read(jobs.get_job(job_id, request))
    with request.app.state.database.read() as connection:
        told = queue.events(connection, job_id, 0)
    events = [{"number": one.number, "time": iso(one.time), "kind": one.kind} | json.loads(one.data) for one in told]
    last = next((event for event in reversed(events) if event["kind"] == "progress"), None)
    return render(
        request,
        "job.html",
        job=job,
        events=events,
        last=last,
        label=page_forms.LABELS.get(job["request"]["architecture"]["kind"], ""),
        over=job["state"] in queue.FINAL,
        sizes=page_view.network_in_words(job["request"]["architecture"]),
        asked=page_view.asked_for(job["request"]["objective"]),
        error=page_view.sentence(job["error"]["message"]) if job["error"] else "",
    )


@router.post("/jobs/{job_id}/cancel")
def cancel(job_id: str, request: Request) -> Response:
    """End a job."""
    jobs.cancel(job_id, request)
    return to(f"/jobs/{job_id}")


def _home(request: Request, measurements: Form, job: Form, status: int = 200) -> Response:
    known = page_forms.kinds(request.app.state.settings.jobs)
    return render(
        request,
        "home.html",
        status,
        measurements=measurements,
        name_in_words=page_forms.name_in_words,
        job=job,
        kinds={kind: page_forms.LABELS[kind] for kind in known},
        sizes=page_forms.sizes(known[job.texts["architecture"]]),
        about=known[job.texts["architecture"]].__doc__,
        registered=sorted(request.app.state.settings.jobs.models),
        recent=_recent(request, RECENT),
        jobs=_open_jobs(request),
    )


def _stored(request: Request, plan_id: str) -> tuple[dict[str, Any], Plan]:
    stored = _read(plans.get_plan(plan_id, request))
    return stored, Plan.from_dict(stored)


def _dials_in(request: Request) -> dict[str, str]:
    return {name: request.query_params[name] for name in page_dials.DEFAULTS if name in request.query_params}


def _recent(request: Request, count: int) -> list[dict[str, Any]]:
    found = _read(plans.list_plans(request, count, None))
    return [page_view.summary_line(one) for one in found["items"]]


def _open_jobs(request: Request) -> list[dict[str, Any]]:
    found = [job for state in ("running", "queued") for job in _read(jobs.list_jobs(request, state, 5, None))["items"]]
    return [job | {"label": page_forms.LABELS[job["request"]["architecture"]["kind"]]} for job in found]


def _read(answer: Response) -> Any:
    return json.loads(bytes(answer.body))


def _address(request: Request) -> str:
    return str(request.base_url).rstrip("/")
