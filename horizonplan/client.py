"""A client of ``horizonplan serve``: the calls of a script that asks for plans.

::

    client = hp.client.Client("http://127.0.0.1:8000")
    plan = client.plan(12, [1, 4, 8, 12], memory_bytes, cosine, hp.AccuracyConstraint(0.1))
    cheaper = client.replan(plan.id, hp.AccuracyConstraint(0.3))
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx2

from horizonplan import cost as costs
from horizonplan.cards import priced
from horizonplan.cost import Cost
from horizonplan.measured import Card, Strided
from horizonplan.objective import InfeasibleError, Objective
from horizonplan.plan import Plan
from horizonplan.rows import Row

__all__ = ["Client", "JobError", "ServiceError", "StoredPlan"]

FINAL = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 0.5


class ServiceError(OSError):
    """The service refused, or could not be reached.

    Attributes:
        status: The answer's, ``None`` where there was none.
        errors: (field, message) of what is wrong with the values that were sent.
    """

    def __init__(self, message: str, status: int | None = None, errors: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status, self.errors = status, tuple(errors)


class JobError(RuntimeError):
    """A job ended without a plan.

    Attributes:
        job: The job as the service tells it, with ``state`` and ``error``.
    """

    def __init__(self, message: str, job: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.job = job


@dataclass(frozen=True)
class StoredPlan(Plan):
    """A plan that the service keeps.

    Attributes:
        id: Its name there.
        card: The card that was chosen for it, of those that were offered.
    """

    id: str = ""
    card: str | None = None


class Client:
    """Asks one service.

    Args:
        url: Where it is, such as ``"http://127.0.0.1:8000"``.
        key: An API key, where it asks for one.
        timeout: Seconds that one answer may take.
        transport: How requests are carried; ``None``: over the network.

    Note:
        All calls raise ``ServiceError`` where the service refuses or cannot be reached.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout: float = 30.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.url = url
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r} names no protocol; give one such as http://127.0.0.1:8000")
        try:
            self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout, transport=transport)
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            raise ValueError(f"url={url!r} or the key cannot be used: {error}") from error

    def plan(
        self,
        depth: int,
        horizons: Sequence[int],
        memory_bytes: Sequence[int],
        cosine: Sequence[float],
        objective: Objective | None = None,
        cost: Cost | None = None,
        *,
        rates: Sequence[float | None] | None = None,
        step_seconds: Sequence[float | None] | None = None,
        block_bytes: Sequence[int] | None = None,
        strided: Sequence[Strided] = (),
        cards: Sequence[Card] = (),
    ) -> StoredPlan:
        """Have a horizon chosen from measurements.

        Args:
            depth: As for :func:`horizonplan.measured.plan_from_measurements`, and so are the others.
            horizons: Likewise.
            memory_bytes: Likewise.
            cosine: Likewise.
            objective: Likewise; ``None``: the service's, which is ``AccuracyConstraint(0.1)``.
            cost: Likewise.
            rates: Likewise.
            step_seconds: Likewise.
            block_bytes: Likewise.
            strided: Likewise.
            cards: Cards to choose from, in place of the cost.

        Raises:
            InfeasibleError: No candidate meets the objective.
        """
        body = {
            "depth": depth,
            "horizons": list(horizons),
            "memory_bytes": list(memory_bytes),
            "cosine": list(cosine),
            "rates": None if rates is None else list(rates),
            "step_seconds": None if step_seconds is None else list(step_seconds),
            "block_bytes": None if block_bytes is None else list(block_bytes),
            "strided": [asdict(one) for one in strided],
        }
        return _plan(self._ask("POST", "/v1/plans", body | _judged(objective, cost, cards)))

    def get_plan(self, plan_id: str) -> StoredPlan:
        """A plan that the service keeps."""
        return _plan(self._ask("GET", f"/v1/plans/{_part(plan_id)}"))

    def replan(
        self,
        plan_id: str,
        objective: Objective | None = None,
        cost: Cost | None = None,
        cards: Sequence[Card] = (),
    ) -> StoredPlan:
        """Have a plan's rows judged anew, without probing.

        Args:
            plan_id: Its name.
            objective: ``None``: the plan's.
            cost: ``None``: the plan's.
            cards: Cards to choose from, in place of the cost.

        Raises:
            InfeasibleError: No candidate meets the objective.
        """
        return _plan(self._ask("POST", f"/v1/plans/{_part(plan_id)}/replan", _judged(objective, cost, cards)))

    def submit(self, request: Mapping[str, Any]) -> str:
        """Have a network measured; the job's id. ``request`` is the body of POST /v1/jobs."""
        return str(self._ask("POST", "/v1/jobs", dict(request))["id"])

    def get_job(self, job_id: str) -> dict[str, Any]:
        """A job as it stands."""
        return self._ask("GET", f"/v1/jobs/{_part(job_id)}")

    def wait(self, job_id: str, timeout: float | None = None) -> StoredPlan:
        """Wait for a job's end.

        Args:
            job_id: The job.
            timeout: Seconds; ``None``: as long as it takes.

        Returns:
            Its plan.

        Raises:
            JobError: It failed, or was cancelled.
            TimeoutError: It still runs; it goes on doing so.
        """
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        while (job := self.get_job(job_id))["state"] not in FINAL:
            if time.monotonic() >= end:
                raise TimeoutError(
                    f"job {job_id} is still {job['state']} after {timeout:g} s; wait again, or cancel it"
                )
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))
        if job["state"] != "succeeded":
            reason = (job.get("error") or {}).get("message")
            raise JobError(f"job {job_id} {job['state']}" + (f": {reason}" if reason else ""), job)
        return self.get_plan(job["plan_id"])

    def cancel(self, job_id: str) -> dict[str, Any]:
        """End a job; after its end this changes nothing. The job as it stands then."""
        return self._ask("POST", f"/v1/jobs/{_part(job_id)}/cancel")

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        text = None if body is None else json.dumps(body, default=_plain)  # NaN too: the service names the field
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            answer = self._http.request(method, path, content=text, headers=headers)
        except httpx2.HTTPError as error:
            told = str(error) or type(error).__name__
            raise ServiceError(f"{self.url}: no answer ({told}); is `horizonplan serve` running there?") from error
        try:
            value = answer.json()
        except ValueError:
            value = None
        if answer.is_success and isinstance(value, dict):
            return value
        raise _refusal(answer.status_code, value if isinstance(value, dict) else {}, self.url)


