"""Plans over HTTP: made, read, listed, judged anew, and refused with the field named.

The oracle is the library: ``plan_from_measurements`` and ``replan``.
"""

import json
import math

import pytest
from starlette.testclient import TestClient

import horizonplan as hp
from horizonplan.measured import plan_from_measurements, replan

HORIZONS = [1, 4, 8, 12]
ASKED = {
    "depth": 12,
    "horizons": HORIZONS,
    "memory_bytes": [10**6 * (10 + h) for h in HORIZONS],
    "cosine": [1 - (1 - h / 12) ** 3 for h in HORIZONS],
    "objective": {"kind": "accuracy", "epsilon": 0.1},
    "cost": {"kind": "linear", "unit_cost": 1.0, "node_memory_bytes": None},
}
JSON = {"content-type": "application/json"}
EXTRA = {"id", "created", "parent", "card"}


def as_json(value):
    return json.loads(json.dumps(value))


@pytest.fixture
def client(app):
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def made(client, **changes):
    answer = client.post("/v1/plans", json=ASKED | changes)
    assert answer.status_code == 201, answer.text
    return answer.json()


def local(objective=None):
    points = (ASKED[name] for name in ("depth", "horizons", "memory_bytes", "cosine"))
    return plan_from_measurements(*points, objective or hp.AccuracyConstraint(0.1), hp.LinearCost(1.0))


def test_measurements_become_the_library_s_plan(client):
    answer = client.post("/v1/plans", json=ASKED)
    assert answer.status_code == 201, answer.text
    found = answer.json()
    assert client.get(answer.headers["location"]).json() == found
    assert {name: value for name, value in found.items() if name not in EXTRA} == json.loads(
        json.dumps(local().to_dict())
    )
    assert hp.Plan.from_dict(found).row.rate >= 0.9


@pytest.mark.parametrize(
    ("asked", "objective"),
    [
        ({"kind": "accuracy", "epsilon": 0.5}, hp.AccuracyConstraint(0.5)),
        ({"kind": "weighted", "lam": 2.0}, hp.Weighted(2.0)),
        ({"kind": "memory", "limit_bytes": 15_000_000}, hp.MemoryLimit(15_000_000)),
    ],
    ids=["accuracy", "weighted", "memory"],
)
def test_another_objective_is_judged_without_probing(client, asked, objective):
    first = made(client)
    answer = client.post(f"/v1/plans/{first['id']}/replan", json={"objective": asked})
    assert answer.status_code == 201, answer.text
    found = answer.json()
    expected = replan(local(), objective)
    assert (found["horizon"], found["rows"]) == (
        expected.horizon,
        json.loads(json.dumps([r.to_dict() for r in expected.rows])),
    )
    assert found["parent"] == first["id"]
    assert client.get(f"/v1/plans/{first['id']}").json() == first


def test_the_cheapest_card_that_will_do_is_taken(client):
    cards = [
        {"name": "large", "memory_bytes": 10**9, "price": 9.0},
        {"name": "small", "memory_bytes": 2 * 10**7, "price": 1.0},
    ]
    assert made(client, cards=cards)["card"] == "small"


