"""A Ray head on this machine with its job server, for tests that submit to a cluster."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from processes import kill_tree


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def ray_head(folder: Path, cpus: int = 2, agent_port: int | None = None) -> Iterator[str]:
    """A head of its own, whatever else runs here; yields the job server's address."""
    gcs, dashboard, client, agent = free_ports(4)
    log = (folder / "head.log").open("w")
    # A short path: Ray's sockets lie below it, and their names have an end.
    temporary = Path("/tmp") / f"streamdit-ray-{dashboard}"
    # Jobs are started by a shell, as `python`: theirs is the one of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        [
            # Beside this Python: its environment need not be on the PATH.
            *(
                Path(sys.executable).with_name("ray"),
                "start",
                "--head",
                "--block",
                "--disable-usage-stats",
            ),
            *("--node-ip-address", "127.0.0.1", "--port", str(gcs)),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            *("--ray-client-server-port", str(client), "--num-cpus", str(cpus)),
            *("--dashboard-agent-listen-port", str(agent_port or agent)),
            # Any free port: two heads would hand out the same range.
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--object-store-memory", "200000000", "--temp-dir", str(temporary)),
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={
            **os.environ,
            "PATH": path,
            "RAY_AUTH_MODE": "disabled",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "OMP_NUM_THREADS": "1",
        },
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_up(address, process, folder / "head.log")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)  # Ray then ends what it started
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        if process.poll() is None:
            kill_tree(process)
        shutil.rmtree(temporary, ignore_errors=True)


def _wait_until_up(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
            # The version is served before jobs are.
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=30).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"the job server did not come up:\n{log.read_text()}")
