"""What every test relies on: no test leaves its MLflow store, or models, to the next."""

import importlib.util
import os
import shutil
import socket
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before PyTorch counts the cores, which the test processes share.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# As the commands have it, for tests that call Ray without them. Its thread for usage figures
# outlives `ray.shutdown()`, and Ray ends a process in which another thread touches it during that.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Say how a test process ended that was not asked to: -9 is a kill, 1 may be Ray's own exit."""
    if error:
        print(f"\n{node.gateway.id} ended with status {node.gateway._io.popen.wait(10)}")


@pytest.fixture(autouse=True, scope="session")
def _new_mlflow_stores_are_copies(tmp_path_factory):
    """MLflow takes seconds to bring a new SQLite store up to date: one has it done for all."""
    if importlib.util.find_spec("mlflow") is None:  # where only the library is installed
        yield
        return
    import mlflow.store.db.utils as database

    initialise = database._initialize_tables
    template = tmp_path_factory.mktemp("mlflow") / "template.db"

    def copy_or_initialise(engine):
        if engine.dialect.name != "sqlite" or not engine.url.database:
            initialise(engine)
        elif template.exists():
            engine.dispose()
            shutil.copyfile(template, engine.url.database)
        else:
            initialise(engine)
            engine.dispose()
            shutil.copyfile(engine.url.database, template)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_initialize_tables", copy_or_initialise)
        yield


@pytest.fixture(autouse=True)
def _no_tracking_store_left_behind():
    # Not by monkeypatch, which would put back what a module's fixture left.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    # Choosing a store sets it for the whole process, in the environment too.
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(autouse=True)
def _no_models_left_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")
def _no_ray_left_behind():
    """Tests of one file may share a runtime, which commands start in this process; no others."""
    yield
    if "ray" in sys.modules:
        from pipeline.graph import stop_ray

        stop_ray()


@pytest.fixture
def one_worker(monkeypatch):
    """This process is the only worker of a run, as if torchrun had started it."""
    from training.engine import join_world

    # One group for the whole session: DeepSpeed holds on to the first that it meets.
    join_world()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def hosts():
    """Two hosts with addresses of their own, joined by a cable."""
    from hosts import two_hosts

    with two_hosts() as made:
        yield made


@pytest.fixture
def s3(monkeypatch):
    """An S3 server on this machine, with one bucket."""
    import boto3
    from mlflow.store.artifact import s3_artifact_repo
    from moto.server import ThreadedMotoServer

    from pipeline import storage

    def forget_clients():
        storage._s3_client.cache_clear()
        s3_artifact_repo._cached_get_s3_client.cache_clear()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    forget_clients()
    client = boto3.client("s3")
    client.create_bucket(Bucket="videos")
    # All servers of a process keep one store, which has what earlier tests left.
    for item in client.list_objects_v2(Bucket="videos").get("Contents", ()):
        client.delete_object(Bucket="videos", Key=item["Key"])
    yield client
    server.stop()
    forget_clients()
