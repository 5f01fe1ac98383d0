"""Loading by alias from another machine: a real MLflow server, another process, another folder."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from model_directory import write_model_directory

import streamdit

LOAD = """
import sys, numpy as np, streamdit
chunk = next(streamdit.load("models:/tiny@best").stream("a red circle", seed=4))
np.save(sys.argv[1], chunk.frames)
"""


@pytest.fixture
def server(tmp_path):
    """Address of a server that proxies its artifacts, as a shared one does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = tmp_path / "server"
    store.mkdir()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--workers", "1"),
        *("--artifacts-destination", str(store / "artifacts")),
    ]
    with (store / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=store, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).read()
                break
            except OSError:
                assert process.poll() is None, (store / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_model_streams_by_alias_in_a_process_that_knows_only_the_server(server, tmp_path):
    directory = write_model_directory(tmp_path)
    expected = next(streamdit.load(directory).stream("a red circle", seed=4)).frames
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "MLFLOW_TRACKING_URI": server}
    options = ["--name", "tiny", "--alias", "best", "--sample-frames", "8"]
    register = [sys.executable, "-m", "jobs.register", str(directory), *options]
    subprocess.run(register, check=True, env=environment, cwd=tmp_path)
    directory.rename(tmp_path / "gone")
    out = elsewhere / "frames.npy"
    subprocess.run([sys.executable, "-c", LOAD, out], check=True, env=environment, cwd=elsewhere)
    assert np.array_equal(np.load(out), expected)
    assert [path.name for path in elsewhere.iterdir()] == ["frames.npy"]
    listed = subprocess.run(
        [sys.executable, "-m", "jobs.models", "--json"],
        check=True,
        env=environment,
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert '"aliases": [\n      "best"\n    ]' in listed.stdout
