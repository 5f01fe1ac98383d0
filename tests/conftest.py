"""What every test relies on: no test leaves its MLflow store to the next."""

import os
import socket
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


@pytest.fixture(scope="session")
def _process_group():
    """A process group of one, for the whole session: DeepSpeed holds on to the first it meets."""
    import torch.distributed as dist

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_worker(_process_group, monkeypatch):
    """This process is the only worker of a run, as if torchrun had started it."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
