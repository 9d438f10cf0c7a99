"""Plans over HTTP."""

import pytest
from starlette.testclient import TestClient

from horizonplan import Plan
from horizonplan.api import Settings, create_app

HORIZONS = [1, 4, 8, 12]
ASKED = {
    "depth": 12,
    "horizons": HORIZONS,
    "memory_bytes": [10**6 * (10 + h) for h in HORIZONS],
    "cosine": [1 - (1 - h / 12) ** 3 for h in HORIZONS],
    "objective": {"kind": "accuracy", "epsilon": 0.1},
    "cost": {"kind": "linear", "unit_cost": 1.0, "node_memory_bytes": None},
}


@pytest.fixture
def client(tmp_path):
    with TestClient(create_app(Settings(database_url=f"sqlite:///{tmp_path}/plans.sqlite3"))) as client:
        yield client


def test_measurements_become_a_plan(client):
    answer = client.post("/v1/plans", json=ASKED)
    assert answer.status_code == 201, answer.text
    again = client.get(answer.headers["location"])
    assert again.json() == answer.json()
    plan = Plan.from_dict(answer.json())
    assert plan.to_dict() | {"id": answer.json()["id"]} == answer.json()
    assert plan.row.rate >= 0.9