def test_plans_are_listed_newest_first_a_page_at_a_time(client):
    ids = [made(client)["id"] for _ in range(5)]
    seen, cursor = [], None
    while True:
        page = client.get("/v1/plans", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [item["id"] for item in page["items"]]
        made(client)  # moves nothing
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ids[::-1]
    assert client.get("/v1/plans", params={"cursor": "nonsense"}).status_code == 422


BAD = [
    ({"depth": 1}, "depth"),
    ({"depth": True}, "depth"),
    ({"depth": 10**6}, "depth"),
    ({"depth": 2000}, "depth"),
    ({"horizons": [1, 4, 4, 12]}, "horizons[2]"),
    ({"horizons": [1, 4, 8, 13]}, "horizons[3]"),
    ({"horizons": [0, 4, 8, 12]}, "horizons[0]"),
    ({"horizons": [1, 4, 8]}, "memory_bytes"),
    ({"memory_bytes": [1, 2, 3, -4]}, "memory_bytes[3]"),
    ({"memory_bytes": [1, 2, 3, 2**53 + 1]}, "memory_bytes[3]"),
    ({"memory_bytes": [1, 2, 3, "4"]}, "memory_bytes[3]"),
    ({"cosine": [0.1, 0.2, 0.3, 1.1]}, "cosine[3]"),
    ({"cosine": [0.1, 0.2, 0.3, math.nan]}, "cosine[3]"),
    ({"cosine": [0.1, 0.2, 0.3, math.inf]}, "cosine[3]"),
    ({"objective": {"kind": "accuracy", "epsilon": -1}}, "objective.epsilon"),
    ({"objective": {"kind": "memory", "limit_bytes": math.inf}}, "objective.limit_bytes"),
    ({"objective": {"kind": "luck"}}, "objective"),
    ({"cost": {"kind": "linear", "unit_cost": 0}}, "cost.unit_cost"),
    ({"objective": {"kind": "accuracy"}}, "objective.epsilon"),
    ({"objective": {"epsilon": 0.1}}, "objective"),
    ({"objective": {"kind": "memory", "memory": 1}}, "objective.memory"),
    ({"cards": [{"name": "a", "memory_bytes": 1, "price": "1"}]}, "cards[0].price"),
    ({"horizon": [1]}, "horizon"),
]


@pytest.mark.parametrize(("changes", "field"), BAD, ids=[f"{field} {change}"[:50] for change, field in BAD])
def test_what_cannot_be_is_refused_with_the_field_named(client, changes, field):
    body = json.dumps(ASKED | changes)  # NaN and Infinity as Python writes them
    answer = client.post("/v1/plans", content=body, headers=JSON)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == 422
    assert field in [error["field"] for error in problem["errors"]]
    assert client.get("/v1/plans").json()["items"] == []


def test_a_name_that_is_given_twice_is_refused(client):
    """Which of the two is meant nobody knows."""
    body = json.dumps(ASKED).replace('"epsilon": 0.1', '"epsilon": 0.9, "epsilon": 0.1')
    answer = client.post("/v1/plans", content=body, headers=JSON)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"] == [{"field": "epsilon", "message": "the name is given twice in one object"}]


def test_what_nothing_meets_is_told_with_the_nearest(client):
    answer = client.post("/v1/plans", json=ASKED | {"objective": {"kind": "memory", "limit_bytes": 10}})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert "nearest" in answer.text


@pytest.mark.parametrize(
    ("send", "status"),
    [
        (lambda c: c.get("/v1/plans/absent"), 404),
        (lambda c: c.get("/nowhere"), 404),
        (lambda c: c.delete("/v1/plans"), 405),
        (lambda c: c.post("/v1/plans", content=b"{}", headers={"content-type": "text/plain"}), 415),
        (lambda c: c.post("/v1/plans", content=b"{", headers=JSON), 400),
        (lambda c: c.post("/v1/plans", content=b"[" * 10**5, headers=JSON), 400),
        (lambda c: c.post("/v1/plans", content=b"\xff\xfe{", headers=JSON), 400),
        (lambda c: c.post("/v1/plans", content=b"9" * 5000, headers=JSON), 400),
        (lambda c: c.post("/v1/plans", content=iter([b" " * 2**20] * 2), headers=JSON), 413),
        (lambda c: c.post("/v1/plans", content=b" " * 2**21, headers=JSON), 413),
        (lambda c: c.get("/v1/plans", headers={"host": "evil.example"}), 403),
        (lambda c: c.post("/v1/plans", json=ASKED, headers={"sec-fetch-site": "cross-site"}), 403),
    ],
)
def test_errors_are_problems(client, send, status):
    answer = send(client)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_health_and_metrics(client):
    made(client)
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").status_code == 200
    text = client.get("/metrics").text
    assert "horizonplan" in text
    assert "/v1/plans" in text


def test_every_operation_declares_its_problems(client):
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for name, operation in operations.items():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert "application/problem+json" in response["content"], (path, name, status)
