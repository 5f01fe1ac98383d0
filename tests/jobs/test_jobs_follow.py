"""Following a job: over connections that break, and when a person lets go of it."""

import io
import socket
from types import SimpleNamespace

import aiohttp
import pytest
import typer
from ray.job_submission import JobStatus

from jobs import cluster
from jobs.submit import follow_to_its_end
from streamdit.errors import UserError

LOG = "one\ntwo\nthree\n"
CLOSED = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


class Client:
    """A job server of which every connection breaks after some more of the log.

    After each break it is away for as many questions as `away` says.
    """

    def __init__(self, address, breaks_after=(), status=JobStatus.SUCCEEDED, error=CLOSED, away=0):
        self.address = address
        self.breaks = list(breaks_after)
        self.status = status
        self.error, self.away, self.questions = error, away, 0
        self.stopped = []

    def get_address(self):
        return self.address

    async def tail_job_logs(self, job):
        end = self.breaks.pop(0) if self.breaks else None
        for start in range(0, len(LOG[:end]), 3):  # the server tells from the beginning each time
            yield LOG[:end][start : start + 3]
        if end is not None:
            self.questions = self.away
            raise self.error

    def get_job_info(self, job):
        if job != "job":
            raise RuntimeError("Request failed with status code 404: job nope does not exist.")
        if self.questions:
            self.questions -= 1
            raise RuntimeError("Request failed with status code 502: Bad Gateway")
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
    "error",
    [
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("Response payload is not completed"),
        ConnectionResetError("Connection reset by peer"),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_log_goes_on_whatever_error_a_lost_connection_is(address, error):
    written = []
    client = Client(address, (4, 9), error=error, away=3)
    cluster.follow(client, "job", written.append)
    assert "".join(written) == LOG


def test_server_that_stays_away_ends_the_following_and_says_that_the_job_goes_on(
    address, monkeypatch
):
    monkeypatch.setattr(cluster, "GIVE_UP_AFTER_S", 0.2)
    written = []
    with pytest.raises(UserError) as caught:
        cluster.follow(Client(address, (4,), away=10**9), "job", written.append)
    assert f"job server {address} has been away" in str(caught.value)
    assert "job goes on: follow it with `streamdit jobs logs job --follow" in str(caught.value)
    assert "".join(written) == LOG[:4]


def test_job_that_a_server_has_forgotten_is_said(address):
    with pytest.raises(UserError, match=r"^job nope does not exist"):
        cluster.follow(Client(address, (4,)), "nope", lambda text: None)


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
