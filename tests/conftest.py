"""What every test relies on: no test leaves its MLflow store to the next."""

import os
import sys

import pytest


@pytest.fixture(autouse=True)
def _no_tracking_store_left_behind(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    # Choosing a store sets it for the whole process, in the environment too.
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture
def one_worker(monkeypatch):
    """This process is the only worker of a run, as if torchrun had started it."""
    from training.engine import join_world

    # One group for the whole session: DeepSpeed holds on to the first that it meets.
    join_world()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
