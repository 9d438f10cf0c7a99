"""The service as a stranger finds it: requests made from its OpenAPI document, judged by schemathesis.

One of its checks is left out, that what fits the document is accepted: lists of equal length, horizons within the depth
and objectives that can be met are beyond what JSON Schema says.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from served import served
from starlette.testclient import TestClient

from horizonplan.api import Settings, create_app, security
from horizonplan.api.database import Database

ROOT = Path(__file__).parents[1]

load_all_checks()
positive_data_acceptance = CHECKS.get_one("positive_data_acceptance")


def tried(tmp_path, examples):
    """The operations that were tried."""
    app = create_app(Settings(database_url=f"sqlite:///{tmp_path}/plans.sqlite3"))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"host": "localhost"})
    names = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        def answers_as_documented(case):
            case.call_and_validate(headers={"host": "localhost"}, excluded_checks=[positive_data_acceptance])

        answers_as_documented()
        names.append(operation.label)
    return names


def test_answers_are_as_documented(tmp_path):
    assert "POST /v1/plans" in tried(tmp_path, 15)


@pytest.mark.slow
def test_answers_are_as_documented_over_and_over(tmp_path):
    assert len(tried(tmp_path, 150)) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("keys", [False, True], ids=["open", "with keys"])
def test_schemathesis_itself_finds_nothing(tmp_path, keys):
    """Its program with all checks and phases, as a stranger would run it, against a real server."""
    words = ["--config-file", ROOT / "schemathesis.toml", "run", "--checks", "all", "--max-examples", "30"]
    words += ["--no-color", "--seed", "1", "--generation-database", "none"]
    if keys:
        database = Database(f"sqlite:///{tmp_path}/served.sqlite3")
        database.upgrade()
        words += ["-H", f"Authorization: Bearer {security.new_key(database, 'mine')}"]
        database.close()
    with served(tmp_path, HORIZONPLAN_REQUIRE_KEYS=str(keys)) as (address, server):
        command = [Path(sys.executable).with_name("schemathesis"), *words, f"{address}/openapi.json"]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert server.poll() is None
    assert found.returncode == 0, found.stdout + found.stderr
    assert "No issues found" in found.stdout
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_method_that_is_none_is_told_which_are(tmp_path):
    with TestClient(create_app(Settings(database_url=f"sqlite:///{tmp_path}/plans.sqlite3"))) as client:
        paths = client.get("/openapi.json").json()["paths"]
        for path, operations in paths.items():
            answer = client.request("TRACE", path.replace("{", "").replace("}", ""))
            assert answer.status_code == 405
            assert set(answer.headers["allow"].split(", ")) == {name.upper() for name in operations}
        assert client.post("/static/page.css").headers["allow"] == "GET, HEAD"
        assert "/openapi.json" in client.get("/docs").json()["detail"]
