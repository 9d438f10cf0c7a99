"""The client: against the service itself, and against answers that a service may give."""

import json
import math

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

import horizonplan as hp
from horizonplan.api import Settings, create_app, security
from horizonplan.client import Client, JobError, ServiceError
from horizonplan.measured import Card, Strided, plan_from_measurements, replan, replan_for_cards

POINTS = (12, [1, 4, 8, 12], [11_000_000, 14_000_000, 18_000_000, 22_000_000], [0.3, 0.8, 0.97, 1.0])


@pytest.fixture
def client(app):
    with TestClient(app, base_url="http://localhost") as http:
        yield Client("http://localhost", transport=http._transport)


def same(stored, plan):
    """Whether they differ in name and card only."""
    return json.loads(json.dumps(stored.to_dict())) == json.loads(json.dumps(plan.to_dict()))


def test_a_plan_is_the_library_s_plan(client):
    more = {"rates": [None, 0.9, None, None], "step_seconds": [0.1, None, None, 0.3]}
    more["strided"] = [Strided(4, 4, 13_000_000, 0.7, 0.95)]
    plan = client.plan(*POINTS, hp.Weighted(0.2), hp.LadderCost(2.0, "8MB"), **more)
    assert isinstance(plan, hp.Plan)
    assert same(plan, plan_from_measurements(*POINTS, hp.Weighted(0.2), hp.LadderCost(2.0, "8MB"), **more))
    assert client.get_plan(plan.id) == plan


def test_what_is_left_open_is_the_library_s_default(client):
    assert same(client.plan(*POINTS), plan_from_measurements(*POINTS))


def test_arrays_are_measurements_too(client):
    depth, *lists = POINTS
    assert same(client.plan(depth, *map(np.array, lists)), plan_from_measurements(*POINTS))


def test_a_plan_is_judged_anew(client):
    first, here = client.plan(*POINTS), plan_from_measurements(*POINTS)
    assert same(client.replan(first.id, hp.MemoryLimit("15MB")), replan(here, hp.MemoryLimit("15MB")))
    assert same(client.replan(first.id, cost=hp.LadderCost(3.0)), replan(here, cost=hp.LadderCost(3.0)))
    cards = [Card("small", 10**7, 1.0), Card("large", 10**9, 9.0)]
    plan, card = replan_for_cards(here, cards)
    judged = client.replan(first.id, cards=cards)
    assert same(judged, plan)
    assert judged.card == card.name == "small"


def test_refusals_are_told_in_words(client):
    with pytest.raises(ServiceError, match=r"cosine\[1\]") as refused:
        client.plan(12, [1, 4], [1, 2], [0.5, 1.5])
    assert refused.value.status == 422
    assert refused.value.errors[0][0] == "cosine[1]"
    with pytest.raises(ServiceError, match=r"cosine\[1\]"):
        client.plan(12, [1, 4], [1, 2], [0.5, math.nan])
    with pytest.raises(ServiceError, match="no plan of this id"):
        client.get_plan("absent")
    with pytest.raises(ServiceError) as refused:
        client.get_plan("../../livez")
    assert refused.value.status == 404
    with pytest.raises(ValueError, match="is none that a service takes"):
        client.plan(*POINTS, cost=lambda size: 1.0)


def test_what_nothing_meets_is_the_library_s_error(client):
    with pytest.raises(hp.InfeasibleError) as there:
        client.plan(*POINTS, hp.MemoryLimit(1000))
    with pytest.raises(hp.InfeasibleError) as here:
        plan_from_measurements(*POINTS, hp.MemoryLimit(1000))
    assert str(there.value) == str(here.value)
    assert there.value.nearest == here.value.nearest


def test_a_key_is_sent(tmp_path):
    app = create_app(Settings(database_url=f"sqlite:///{tmp_path}/plans.sqlite3", require_keys=True))
    with TestClient(app, base_url="http://localhost") as http:
        key = security.new_key(app.state.database, "mine")
        with Client("http://localhost", key, transport=http._transport) as client:
            assert client.plan(*POINTS).depth == 12
        with (
            Client("http://localhost", transport=http._transport) as client,
            pytest.raises(ServiceError, match="Send a key"),
        ):
            client.plan(*POINTS)


def answering(*answers):
    """A client of a service that gives these answers in turn, and what it was asked."""
    asked, left = [], list(answers)

    def answer(request):
        asked.append(f"{request.method} {request.url.path}")
        return left.pop(0)

    return Client("http://localhost", transport=httpx2.MockTransport(answer)), asked


def job(state, **more):
    return httpx2.Response(200, json={"id": "j", "state": state, "plan_id": None, "error": None} | more)


def test_a_job_is_awaited_until_its_plan(monkeypatch):
    monkeypatch.setattr("horizonplan.client.POLL_SECONDS", 0.0)
    plan = plan_from_measurements(*POINTS)
    stored = httpx2.Response(200, json={"id": "p"} | plan.to_dict())
    ended = job("succeeded", plan_id="p")
    client, asked = answering(httpx2.Response(202, json={"id": "j"}), job("queued"), job("running"), ended, stored)
    assert same(client.wait(client.submit({"model": "any"})), plan)
    assert asked == ["POST /v1/jobs", *3 * ["GET /v1/jobs/j"], "GET /v1/plans/p"]


def test_a_job_that_ends_otherwise_is_an_error():
    client, _ = answering(job("failed", error={"kind": "invalid", "message": "too deep"}), job("cancelled"))
    with pytest.raises(JobError, match="job j failed: too deep"):
        client.wait("j")
    with pytest.raises(JobError, match="job j cancelled"):
        client.wait("j")


def test_patience_ends_and_the_job_goes_on():
    client, asked = answering(job("running"), job("running"))
    with pytest.raises(TimeoutError, match="still running after 0 s"):
        client.wait("j", timeout=0)
    assert client.cancel("j")["state"] == "running"
    assert asked == ["GET /v1/jobs/j", "POST /v1/jobs/j/cancel"]


@pytest.mark.parametrize(
    "answer", [httpx2.Response(200, text="<html>"), httpx2.Response(502, text="no"), httpx2.Response(404, json=[])]
)
def test_another_kind_of_service_is_no_plan(answer):
    with pytest.raises(ServiceError, match="is it a horizonplan service"):
        answering(answer)[0].get_plan("p")


def test_no_service_is_told_in_words():
    with pytest.raises(ServiceError, match="no answer") as refused, Client("http://127.0.0.1:9", timeout=5) as client:
        client.get_plan("p")
    assert refused.value.status is None


def test_what_cannot_be_sent_is_refused_here():
    with pytest.raises(ValueError, match="names no protocol"):
        Client("localhost:8000")
    client, asked = answering()
    with pytest.raises(TypeError, match="cards holds"):
        client.replan("0" * 32, cards=[{"name": "a", "memory_bytes": 1, "price": 1}])
    assert asked == []
