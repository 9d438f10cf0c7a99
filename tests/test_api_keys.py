"""Beyond this machine every request needs a key; keys are stored as hashes."""

import pytest
from starlette.testclient import TestClient

from horizonplan.api import Settings, create_app, security


@pytest.fixture
def app(tmp_path):
    return create_app(Settings(database_url=f"sqlite:///{tmp_path}/plans.sqlite3", host="0.0.0.0"))


def test_a_key_is_asked_for_and_kept_as_a_hash(app, tmp_path):
    with TestClient(app) as client:
        assert client.get("/v1/plans").status_code == 401
        assert client.get("/livez").status_code == 200
        key = security.new_key(app.state.database, "mine")
        with pytest.raises(ValueError, match="there is a key of that name"):
            security.new_key(app.state.database, "mine")
        headers = {"authorization": f"Bearer {key}"}
        assert client.get("/v1/plans", headers=headers).status_code == 200
        assert client.get("/v1/plans", headers={"authorization": f"Bearer {key}x"}).status_code == 401
        security.drop_key(app.state.database, "mine")
        assert client.get("/v1/plans", headers=headers).status_code == 401
    assert all(key.encode() not in path.read_bytes() for path in tmp_path.iterdir())
