"""The MLflow server of infra/mlflow for tests: on a real PostgreSQL, artifacts in simulated S3."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from ray_head import free_ports

COMPOSE = Path(__file__).parents[1] / "infra" / "mlflow" / "compose.yaml"
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def postgres_programs() -> Path:
    """Folder of PostgreSQL's server programs; skips the test where there is none."""
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = packaged[-1] if packaged else shutil.which("initdb")
    if found is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    return Path(found).parent


def unprivileged() -> dict[str, str]:
    """Whom to run PostgreSQL as, which refuses to be root."""
    if os.getuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    return {"user": "postgres" if "postgres" in names else "nobody"}


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A database server of its own on the loopback interface; yields the URL of a database."""
    programs, who = postgres_programs(), unprivileged()
    # Below /tmp itself: the user it runs as cannot enter the test's own folder.
    data = Path(f"/tmp/streamdit-postgres-{os.getpid()}-{folder.name}")
    data.mkdir(mode=0o700)
    if who:
        shutil.chown(data, who["user"])
    port = free_ports(1)[0]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": "/tmp", **who}
    try:
        subprocess.run(
            [programs / "initdb", "--username=mlflow", "--auth=trust", "-D", data],
            check=True,
            **quiet,
        )
        process = subprocess.Popen(
            [
                *(programs / "postgres", "-D", data, "-p", str(port)),
                *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={data}"),
            ],
            **quiet,
        )
        try:
            _wait_for_postgres(port, process)
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # SIGTERM would wait for clients
            process.wait(30)
    finally:
        shutil.rmtree(data, ignore_errors=True)


def _wait_for_postgres(port: int, process: subprocess.Popen) -> None:
    import psycopg2

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", dbname="postgres").close()
            return
        except psycopg2.OperationalError:
            assert process.poll() is None, "PostgreSQL ended"
            assert time.monotonic() < deadline, "PostgreSQL did not come up"
            time.sleep(0.2)


@contextmanager
def simulated_s3(*buckets: str) -> Iterator[str]:
    """An HTTP server that behaves like S3, with `buckets`; yields its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_ports(1)[0], verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    try:
        for bucket in buckets:
            s3_client(address).create_bucket(Bucket=bucket)
        yield address
    finally:
        server.stop()


def s3_client(address: str):
    """Client of :func:`simulated_s3`, whatever the environment says."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=address,
        region_name=S3_KEYS["AWS_DEFAULT_REGION"],
        aws_access_key_id=S3_KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=S3_KEYS["AWS_SECRET_ACCESS_KEY"],
    )


def server_command(port: int) -> list[str]:
    """The command of the compose file, on a port of the loopback interface."""
    words = yaml.safe_load(COMPOSE.read_text())["services"]["server"]["command"]
    assert words[:2] == ["mlflow", "server"]
    changed = {"--host": "127.0.0.1", "--port": str(port), "--allowed-hosts": f"127.0.0.1:{port}"}
    kept = [word for word in words[2:] if word.partition("=")[0] not in changed]
    return [
        *(sys.executable, "-m", "mlflow", "server", *kept),
        *(f"{name}={value}" for name, value in changed.items()),
    ]


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the server's address and that of the S3 store behind it."""
    with ExitStack() as stack:
        database = stack.enter_context(postgres(folder))
        store = stack.enter_context(simulated_s3("mlflow"))
        port = free_ports(1)[0]
        log = stack.enter_context((folder / "mlflow.log").open("w"))
        process = subprocess.Popen(
            server_command(port),
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **{key: value for key, value in os.environ.items() if "MLFLOW" not in key},
                **S3_KEYS,
                "MLFLOW_BACKEND_STORE_URI": database,
                "MLFLOW_S3_ENDPOINT_URL": store,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_DISABLE_TELEMETRY": "true",
            },
        )
        stack.callback(_stop, process)
        address = f"http://127.0.0.1:{port}"
        _wait_for_health(address, process, folder / "mlflow.log")
        yield address, store


def _wait_for_health(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


def _stop(process: subprocess.Popen) -> None:
    """End the server and the workers that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
            return
