"""Following a job: over connections that break, and when a person lets go of it."""

import io
import socket
from types import SimpleNamespace

import pytest
import typer
from ray.job_submission import JobStatus

from jobs import cluster
from jobs.submit import follow_to_its_end

LOG = "one\ntwo\nthree\n"


class Client:
    """A job server of which every connection breaks after some more of the log."""

    def __init__(self, address, breaks_after=(), status=JobStatus.SUCCEEDED):
        self.address = address
        self.breaks = list(breaks_after)
        self.status = status
        self.stopped = []

    def get_address(self):
        return self.address

    async def tail_job_logs(self, job):
        end = self.breaks.pop(0) if self.breaks else None
        for start in range(0, len(LOG[:end]), 3):  # the server tells from the beginning each time
            yield LOG[:end][start : start + 3]
        if end is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job):
        if job != "job":
            raise RuntimeError("Request failed with status code 404: job nope does not exist.")
        return SimpleNamespace(status=self.status, driver_exit_code=3, message="why")

    def get_job_logs(self, job):
        return LOG

    def stop_job(self, job):
        self.stopped.append(job)
        return True


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(cluster, "RECONNECT_AFTER_S", 0.01)


@pytest.mark.parametrize("breaks", [(), (1,), (5, 7), (5, 2, 14)])
def test_log_is_written_once_whatever_breaks(address, breaks):
    written = []
    cluster.follow(Client(address, breaks), "job", written.append)
    assert "".join(written) == LOG


@pytest.mark.parametrize(
    ("status", "expected"),
    [(JobStatus.SUCCEEDED, 0), (JobStatus.FAILED, 3), (JobStatus.STOPPED, 130)],
)
def test_exit_status_is_the_jobs_own(address, status, expected):
    ended = cluster.follow(Client(address, status=status), "job", lambda text: None)
    assert cluster.exit_status(ended) == expected


def test_job_that_failed_before_it_ran_fails_the_command():
    never_ran = SimpleNamespace(status=JobStatus.FAILED, driver_exit_code=None)
    assert cluster.exit_status(never_ran) == 1


@pytest.mark.parametrize(("answer", "stopped"), [("y\n", ["job"]), ("n\n", [])])
def test_ctrl_c_on_a_terminal_asks_whether_to_stop(address, answer, stopped, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("jobs.submit.follow", interrupted)
    client = Client(address)
    with pytest.raises(typer.Exit) as ended:
        follow_to_its_end(client, "job")
    assert ended.value.exit_code == 130
    assert client.stopped == stopped
    said = capsys.readouterr()
    assert "stop job on the cluster?" in said.out + said.err
