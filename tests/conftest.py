"""What every test starts from: one thread, a fixed seed, quiet Hugging Face logs, hypothesis without deadlines."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile(
    "horizonplan",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("horizonplan")


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def app(tmp_path):
    """The service on a database of its own."""
    from horizonplan.api import Settings, create_app  # most tests need none of it

    return create_app(Settings(database_url=f"sqlite:///{tmp_path}/plans.sqlite3"))
