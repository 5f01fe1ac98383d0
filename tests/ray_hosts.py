"""A Ray cluster of two hosts, of which the second is cut off and brought back.

Whoever tests it gives a folder, in which both sides tell each other where they are:

- `caught`: work has begun on the second host (made by that work);
- `cut`: the host is cut off now;
- `alive`: how many nodes the head counts (written by the driver, see :func:`join`);
- `back`: the host is a node again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hosts import Host

ROOT = Path(__file__).parents[1]
PORT = 6379
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
"""The head gives a silent node up within seconds."""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.1)


class Cluster:
    """A head on the first host and a worker on the second, of one CPU each.

    Args:
        hosts: the two.
        folder: for logs.
        paths: folders that Ray's workers import tests from.
    """

    def __init__(self, hosts: list[Host], folder: Path, paths: list[Path]) -> None:
        self.head, self.worker = hosts
        self.address = f"{self.head.address}:{PORT}"
        self.folder = folder
        python = os.pathsep.join(map(str, [ROOT, *paths, ROOT / "tests"]))
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = os.environ | {
            "PYTHONPATH": python,
            "PATH": programs,
            "OMP_NUM_THREADS": "1",
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_AUTH_MODE": "disabled",
        }
        for name in ("RAY_ADDRESS", "GLOO_SOCKET_IFNAME"):
            self.environment.pop(name, None)
        self._logs = 0
        self.processes = {}
        for host in hosts:  # a node that comes before the head is ready ends
            self.processes[host] = self._start(host)
            wait_until(self._started, f"a node on {host.name}")

    def _start(self, host: Host) -> subprocess.Popen[str]:
        """`ray start` on a host, which goes on until its raylet ends."""
        command = [
            # Beside this Python: its environment need not be on the PATH.
            *(Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats"),
            *("--node-ip-address", host.address, "--num-cpus", "1"),
            *("--object-store-memory", "100000000", "--temp-dir", temporary(host)),
        ]
        if host is self.head:
            command += ["--head", "--port", PORT, "--include-dashboard=false"]
        else:
            command += ["--address", self.address]
        return self.run(host, *command, environment=IMPATIENT if host is self.head else {})

    def _started(self) -> bool:
        """Whether the node that was started last is up."""
        *_, process = self.processes.values()
        assert process.poll() is None, self.logs()
        return "Ray runtime started" in self._log.read_text()

    def run(
        self, host: Host, *command: object, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """A process on a host, with its output in a file of the folder."""
        self._logs += 1
        self._log = self.folder / f"log-{self._logs}.txt"
        with self._log.open("w") as log:
            return host.start(
                *command,
                env=self.environment | (environment or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def logs(self) -> str:
        """The end of what every process said."""
        files = sorted(self.folder.glob("log-*.txt"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-3000:]}" for file in files)

    def lose_and_regain_worker(self, folder: Path, driver: subprocess.Popen[str]) -> None:
        """Cut the worker off while the driver works, and bring it back when it was given up."""

        def wait(condition: Callable[[], bool], what: str) -> None:
            def hold() -> bool:
                assert driver.poll() is None, f"the driver ended:\n{self.logs()}"
                return condition()

            wait_until(hold, what)

        def nodes(count: int) -> bool:
            counted = folder / "alive"
            return counted.exists() and counted.read_text() == str(count)

        wait((folder / "caught").exists, "work on the second host")
        self.worker.cut()
        (folder / "cut").touch()
        wait(lambda: nodes(1), "a head that gave the second host up")
        self.worker.mend()
        # Told that it was given up, it ends: whoever started it has to start it again.
        wait(lambda: self.processes[self.worker].poll() is not None, "the end of the cut-off node")
        self.processes[self.worker] = self._start(self.worker)
        wait(lambda: nodes(2), "the second host as a new node")
        (folder / "back").touch()


@contextmanager
def ray_on(hosts: list[Host], folder: Path, *paths: Path) -> Iterator[Cluster]:
    """A cluster of two hosts; it ends with them."""
    try:
        yield Cluster(hosts, folder, list(paths))
    finally:
        for host in hosts:
            host.kill_all()
            shutil.rmtree(temporary(host), ignore_errors=True)


def temporary(host: Host) -> str:
    """Where Ray keeps its files: a short path, because sockets lie below it."""
    return f"/tmp/sd-{host.name}"


def join(address: str, *folders: Path) -> None:
    """In the driver: connect when both hosts are nodes, and keep `alive` true in each folder."""
    import ray

    ray.init(address, log_to_driver=False)
    wait_until(lambda: _alive() == 2, "two nodes")
    threading.Thread(target=_count, args=(folders,), daemon=True).start()


def _alive() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def _count(folders: Iterable[Path]) -> None:
    while True:
        text = str(_alive())
        for folder in folders:
            new = folder / "alive.new"
            new.write_text(text)
            new.replace(folder / "alive")
        time.sleep(0.2)


def address_of_node() -> str:
    """Where this task or actor runs."""
    import ray

    return ray.util.get_node_ip_address()


def hold_until_cut_off(folder: Path) -> bool:
    """In work on the second host: whether this is the first such work; if so, it is cut off."""
    try:
        (folder / "caught").touch(exist_ok=False)
    except FileExistsError:
        return False
    wait_until((folder / "cut").exists, "the host being cut off")
    return True
