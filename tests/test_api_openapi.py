"""The service as a stranger finds it: requests made from its OpenAPI document, judged by schemathesis.

One of its checks is left out, that what fits the document is accepted: lists of equal length, horizons within the depth
and objectives that can be met are beyond what JSON Schema says.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS, load_all_checks

from horizonplan.api import Settings, create_app

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
    assert len(tried(tmp_path, 300)) >= 7