def _refusal(status: int, problem: Mapping[str, Any], url: str) -> Exception:
    """What a problem+json is here: the error that the library itself would raise, where there is one."""
    if not isinstance(problem.get("detail"), str):
        return ServiceError(f"{url}: answered {status} and no problem+json; is it a horizonplan service?", status)
    if problem.get("type") == "urn:horizonplan:infeasible":
        return InfeasibleError(problem["detail"], Row.from_dict(problem["nearest"]))
    errors = [(one["field"], one["message"]) for one in problem.get("errors", ())]
    return ServiceError(f"{url} ({status}): {problem['detail']}", status, errors)


def _plan(data: Mapping[str, Any]) -> StoredPlan:
    plan = StoredPlan.from_dict(data)
    assert isinstance(plan, StoredPlan)
    return replace(plan, id=data["id"], card=data.get("card"))


def _judged(objective: Objective | None, cost: Cost | None, cards: Sequence[Card]) -> dict[str, Any]:
    """What is asked for, as JSON-ready values without what is left open."""
    for card in cards:
        if not isinstance(card, Card):
            raise TypeError(f"cards holds {card!r}; give horizonplan.measured.Card(name, memory_bytes, price)")
    asked: dict[str, Any] = {
        "cards": [{"name": card.name, "memory_bytes": card.memory_bytes, "price": priced(card)} for card in cards]
    }
    if objective is not None:
        asked["objective"] = objective.to_dict()
    if cost is not None:
        asked["cost"] = costs.to_dict(cost)
    for name, kinds in (("objective", ("accuracy", "weighted", "memory")), ("cost", ("linear", "ladder"))):
        if name in asked and asked[name]["kind"] not in kinds:
            given = asked[name].get("name", asked[name]["kind"])
            raise ValueError(f"{name}={given!r} is none that a service takes ({', '.join(kinds)}); plan here")
    return asked


def _plain(value: Any) -> Any:
    """NumPy's and PyTorch's numbers as Python's."""
    if callable(item := getattr(value, "item", None)):
        return item()
    raise TypeError(f"{value!r} is no number")


def _part(name: str) -> str:
    """A name as one part of an address."""
    return quote(name, safe="")
